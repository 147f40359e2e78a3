"""Reads a prompt in any form: real tokens, left-padded, with a length for each row.

Padding never reaches the cache, so its side does not matter. Inside the loop each row's real tokens are at the right end:
the last column is every row's last token, whichever side the caller padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.values import on_host, send
from ..compat import short

_SIGNED = {torch.int64, torch.int32, torch.int16, torch.int8}
_INTEGERS = _SIGNED | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}


@dataclass(frozen=True)
class Prompt:
    """ids [B, columns] and mask (None: all real) as the caller padded them; tokens [B, longest] the same, left-padded.
    host_ids, host_mask: copies in CPU memory."""

    ids: Tensor
    mask: Tensor | None
    tokens: Tensor
    lengths: tuple[int, ...]
    host_ids: Tensor
    host_mask: Tensor | None

    def repeated(self, n: int) -> Prompt:
        """Every row n times, one after the other."""
        if n == 1:
            return self
        ids, mask, tokens, host_ids, host_mask = (
            values if values is None else values.repeat_interleave(n, 0)
            for values in (self.ids, self.mask, self.tokens, self.host_ids, self.host_mask)
        )
        assert ids is not None and tokens is not None and host_ids is not None
        return Prompt(ids, mask, tokens, tuple(length for length in self.lengths for _ in range(n)), host_ids, host_mask)


def read(input_ids: Any, attention_mask: Any, *, vocabulary: int, device: torch.device, pad_token_id: int | None) -> Prompt:
    """Checks a prompt and converts it.

    input_ids: int tensor [B, T] or [T], a list of ids, or a list of lists of ids of any lengths (padded on the left).
    attention_mask: 1 for a real token, 0 for padding, of the same shape; None: every token is real.
    """
    ids, mask = _tensors(input_ids, attention_mask, pad_token_id)
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"the prompt is empty: input_ids has shape {tuple(ids.shape)}; give at least one token for each row")
    copies = on_host([ids] if mask is None else [ids, mask])  # checked there: for tensors on a GPU the only wait
    host_ids, host_mask = copies[0], None if mask is None else copies[1]
    if host_mask is None:
        tokens, lengths = host_ids, (ids.shape[1],) * ids.shape[0]
    else:
        tokens, lengths = _aligned(host_ids, host_mask)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        token = low if low < 0 else high
        raise ValueError(f"token id {token} is outside the vocabulary: ids must lie in 0..{vocabulary - 1}")
    ids, mask = _on(ids, device), None if mask is None else _on(mask, device)
    return Prompt(ids, mask, ids if mask is None else _on(tokens, device), lengths, host_ids, host_mask)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return send(tensor, device) if tensor.is_cpu else tensor.to(device)


def _tensors(ids: Any, mask: Any, pad: int | None) -> tuple[Tensor, Tensor | None]:
    if ids is None:
        raise ValueError("there is no prompt: give input_ids")
    if isinstance(ids, str):
        raise ValueError("input_ids is a string: encode it first, generate(**tokenizer(text))")
    if not isinstance(ids, Tensor) and hasattr(ids, "__array__"):  # numpy, a memory-mapped corpus
        ids = _array(ids)
    if not isinstance(ids, Tensor):
        ids, lengths = _from_lists(ids, pad)
        if lengths is not None:
            mask = _from_ragged(mask, lengths)
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids must hold integers, got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must have shape [rows, tokens] or [tokens], got {tuple(ids.shape)}")
    if mask is not None:
        mask = _mask(mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
                "they must be the same (1 for a token, 0 for padding)"
            )
    if ids.ndim == 1:
        ids, mask = ids[None], None if mask is None else mask[None]
    return ids.to(torch.int64), mask


def _array(ids: Any) -> Tensor:
    try:
        return ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"input_ids must be a tensor or a list of token ids, got {short(ids)}") from None


def _mask(mask: Any) -> Tensor:
    try:
        mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
        return mask if mask.is_floating_point() or mask.is_complex() else mask.to(torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"attention_mask must be a tensor of ones and zeros, got {short(mask)}") from None


def _from_lists(ids: Any, pad: int | None) -> tuple[Tensor, list[int] | None]:
    """A tensor, and the rows' lengths where they differ."""
    if not isinstance(ids, Sequence):
        raise ValueError(f"input_ids must be a tensor or a list of token ids, got {type(ids).__name__}")
    if not ids:
        raise ValueError("the prompt is empty: input_ids is []; give at least one token")
    if not isinstance(ids[0], (Sequence, Tensor)):
        return _row(ids), None
    rows = [_row(row) for row in ids]
    lengths = [len(row) for row in rows]
    if 0 in lengths:
        raise ValueError(f"the prompt of row {lengths.index(0)} is empty: give at least one token for each row")
    if min(lengths) == max(lengths):
        return torch.stack(rows), None
    if pad is None:
        raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens need padding: pass pad_token_id")
    padded = torch.full((len(rows), max(lengths)), pad, dtype=torch.int64, device="cpu")
    for row, tokens in zip(padded, rows, strict=True):
        row[len(row) - len(tokens) :] = tokens
    return padded, lengths


def _from_ragged(mask: Any, lengths: list[int]) -> Tensor:
    """The mask of rows that `_from_lists` padded: 0 for that padding, and the caller's mask of each row (default: ones)."""
    ones = torch.ones(max(lengths), dtype=torch.int64, device="cpu")
    rows = [ones[:length] for length in lengths] if mask is None else [_row(row) for row in mask]
    of_mask = [len(row) for row in rows]
    if of_mask != lengths:
        raise ValueError(f"attention_mask has rows of {of_mask} values, input_ids of {lengths}: they must be the same")
    width = max(lengths)
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])


def _row(values: Any) -> Tensor:
    try:
        row = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a row must be a list of token ids: {error}") from None
    if row.ndim != 1 or (row.numel() and row.dtype not in _INTEGERS):
        raise ValueError(f"a row must be a list of whole numbers, got {row.dtype} of shape {tuple(row.shape)}")
    return row.to(torch.int64)


def _aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The real tokens of each row at its right end, in their order, and the row's length; padding becomes 0."""
    real = mask != 0
    lengths = tuple(real.sum(-1).tolist())
    if bool((real & (mask != 1)).any()):
        raise ValueError("attention_mask must hold 1 for a token and 0 for padding; it holds other values")
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} of attention_mask is all padding: every row needs at least one token")
    order = real.to(torch.int8).argsort(dim=1, stable=True)  # padding first, tokens after, each in their order
    tokens = ids.masked_fill(~real, 0).gather(1, order)
    return tokens[:, ids.shape[1] - max(lengths) :], lengths
