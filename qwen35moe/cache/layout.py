"""The arrangement of a call's tokens for the layers.

The caller passes rows [B, T] with padding left, right or in between, or one row of packed documents. The layers see one of
two arrangements:

    rows      [B, T]  row r has its tokens first, then padding after `lengths[r]` tokens
    packed    [1, N]  documents one after the other, separated by `cu_seqlens`

`arrange` brings a caller's tensor into the layers' arrangement, `restore` brings a result back. So padding left, right or
none is the same computation, and no layer reads padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from qwen35moe.backends.values import host_values, with_host_values

Shared = TypeVar("Shared")


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
    each token in the caller's flattened rows, None when the arrangements are equal. position_ids [3, rows, tokens].
    host_lengths: the lengths on the host, None where only the device has them. step: of a decode step of fixed shape.
    """

    shape: tuple[int, int]
    rows: int
    tokens: int
    position_ids: Tensor
    starts: int | Tensor = 0
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    source: Tensor | None = None
    host_lengths: tuple[int, ...] | None = None
    step: FixedStep | None = None

    @property
    def valid(self) -> Tensor | None:
        """[rows, tokens]: True for tokens, False for padding; None without padding."""
        lengths = self.lengths
        if lengths is None:
            return None
        return self._shared("valid", lambda: torch.arange(self.tokens, device=lengths.device) < lengths[:, None])

    def _shared(self, name: str, compute: Callable[[], Shared]) -> Shared:
        """A value that all layers of the call read, computed by the first; in a compiled graph, which shares them itself, by
        each."""
        if torch.compiler.is_compiling():
            return compute()
        values = self.__dict__.get("_values")
        if values is None:
            object.__setattr__(self, "_values", values := {})
        if name not in values:
            values[name] = compute()
        return values[name]

    def arrange(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [rows, tokens, ...]; padding becomes zero, even where it is nan."""
        valid = self.valid
        if self.source is None and valid is None:
            return x
        arranged = x
        if self.source is not None:
            arranged = x.flatten(0, 1)[self.source.flatten()].unflatten(0, (self.rows, self.tokens))
        if valid is not None:
            arranged = torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), arranged, arranged.new_zeros(()))
        return arranged

    def restore(self, x: Tensor) -> Tensor:
        """[rows, tokens, ...] to [B, T, ...]; padding is zero."""
        valid = self.valid
        if self.source is None:
            return x if valid is None else torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, x.new_zeros(()))
        flat, source = x.flatten(0, 1), self.source.flatten()
        total = self.shape[0] * self.shape[1]
        if valid is not None:
            flat = torch.where(valid.flatten().view(-1, *[1] * (x.dim() - 2)), flat, flat.new_zeros(()))
            source = torch.where(valid.flatten(), source, total)  # padding goes to one more row, which is cut off
        out = flat.new_zeros(total + 1, *x.shape[2:]).index_copy(0, source, flat)
        return out[:total].unflatten(0, self.shape)

    def to(self, device: torch.device | str | int) -> TokenLayout:
        """The same layout on another device, by copies for which the host does not wait."""
        device = torch.device(device)  # accelerate passes a name or a number
        tensors: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                tensors[name] = value.to(device, non_blocking=device.type != "cpu")
                if name == "cu_seqlens" and not torch.compiler.is_compiling():
                    with_host_values(tensors[name], host_values(value))
        return replace(self, **tensors) if tensors else self

    def writes(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """For `write_rows`: row [rows, 1], column of the tokens and position in the buffer of each write [rows, tokens]; with
        padding, whether it is one of a token, and whether its row has one [rows, 1]."""
        device, room = buffer.device, buffer.shape[1]
        return self._shared(f"writes {device} {room}", lambda: self._writes(device, room))

    def _writes(
        self, device: torch.device, room: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        row, column = torch.arange(self.rows, device=device)[:, None], torch.arange(self.tokens, device=device)[None]
        start = self.starts.to(device)[:, None] if isinstance(self.starts, Tensor) else self.starts
        if self.lengths is None:
            return row, column, (start + column).expand(self.rows, -1), None, None
        lengths = self.lengths.to(device)[:, None]
        is_new, has_new = column < lengths, lengths > 0
        if self.tokens > 1:
            column = torch.minimum(column, (lengths - 1).clamp(min=0))
        position = (start + column).clamp(max=room - 1).expand(self.rows, -1)  # a full row may have no new token
        return row, column, position, is_new, has_new

    def mask(self) -> Tensor | None:
        """[B * T] in the caller's order: True for tokens, False for padding; None without padding."""
        if self.source is None and self.lengths is None:
            return None
        ones = torch.ones(self.rows, self.tokens, dtype=torch.bool, device=self.position_ids.device)
        return self.restore(ones).flatten()


def write_rows(buffer: Tensor, new: Tensor | int, layout: TokenLayout, functional: bool = False) -> Tensor:
    """The buffer [rows, positions, ...] with the layout's tokens `new` [rows, tokens, ...] (or a number) from each row's
    position `starts` on, and as it was at padding. functional: a new tensor, through which gradients flow.

    Every row writes all its columns, so that no size depends on a value. A column of padding repeats the write of its row's
    last token; in a row without a new token it writes the value that the buffer has.
    """
    row, column, position, is_new, has_new = layout.writes(buffer)
    values = new
    if not isinstance(values, Tensor):
        values = torch.full_like(buffer[:, :1], values).expand(-1, layout.tokens, *buffer.shape[2:])
    if is_new is not None and has_new is not None:
        tail = [1] * (buffer.dim() - 2)
        other = buffer.detach()[row, position]
        if layout.tokens > 1:
            other = torch.where(has_new.view(-1, 1, *tail), values.detach()[row, column], other)
        values = torch.where(is_new.view(*is_new.shape, *tail), values, other)
    put = torch.Tensor.index_put if functional else torch.Tensor.index_put_
    return put(buffer, (row, position), values)
