"""Replace named values: `with taps.patch(model, {name: function})`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .active import Tap
from .catalogue import Entry
from .names import matching_places
from .positions import Positions, Selection, checked_positions, has_tokens
from .reports import warn_of_unreached

PatchFunction = Callable[..., Tensor]  # of the value, or of the value and the layer's number


def patch(model: nn.Module, functions: Mapping[str, PatchFunction], positions: Positions = None) -> Patch:
    """Context manager: replace values by name. functions: name or glob pattern -> function(value) -> value, or
    function(value, layer) with the number of the layer (None outside of layers).

    The new value has the old one's shape, dtype and device, else ValueError. Gradients flow through the function. It gets a
    copy, and may write into it: the value is the one that it returns. positions: the tokens that the function gets and
    replaces, [B, n, ...], counted in each row without its padding, as in `record`.
    """
    return Patch(model, functions, positions)


class Patch(Tap):
    """The functions of a `with taps.patch(...)` block and the places where they apply."""

    replaces = True

    def __init__(self, model: nn.Module, functions: Mapping[str, PatchFunction], positions: Positions = None) -> None:
        self.targets: dict[tuple[nn.Module, str], list[tuple[str, Entry, Callable[[Tensor], Tensor]]]] = {}
        self.patterns, self.positions = list(functions), checked_positions(positions)
        self._names: dict[tuple[nn.Module, str], tuple[str, Entry]] = {}
        self._reached: set[str] = set()
        for pattern, function in functions.items():
            if not callable(function):
                raise ValueError(f"patch {pattern!r}: expected a function of the value, got {type(function).__name__}")
            for place, (name, entry) in matching_places(model, [pattern]).items():
                if self.positions is not None and not has_tokens(entry):
                    shape = ", ".join(entry.shape)
                    raise ValueError(f"positions= selects tokens, but {name} [{shape}] has no token axis: patch it whole")
                self.targets.setdefault(place, []).append((name, entry, _of_layer(function, name)))
                self._names[place] = name, entry

    def replace(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        for full_name, entry, function in self.targets.get((module, name), ()):
            self._reached.add(full_name)
            value = self._patched(full_name, entry, function, value)
        return value

    def _patched(self, name: str, entry: Entry, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        if self.positions is None:
            return _checked(name, function(value.clone()), value)
        selection = Selection(name, entry, value, self.positions, None)
        chosen = selection.take(value)  # a copy
        return selection.put(value, _checked(name, function(chosen), chosen))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            warn_of_unreached("patch", self.patterns, self._names, self._reached, single_names=True)

    def __repr__(self) -> str:
        names = [name for name, _ in self._names.values()]
        return f"Patch of {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _of_layer(function: PatchFunction, name: str) -> Callable[[Tensor], Tensor]:
    """The function with the layer's number, if it requires a second argument."""
    try:
        parameters: list[Any] = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return function  # of C: one argument
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if len(required) < 2:
        return function
    if len(required) > 2:
        raise ValueError(f"the patch of {name} requires {len(required)} arguments: it is called with (value) or (value, layer)")
    number = re.search(r"(?:layers|blocks)\.(\d+)\.", f"{name}.")
    layer = None if number is None else int(number[1])
    return lambda value: function(value, layer)


def _checked(name: str, new: object, value: Tensor) -> Tensor:
    if not isinstance(new, Tensor):
        hint = ": return the value" if new is None else ""
        raise ValueError(f"the patch of {name} returned {type(new).__name__}, not a tensor{hint}")
    if new.shape != value.shape:
        raise ValueError(f"the patch of {name} returned {list(new.shape)}, the value has {list(value.shape)}")
    if new.dtype != value.dtype or new.device != value.device:
        actual, expected = f"{new.dtype} on {new.device}", f"{value.dtype} on {value.device}"
        raise ValueError(f"the patch of {name} returned {actual}, the value is {expected}: use .to(value)")
    return new.clone(memory_format=torch.contiguous_format) if 0 in new.stride() else new
