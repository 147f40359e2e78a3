"""The ids of the tokens in a cache, so that a prompt which contradicts the cache is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import on_host
from qwen35moe.cache.layout import TokenLayout, write_rows
from qwen35moe.cache.modes import ordinary_tensors

UNKNOWN = -1  # tokens that came as embeddings


def empty_ids(batch: int, max_length: int | None, device: torch.device | str) -> Tensor:
    """[B, positions] int32 before the first token; a growing cache has no position yet."""
    return torch.full((batch, max_length or 0), UNKNOWN, dtype=torch.int32, device=device)


def with_tokens(ids: Tensor, layout: TokenLayout, new: Tensor | None, longest: int) -> Tensor:
    """ids [B, positions] with the layout's tokens `new` [B, T], in the caller's order; None where their ids are unknown.

    Written in place behind the tokens so far; a longer tensor is made where `longest` positions do not fit.
    """
    if longest > ids.shape[1]:
        with ordinary_tensors():
            ids = F.pad(ids, (0, max(longest, 2 * ids.shape[1], 64) - ids.shape[1]), value=UNKNOWN)
    arranged = None if new is None else layout.arrange(new.to(ids.device, ids.dtype))
    if isinstance(layout.starts, int) and layout.lengths is None:
        ids[:, layout.starts : layout.starts + layout.tokens] = UNKNOWN if arranged is None else arranged
    else:
        write_rows(ids, UNKNOWN if arranged is None else arranged, layout)
    return ids


def with_ids(ids: Tensor, first: Tensor) -> Tensor:
    """ids [B, positions] with the first positions replaced by `first` [B, n], for a cache that is loaded."""
    if first.shape[1] > ids.shape[1]:
        ids = F.pad(ids, (0, first.shape[1] - ids.shape[1]), value=UNKNOWN)
    ids[:, : first.shape[1]] = first
    return ids


def check_prompt(ids: Tensor, lengths: Sequence[int], prompt: Tensor, mask: Tensor | None) -> None:
    """ValueError where a row of `prompt` [B, T] does not begin with the tokens of its row of the cache.

    mask [B, T]: False or 0 for padding, on either side. Tokens of unknown ids fit every prompt.
    """
    rows = len(lengths)
    if prompt.dim() != 2 or prompt.shape[0] != rows or prompt.is_floating_point():
        raise ValueError(f"the prompt {list(prompt.shape)} {prompt.dtype} must be ids [{rows}, T]: the cache holds {rows} rows")
    if mask is not None and mask.shape != prompt.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not cover the prompt {list(prompt.shape)}")
    if not any(lengths):
        return
    kept, prompt, *masks = on_host([ids[:, : max(lengths)], prompt, *([] if mask is None else [mask])])
    mask = masks[0] if masks else None
    for row in range(rows):
        tokens = prompt[row] if mask is None else prompt[row][mask[row].bool()]
        held = kept[row, : lengths[row]].long()
        start = tokens.long()[: held.shape[0]]
        if start.shape[0] < held.shape[0]:
            raise ValueError(
                f"row {row}: the prompt has {start.shape[0]} tokens and the cache holds {held.shape[0]}: a prompt is the whole "
                "row, cached tokens included"
            )
        differ = ((held != start) & (held != UNKNOWN)).nonzero()
        if differ.numel():
            at = int(differ[0])
            raise ValueError(
                f"row {row}: token {at} of the prompt is {int(start[at])}, the cache holds {int(held[at])} there: the cache "
                "belongs to another text. A prompt is the whole row, cached tokens included; for a new text make a new cache"
            )
