"""Documents packed in one row, in every form in which a call names them.

    cu_seqlens     bounds 0 ... T of the documents of one row [1, T]
    seq_idx        [B, T] the number of each token's document
    attention_mask [B, T] 1 1 1 2 2 0: the number of each token's document in its row, 0 at padding
    position_ids   a document begins where the position does not rise
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import on_host, unbatched, values_known, with_host_values

LOWEST = torch.iinfo(torch.int64).min


def require(condition: Tensor, message: str) -> None:
    """ValueError unless the scalar condition holds, under torch.vmap in every call; in a compiled or exported graph an
    assertion when the graph runs, and on a GPU one for which the host does not wait. Not checked where there are no values:
    meta and fake tensors."""
    if torch.compiler.is_compiling() or (condition.is_cuda and values_known(condition)):
        torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]
    elif values_known(condition := unbatched(condition)) and not bool(condition.all()):
        raise ValueError(message)


def readable(tensor: Tensor) -> bool:
    """Whether a check may read the values at no cost: they decide for the whole call and are in CPU memory. Others are checked
    where they are, by `require`."""
    return tensor.is_cpu and values_known(tensor)


def text_positions(position_ids: Tensor) -> Tensor:
    """The positions at whose restarts documents begin: [B, T], row 0 of [4, B, T]; of [3, B, T] all three axes."""
    return position_ids[0] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids


def document_starts(position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T] True where a document begins after the first one of its row.

    position_ids [B, T]: a document begins where the position does not rise. [3, B, T]: where none of the three axes rises and
    all are equal, as they are at the first token of a row: inside an image one axis always rises. [4, B, T]: row 0 holds the
    positions of the text. Padding (mask False) is skipped: it neither hides a beginning nor makes one.
    """
    positions = text_positions(position_ids.long())
    before = _before(positions, mask)
    if positions.dim() == 2:
        starts = positions <= before
        if position_ids.dim() == 3:
            # Row 0 may be a copy of the time axis, which stands still inside an image while another axis rises.
            axes = position_ids[1:].long()
            inside = (positions == axes[0]) & (positions == before) & (axes > _before(axes, mask)).any(0)
            starts = starts & ~inside
    else:
        starts = (positions <= before).all(0) & (positions[0] == positions[1]) & (positions[0] == positions[2])
    return starts & (before if before.dim() == 2 else before[0]).ne(LOWEST) & (True if mask is None else mask)


def number_starts(numbers: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """[B, T] True where the number of the document [B, T] changes, after the first document of a row; padding is skipped.

    ValueError where a document's number comes again after another one, so that it would be in two pieces.
    """
    before = _before(numbers.long(), mask)
    known = before != LOWEST
    valid = known if mask is None else known & mask
    require(
        (~valid | (numbers >= before)).all(),
        f"{name} numbers the documents of a row in rising order: a document whose number returns is in two pieces",
    )
    return valid & (numbers != before)


def mask_starts(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """[B, T] where the documents of a mask [B or 1, 1, T, T] begin (True, or 0 where it is added to the scores, at keys that a
    query sees); None unless every query sees the tokens of its document up to itself and no others."""
    if mask.dim() != 4 or mask.shape[1:] != (1, tokens, tokens) or mask.shape[0] not in (1, batch):
        return None
    visible = (mask == 0 if mask.is_floating_point() else mask != 0)[:, 0].expand(batch, -1, -1)
    starts = F.pad(~visible.diagonal(-1, 1, 2), (1, 0))
    document = starts.cumsum(1)
    together = (document[:, :, None] == document[:, None]).tril()
    starts, equal = on_host([starts, (visible == together).all()])
    return starts if bool(equal) else None


def bound_starts(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[1, T] True where a document of cu_seqlens begins after the first token."""
    columns = torch.arange(tokens, device=cu_seqlens.device)
    return (torch.isin(columns, cu_seqlens) & (columns > 0))[None]


def checked_bounds(cu_seqlens: Tensor, batch: int, tokens: int, max_length: int | None) -> Tensor:
    """cu_seqlens as int64; ValueError unless they rise from 0 to the number of tokens."""
    if batch != 1:
        raise ValueError(f"cu_seqlens describe one packed row [1, T], the input has {batch} rows: flatten them into one")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens is a vector of integers 0 ... {tokens}, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    cu_seqlens = cu_seqlens.long()
    if unbatched(cu_seqlens) is not cu_seqlens:
        raise ValueError("cu_seqlens differ between the calls of torch.vmap: pass the documents as rows, with attention_mask")
    if not readable(cu_seqlens):
        rising = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        require(rising, "cu_seqlens must rise from 0 to the number of tokens")
        return cu_seqlens
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{shown_bounds(cu_seqlens)} must rise from 0 to the number of tokens, {tokens}")
    longest = max(b - a for a, b in pairwise(bounds))
    if max_length is not None and max_length < longest:
        raise ValueError(f"max_length_q or max_length_k is {max_length}, the longest document of cu_seqlens has {longest}")
    return with_host_values(cu_seqlens, bounds)


def shown_bounds(cu_seqlens: Tensor) -> str:
    """cu_seqlens for a message."""
    if not readable(cu_seqlens):
        return "cu_seqlens"
    return f"cu_seqlens {cu_seqlens[:8].tolist()}{' ...' if cu_seqlens.shape[0] > 8 else ''}"


def packed_starts(
    named: dict[str, Tensor], position_ids: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """[B, T] where documents begin after the first of each row; None when every row is one document.

    named: where they begin by each argument that numbers documents. ValueError where two of them disagree, where position_ids
    restart inside a document, and in a compiled graph or under torch.vmap where there is more than one document.
    """
    starts, source = None, ""
    for name, of_name in named.items():
        if starts is not None:
            require((of_name == starts).all(), f"{source} and {name} separate different documents: give one of them")
        starts, source = of_name, name
    restarts = None if position_ids is None else document_starts(position_ids, mask)
    if starts is not None and restarts is not None:
        _check_restarts(starts, restarts, source)
    starts = restarts if starts is None else starts
    if starts is None:
        return None
    if not readable(starts):
        name, graph = source or "position_ids", "a compiled graph" if torch.compiler.is_compiling() else "torch.vmap"
        require(~starts.any(), f"{name} pack documents, which {graph} cannot derive: give cu_seqlens")
        return None
    return starts if bool(starts.any()) else None


def _check_restarts(starts: Tensor, restarts: Tensor, source: str) -> None:
    """ValueError where positions restart inside a document. Positions may run on over a bound."""
    inside = restarts & ~starts
    if not readable(inside):
        require(~inside.any(), f"position_ids start again inside a document of {source}")
    elif bool(inside.any()):
        token = inside.nonzero()[0, 1].item()
        raise ValueError(f"position_ids start again at token {token}, where {source} begin no document")


def _before(values: Tensor, mask: Tensor | None) -> Tensor:
    """[..., T] the value of the token before each one in its row, padding skipped; `LOWEST` at the first token."""
    if mask is None:
        return F.pad(values[..., :-1], (1, 0), value=LOWEST)
    columns = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(1).values
    columns = F.pad(columns[:, :-1], (1, 0), value=-1).expand(values.shape)
    return torch.where(columns >= 0, values.gather(-1, columns.clamp(min=0)), LOWEST)
