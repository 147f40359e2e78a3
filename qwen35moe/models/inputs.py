"""Reads and checks the arguments of a forward call once: padding, packed documents, positions, cache.

`plan_layout` turns them into a `TokenLayout`, or raises ValueError where they contradict each other.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout


def plan_layout(
    batch: int,
    tokens: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
) -> TokenLayout:
    """Reads the arguments of a forward call, refuses what contradicts itself, and lays the tokens out."""
    position_ids = checked_positions(position_ids, batch, tokens)
    mask = new_mask(attention_mask, batch, tokens, cache)
    if cu_seqlens is not None:
        cu_seqlens = _checked_bounds(cu_seqlens, position_ids, batch, tokens, mask)
    elif position_ids is not None and position_ids.dim() == 2 and cache is None:
        packed = _restarts(position_ids, mask)
        if packed is not None:
            return _pack(packed, mask, position_ids, (batch, tokens))
    if cu_seqlens is not None:
        return _with_bounds(cu_seqlens, position_ids, (batch, tokens), cache)
    if cache is not None and cache.batch_size != batch:
        raise ValueError(f"the cache holds {cache.batch_size} rows, the input has {batch}: make one with new_cache({batch})")
    starts: int | Tensor = 0 if cache is None else cache.start()
    if mask is None:
        positions = _positions(position_ids, starts, batch, tokens, device, cache)
        return TokenLayout((batch, tokens), batch, tokens, positions, starts)
    lengths = mask.sum(1)
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    source = order + tokens * torch.arange(batch, device=device)[:, None]
    if position_ids is not None:
        position_ids = position_ids.flatten(-2)[..., source]
    positions = _positions(position_ids, starts, batch, tokens, device, cache)
    return TokenLayout((batch, tokens), batch, tokens, positions, starts, lengths, None, source)


def checked_positions(position_ids: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """[B, T] or [3, B, T], one row for all expanded to every row."""
    if position_ids is None:
        return None
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids are {position_ids.dtype}: give integers")
    shape = tuple(position_ids.shape)
    if shape[-2:] not in ((batch, tokens), (1, tokens)) or position_ids.dim() not in (2, 3) or (
        position_ids.dim() == 3 and shape[0] not in (3, 4)
    ):
        raise ValueError(
            f"position_ids {list(shape)} do not fit the input [{batch}, {tokens}]: give [{batch}, {tokens}], or "
            f"[3, {batch}, {tokens}] for time, height and width"
        )
    # transformers' [4, B, T] has the text positions in front of the three axes
    return position_ids[-3:].expand(3, batch, tokens) if position_ids.dim() == 3 else position_ids.expand(batch, tokens)


def new_mask(mask: Tensor | None, batch: int, tokens: int, cache: Cache | None) -> Tensor | None:
    """The mask of the new tokens as booleans, None when there is no padding among them."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions {list(mask.shape)}: only a 2-D mask [{batch}, tokens] of ones and "
            "zeros can hold for the convolution and the delta rule too. Packed documents are told apart by cu_seqlens"
        )
    past = 0 if cache is None else cache.seen
    if mask.shape != (batch, past + tokens):
        raise ValueError(
            f"attention_mask {list(mask.shape)} does not cover [{batch}, {past + tokens}]: {past} positions in the cache and "
            f"{tokens} new ones"
        )
    if mask.dtype != torch.bool and not torch.compiler.is_compiling():
        strange = mask[(mask != 0) & (mask != 1)]
        if strange.numel():
            raise ValueError(f"attention_mask holds {strange[0].item()}: give ones for tokens and zeros for padding")
    mask = mask.bool()
    if mask.device.type == "cpu" and cache is not None and past:
        before = mask[:, :past].sum(1)
        if not torch.equal(before, cache.lengths.cpu()):
            raise ValueError(
                f"attention_mask says the rows hold {before.tolist()} tokens so far, the cache holds {cache.lengths.tolist()}"
            )
    new = mask[:, past:]
    if torch.compiler.is_compiling():
        return new
    return None if bool(new.all()) else new


