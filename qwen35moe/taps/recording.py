"""Record named values: `with taps.record(model, pattern) as values`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .active import Tap
from .catalogue import CATALOGUE
from .names import matching_places, named_places, without_prefix
from .positions import Positions, Selection, checked_positions, has_tokens
from .reports import warn_of_maps, warn_of_unreached

# The rank of every value of shape [B, T, ...]
_RANKS = {entry.leaf: len(entry.shape) for entry in CATALOGUE if entry.shape[:2] == ("B", "T")}


def record(model: nn.Module, pattern: str | Sequence[str], positions: Positions = None) -> Recording:
    """Context manager: collect the values whose names match (one glob pattern or several).

    positions: a slice, an int or a list of ints selects tokens along T. They count from the start of each row, negative ones
    from its end: padding on either side is no part of a row. The axis stays: an int gives [B, 1, ...]. Values of shape [N, ...]
    are selected by token too and come as [B, T', ...]. Values without a token axis are recorded whole if a glob pattern matches
    them, and refused if they are named. Values on the autograd graph stay on it; others are copied.

    The attention maps `scores` [T, T], which are computed only while a tap reads them, are announced by a warning where a
    pattern does not name them. The `state` is that after the last token; docs/guide/taps.md has the states over time.
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
        self.patterns = patterns
        self.positions = checked_positions(positions)
        for name, entry in self.targets.values():
            if positions is not None and not has_tokens(entry) and name in map(without_prefix, patterns):
                shape = ", ".join(entry.shape)
                raise ValueError(f"positions= selects tokens, but {name} [{shape}] has no token axis: record it whole")
        warn_of_maps(patterns, self.targets)
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
        if self.positions is not None and has_tokens(entry):
            value = Selection(full_name, entry, value, self.positions, self._batch_and_tokens).take(value)
        if not value.requires_grad:
            value = value.detach().clone()  # a static cache is written in place: a recorded value must not change later
        self._values.setdefault(full_name, []).append(value)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            warn_of_unreached("recording", self.patterns, self.targets, self._values)

    def __repr__(self) -> str:
        lines = [f"Recording of {len(self._values)} values"]
        for name, values in list(self._values.items())[:30]:
            more = f", {len(values)} times" if len(values) > 1 else ""
            lines.append(f"  {name} {list(values[0].shape)} {str(values[0].dtype).removeprefix('torch.')}{more}")
        if len(self._values) > 30:
            lines.append(f"  ... and {len(self._values) - 30} more")
        return "\n".join(lines)

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
