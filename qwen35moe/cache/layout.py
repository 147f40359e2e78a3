"""The arrangement of a call's tokens for the layers.

The caller passes rows [B, T] with padding left, right or in between, or one row of packed documents. The layers see one of
two arrangements:

    rows      [B, T]  row r has its tokens first, then padding after `lengths[r]` tokens
    packed    [1, N]  documents one after the other, separated by `cu_seqlens`

`arrange` brings a caller's tensor into the layers' arrangement, `restore` brings a result back. So padding left, right or
none is the same computation, and no layer reads padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedStep:
    """One token per row into a static cache, by the same operations on the same memory at every step: see `cache.static`.

    active [B] bool: rows that take the token; the others stay as they are. rows [B]: 0 ... B - 1. positions: how many of a
    layer's first positions attention reads.
    """

    active: Tensor
    rows: Tensor
    positions: int


@dataclass(frozen=True)
class TokenLayout:
    """One call's tokens. `shape` is the caller's (B, T); `rows` and `tokens` are the layers'.

    starts: the position in the cache of each row's first new token, an int where all rows agree. lengths [rows]: new
    tokens per row, None when no row is padded. cu_seqlens: bounds of packed documents. source [rows, tokens]: the index of
    each token in the caller's flattened rows, None when the arrangements are equal. position_ids [3, rows, tokens]. step: of
    a decode step of fixed shape.
    """

    shape: tuple[int, int]
    rows: int
    tokens: int
    position_ids: Tensor
    starts: int | Tensor = 0
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    source: Tensor | None = None
    step: FixedStep | None = None

    @property
    def valid(self) -> Tensor | None:
        """[rows, tokens]: True for tokens, False for padding; None without padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.tokens, device=self.lengths.device) < self.lengths[:, None]

    def arrange(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [rows, tokens, ...]; padding becomes zero, even where it is nan."""
        if self.source is None:
            return x
        arranged = x.flatten(0, 1)[self.source.flatten()].unflatten(0, (self.rows, self.tokens))
        valid = self.valid
        if valid is not None:
            arranged = torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), arranged, arranged.new_zeros(()))
        return arranged

    def restore(self, x: Tensor) -> Tensor:
        """[rows, tokens, ...] to [B, T, ...]; padding is zero."""
        if self.source is None:
            return x
        flat, source = x.flatten(0, 1), self.source.flatten()
        total = self.shape[0] * self.shape[1]
        valid = self.valid
        if valid is not None:
            flat = torch.where(valid.flatten().view(-1, *[1] * (x.dim() - 2)), flat, flat.new_zeros(()))
            source = torch.where(valid.flatten(), source, total)  # padding goes to one more row, which is cut off
        out = flat.new_zeros(total + 1, *x.shape[2:]).index_copy(0, source, flat)
        return out[:total].unflatten(0, self.shape)

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def mask(self) -> Tensor | None:
        """[B * T] in the caller's order: True for tokens, False for padding; None without padding."""
        if self.source is None:
            return None
        ones = torch.ones(self.rows, self.tokens, dtype=torch.bool, device=self.source.device)
        return self.restore(ones).flatten()


def token_positions(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Row, position in the cache and index into [rows, tokens] of every token, padding left out."""
    rows, tokens = layout.rows, layout.tokens
    row = torch.arange(rows, device=device)[:, None].expand(rows, tokens)
    column = torch.arange(tokens, device=device).expand(rows, tokens)
    start = layout.starts[:, None].to(device) if isinstance(layout.starts, Tensor) else layout.starts
    valid = layout.valid
    if valid is None:
        return row, column + start, (row, column)
    index = (row[valid], column[valid])
    return index[0], (column + start)[valid], index