def _checked_bounds(
    cu_seqlens: Tensor, position_ids: Tensor | None, batch: int, tokens: int, mask: Tensor | None
) -> Tensor:
    if mask is not None:
        raise ValueError("cu_seqlens and an attention_mask with padding contradict each other: leave the padding out")
    if batch != 1:
        raise ValueError(f"cu_seqlens describe one packed row [1, T], the input has {batch} rows: flatten them into one")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is a vector of integers 0 ... {tokens}, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if torch.compiler.is_compiling():
        return cu_seqlens.long()
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens {bounds[:8]} ... must rise from 0 to the number of tokens, {tokens}")
    fresh = _restarts(position_ids, None) if position_ids is not None and position_ids.dim() == 2 else None
    inside = [] if fresh is None else sorted(set(fresh[0].nonzero()[:, 0].tolist()) - set(bounds))
    if inside:
        raise ValueError(f"position_ids start again at token {inside[0]}, where cu_seqlens {bounds[:8]} begin no document")
    return cu_seqlens.long()


def _restarts(position_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """[B, T] True where a document begins after the first one of its row; None when no row has a second one.

    A document begins where the position does not rise. Padding counts as no token, so it neither hides nor makes one.
    """
    if torch.compiler.is_compiling():
        return None
    position_ids = position_ids.long()
    if mask is None:
        fresh = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    else:
        low = torch.iinfo(torch.int64).min
        seen = torch.where(mask, position_ids, low)
        tokens = position_ids.shape[1]
        index = torch.where(mask, torch.arange(tokens, device=mask.device), -1).cummax(1).values
        before = F.pad(index[:, :-1], (1, 0), value=-1)
        last = torch.where(before >= 0, seen.gather(1, before.clamp(min=0)), low)
        fresh = mask & (position_ids <= last) & (before >= 0)
    return fresh if bool(fresh.any()) else None


def _pack(fresh: Tensor, mask: Tensor | None, position_ids: Tensor, shape: tuple[int, int]) -> TokenLayout:
    """All documents of all rows end to end in one row, padding left out."""
    present = torch.ones_like(fresh) if mask is None else mask
    first = present & (present.cumsum(1) == 1)
    source = present.flatten().nonzero()[:, 0]
    begins = (fresh | first).flatten()[source].nonzero()[:, 0]
    cu_seqlens = F.pad(begins, (0, 1), value=source.shape[0])
    positions = position_ids.flatten()[source]
    return TokenLayout(
        shape, 1, source.shape[0], positions.expand(3, 1, -1), 0, None, cu_seqlens, source[None]
    )


def _with_bounds(
    bounds: Tensor, position_ids: Tensor | None, shape: tuple[int, int], cache: Cache | None
) -> TokenLayout:
    """A packed row whose documents are given. With a cache, document d continues row d: it becomes a row of its own."""
    tokens, device = shape[1], bounds.device
    lengths = bounds.diff()
    if cache is None:
        if position_ids is None:
            place = torch.arange(tokens, device=device)
            document = torch.repeat_interleave(lengths, output_size=tokens)
            position_ids = (place - bounds[:-1][document])[None]
        return TokenLayout(shape, 1, tokens, _three_axes(position_ids, 1), 0, None, bounds)
    if cache.batch_size != lengths.shape[0]:
        raise ValueError(f"cu_seqlens describe {lengths.shape[0]} documents, the cache holds {cache.batch_size} rows")
    longest = int(lengths.max())
    source = (bounds[:-1, None] + torch.arange(longest, device=device)).clamp(max=tokens - 1)
    if position_ids is not None:
        position_ids = position_ids.flatten(-2)[..., source]
    rows = lengths.shape[0]
    starts = cache.start()
    positions = _positions(position_ids, starts, rows, longest, device, cache)
    return TokenLayout(shape, rows, longest, positions, starts, lengths, None, source)


def _positions(
    position_ids: Tensor | None, starts: int | Tensor, rows: int, tokens: int, device: torch.device, cache: Cache | None
) -> Tensor:
    """[3, rows, tokens]; where none are given, a token's slot plus the row's rotary offset."""
    if position_ids is not None:
        return _three_axes(position_ids, rows)
    new = torch.arange(tokens, device=device)
    positions = (starts.to(device)[:, None] if isinstance(starts, Tensor) else starts) + new[None]
    if cache is not None and cache.rope_delta is not None:
        positions = positions + cache.rope_delta.to(device)[:, None]
    return positions.expand(3, rows, tokens)


def _three_axes(position_ids: Tensor, rows: int) -> Tensor:
    """[B, T] or [3, B, T] to [3, B, T]."""
    axes = position_ids[None] if position_ids.dim() == 2 else position_ids
    return axes.expand(3, rows, -1)
