"""Tokens of a named value, selected by `positions=`: counted from the start or the end of each row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .active import rows
from .catalogue import Entry

Positions: TypeAlias = "slice | int | Sequence[int] | None"


def checked_positions(positions: Positions) -> slice | list[int] | None:
    """A slice or a list of ints; None for all tokens. ValueError for anything else."""
    if positions is None or (isinstance(positions, slice) and positions == slice(None)):
        return None
    if isinstance(positions, slice):
        return positions
    try:
        return [operator.index(p) for p in (positions if isinstance(positions, Sequence) else [positions])]
    except TypeError:
        raise ValueError(f"positions= takes a slice, an int or a list of ints, not {positions!r:.60}") from None


def has_tokens(entry: Entry) -> bool:
    """Whether a value has an axis of tokens."""
    return bool({"T", "N"} & set(entry.shape))


class Selection:
    """The selected tokens of one value: index [rows, n] along `axis` of the value, with N split into rows and tokens."""

    def __init__(
        self, name: str, entry: Entry, value: Tensor, positions: slice | list[int], batch_and_tokens: tuple[int, int] | None
    ) -> None:
        """ValueError where a row does not have the tokens, or rows have other numbers of them. batch_and_tokens: (rows,
        tokens) of the forward, to split N; None where the model does not say."""
        self.shape = value.shape
        if "T" in entry.shape:
            self.axis, self.split = entry.shape.index("T"), None
        else:
            self.axis, self.split = 1, _checked_split(name, value, batch_and_tokens)
        batch, tokens = self.split or (value.shape[0], value.shape[self.axis])
        lengths = [tokens] * batch
        if rows.lengths is not None and rows.shape == (batch, tokens):
            lengths = rows.lengths.tolist()
        selected = [_positions_of_row(name, row, length, positions) for row, length in enumerate(lengths)]
        if len({len(row) for row in selected}) > 1:
            counts = [len(row) for row in selected]
            raise ValueError(
                f"positions={positions} selects {counts[:8]} tokens of the rows, which hold {lengths[:8]}, of {name}: give a "
                "list of ints, or take it whole"
            )
        self.index = torch.tensor(selected, dtype=torch.long, device=value.device)
        self.uniform = all(row == selected[0] for row in selected)

    def take(self, value: Tensor) -> Tensor:
        """The selected tokens [B, n, ...] (n at the axis of the tokens)."""
        if self.split is not None:
            value = value.unflatten(0, self.split)
        if self.uniform:
            return value.index_select(self.axis, self.index[0])
        return value.gather(self.axis, self._expanded(value))

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        """A copy of the value with the selected tokens replaced."""
        whole = value if self.split is None else value.unflatten(0, self.split)
        return whole.scatter(self.axis, self._expanded(whole), new).view(self.shape)

    def _expanded(self, value: Tensor) -> Tensor:
        """index as `gather` takes it: of the value's rank."""
        shape = [1] * value.dim()
        shape[0], shape[self.axis] = self.index.shape
        sizes = list(value.shape)
        sizes[self.axis] = self.index.shape[1]
        return self.index.view(shape).expand(sizes)


def _checked_split(name: str, value: Tensor, batch_and_tokens: tuple[int, int] | None) -> tuple[int, int]:
    known = rows.shape if rows.shape is not None and rows.shape[0] * rows.shape[1] == value.shape[0] else batch_and_tokens
    if known is None or known[0] * known[1] != value.shape[0]:
        reason = "no value of this forward has shape [B, T, ...]" if known is None else f"[B, T] is {list(known)}"
        raise ValueError(f"positions= cannot tell the tokens of {name} {list(value.shape)}: {reason}; record it whole")
    return known


def _positions_of_row(name: str, row: int, length: int, positions: slice | list[int]) -> list[int]:
    if isinstance(positions, slice):
        return list(range(length)[positions])
    if any(not -length <= p < length for p in positions):
        raise ValueError(f"positions={positions} reaches outside the {length} tokens of {name}, row {row}")
    return [p % length for p in positions]
