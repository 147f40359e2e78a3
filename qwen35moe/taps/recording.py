"""Record named values: `with taps.record(model, pattern) as values`."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .active import Tap
from .catalogue import CATALOGUE, Entry
from .names import matching_places, named_places, without_prefix

Positions: TypeAlias = "slice | int | Sequence[int] | None"

# The rank of every value of shape [B, T, ...]
_RANKS = {entry.leaf: len(entry.shape) for entry in CATALOGUE if entry.shape[:2] == ("B", "T")}


def record(model: nn.Module, pattern: str | Sequence[str], positions: Positions = None) -> Recording:
    """Context manager: collect the values whose names match (one glob pattern or several).

    positions: a slice, an int or a list of ints selects tokens along T; negative ones count from the end of each forward.
    The axis stays: an int gives [B, 1, ...]. Values of shape [N, ...] are selected by token too and come as [B, T', ...].
    Values without a token axis are recorded whole if a glob pattern matches them, and refused if they are named.
    Values on the autograd graph stay on it; others are copied.
    """
    return Recording(model, pattern, positions)


class Recording(Tap, Mapping[str, Any]):
    """The recorded values: name -> tensor, or a list of tensors when the value was computed several times.

    Readable inside the block and after it.
    """

    __eq__ = object.__eq__  # a mapping would compare its tensors

    def __init__(self, model: nn.Module, pattern: str | Sequence[str], positions: Positions = None) -> None:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        self.targets = matching_places(model, patterns)
        self.positions = _checked_positions(positions)
        for name, entry in self.targets.values():
            if positions is not None and not {"T", "N"} & set(entry.shape) and name in map(without_prefix, patterns):
                shape = ", ".join(entry.shape)
                raise ValueError(f"positions= selects tokens, but {name} [{shape}] has no token axis: record it whole")
        self._modules = {module for module, _ in named_places(model)}
        self._batch_and_tokens: tuple[int, int] | None = None  # [B, T] of the forward in progress, to split N = B*T
        self._values: dict[str, list[Tensor]] = {}

    def read(self, module: nn.Module, name: str, value: Tensor) -> None:
        if self.positions is not None and module in self._modules and value.dim() == _RANKS.get(name):
            self._batch_and_tokens = (value.shape[0], value.shape[1])
        target = self.targets.get((module, name))
        if target is None:
            return
        full_name, entry = target
        if self.positions is not None:
            value = _select(full_name, entry, value, self.positions, self._batch_and_tokens)
        if not value.requires_grad:
            value = value.detach().clone()  # a static cache is written in place: a recorded value must not change later
        self._values.setdefault(full_name, []).append(value)

    def all(self, name: str) -> list[Tensor]:
        """Every value recorded under this name, in order, as a list even if there is only one."""
        try:
            return list(self._values[without_prefix(name)])
        except KeyError:
            closest = difflib.get_close_matches(name, self._values, n=5, cutoff=0.3)
            raise KeyError(f"{name} was not recorded; closest recorded names: {', '.join(closest) or 'none'}") from None

    def __getitem__(self, name: str) -> Any:
        values = self.all(name)
        return values[0] if len(values) == 1 else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Discard the values recorded so far."""
        self._values.clear()


def _checked_positions(positions: Positions) -> slice | list[int] | None:
    if positions is None or isinstance(positions, slice):
        return positions
    try:
        return [operator.index(p) for p in (positions if isinstance(positions, Sequence) else [positions])]
    except TypeError:
        raise ValueError(f"positions= takes a slice, an int or a list of ints, not {positions!r}") from None


def _select(
    name: str, entry: Entry, value: Tensor, positions: slice | list[int], batch_and_tokens: tuple[int, int] | None
) -> Tensor:
    if "T" in entry.shape:
        axis = entry.shape.index("T")
    elif entry.shape[0] == "N":
        if batch_and_tokens is None or batch_and_tokens[0] * batch_and_tokens[1] != value.shape[0]:
            reason = "no value of this forward has shape [B, T, ...]"
            if batch_and_tokens is not None:
                reason = f"[B, T] is {list(batch_and_tokens)}"
            shape = list(value.shape)
            raise ValueError(f"positions= cannot tell the tokens of {name} {shape}: {reason}; record it whole")
        value, axis = value.unflatten(0, batch_and_tokens), 1
    else:
        return value
    length = value.shape[axis]
    if isinstance(positions, slice):
        indices = range(length)[positions]
    elif any(not -length <= p < length for p in positions):
        raise ValueError(f"positions={positions} reaches outside the {length} tokens of {name} {list(value.shape)}")
    else:
        indices = [p % length for p in positions]
    return value.index_select(axis, torch.tensor(list(indices), dtype=torch.long, device=value.device))
