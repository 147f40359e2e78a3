"""Lays out the tokens of a checked call: padding, packed documents, positions, and what a cache holds already.

See `TokenLayout` for the two arrangements of the layers. `inputs.check` calls `plan_layout` with arguments it has checked.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import with_host_values
from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.packing import readable


def plan_layout(
    batch: int,
    tokens: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None,
    cache: Cache | None = None,
) -> TokenLayout:
    """The layout of [B, T] tokens. mask [B, T] bool, False at padding (None: no padding); position_ids [B, T] or
    [3, B, T]; cu_seqlens int64; starts [B, T] bool, without cu_seqlens: where documents begin after the first of a row.

    The arguments are on one device, in CPU memory wherever the call could read them there; the layout is on `device`.
    """
    layout = _layout((batch, tokens), device, mask, position_ids, cu_seqlens, starts, cache)
    return layout.to(device)


def _layout(
    shape: tuple[int, int], device: torch.device, mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None,
    starts: Tensor | None, cache: Cache | None,
) -> TokenLayout:
    batch, tokens = shape
    if cu_seqlens is not None and cache is None:
        if position_ids is None:
            position_ids = _within_documents(cu_seqlens, tokens)
        return TokenLayout(shape, 1, tokens, _arranged(position_ids, None, 1), 0, None, cu_seqlens)
    if cu_seqlens is not None and cache is not None:
        return _continued_documents(shape, device, position_ids, cu_seqlens, cache)
    if starts is not None:
        return _packed_documents(shape, starts, mask, position_ids)
    if cache is not None and cache.batch_size != batch:
        raise ValueError(f"the cache holds {cache.batch_size} rows, the input has {batch}: make one with new_cache({batch})")
    lengths = source = None
    if mask is not None:
        lengths = mask.sum(1)
        if tokens > 1 or mask.is_cpu:
            order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # tokens first, padding after, each in their order
            source = order + tokens * torch.arange(batch, device=mask.device)[:, None]
    return _rows(shape, batch, tokens, device, position_ids, cache, lengths, source)


def with_positions(layout: TokenLayout, position_ids: Tensor) -> TokenLayout:
    """The layout with other positions, [B, T] or [3, B, T] in the caller's order."""
    positions = _arranged(position_ids, layout.source, layout.rows)
    return replace(layout, position_ids=positions.to(layout.position_ids.device, non_blocking=True))


def _rows(
    shape: tuple[int, int], rows: int, tokens: int, device: torch.device, position_ids: Tensor | None, cache: Cache | None,
    lengths: Tensor | None, source: Tensor | None,
) -> TokenLayout:
    """Rows that continue the cache's; positions count on from there, by the row's rotary offset ahead of the tokens."""
    starts = 0 if cache is None else cache.start()
    if position_ids is not None:
        positions = _arranged(position_ids, source, rows).to(device, non_blocking=True)
    else:
        first = starts.to(device)[:, None] if isinstance(starts, Tensor) else starts
        positions = first + torch.arange(tokens, device=device)[None]
        delta = None if cache is None else cache.rope_delta
        if delta is not None:
            positions = positions + delta.to(device)[:, None]
        positions = positions.expand(3, rows, tokens)
    host_lengths = tuple(lengths.tolist()) if lengths is not None and readable(lengths) else None
    return TokenLayout(shape, rows, tokens, positions, starts, lengths, None, source, host_lengths)


def _packed_documents(
    shape: tuple[int, int], starts: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> TokenLayout:
    """All documents of all rows end to end in one row, without the padding."""
    present = torch.ones_like(starts) if mask is None else mask
    first = present & (present.cumsum(1) == 1)
    source = present.flatten().nonzero()[:, 0]
    begins = (starts | first).flatten()[source].nonzero()[:, 0]
    cu_seqlens = F.pad(begins, (0, 1), value=source.shape[0])
    if readable(cu_seqlens):
        cu_seqlens = with_host_values(cu_seqlens, cu_seqlens.tolist())
    source = source[None]
    if position_ids is None:
        positions = _within_documents(cu_seqlens, source.shape[1]).expand(3, 1, -1)
    else:
        positions = _arranged(position_ids, source, 1)
    return TokenLayout(shape, 1, source.shape[1], positions, 0, None, cu_seqlens, source)


def _continued_documents(
    shape: tuple[int, int], device: torch.device, position_ids: Tensor | None, bounds: Tensor, cache: Cache
) -> TokenLayout:
    """Document d of a packed row continues row d of the cache: it becomes a row of its own."""
    lengths = bounds.diff()
    rows = lengths.shape[0]
    if cache.batch_size != rows:
        raise ValueError(f"cu_seqlens describe {rows} documents, the cache holds {cache.batch_size} rows")
    longest = int(lengths.max())
    source = (bounds[:-1, None] + torch.arange(longest, device=bounds.device)).clamp(max=shape[1] - 1)
    return _rows(shape, rows, longest, device, position_ids, cache, lengths, source)


def _within_documents(bounds: Tensor, tokens: int) -> Tensor:
    """[1, T]: each token's position in its document."""
    document = torch.repeat_interleave(bounds.diff(), output_size=tokens)
    return (torch.arange(tokens, device=bounds.device) - bounds[:-1][document])[None]


def _arranged(position_ids: Tensor, source: Tensor | None, rows: int) -> Tensor:
    """Positions [B, T] or [3, B, T] of the caller as [3, rows, tokens] in the layers' arrangement."""
    if source is not None:
        position_ids = position_ids.to(source.device).flatten(-2)[..., source]
    axes = position_ids[None] if position_ids.dim() == 2 else position_ids
    return axes.expand(3, rows, -1)
