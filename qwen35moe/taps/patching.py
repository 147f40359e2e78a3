"""Replace named values: `with taps.patch(model, {name: function})`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .active import Tap
from .names import matching_places


def patch(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Patch:
    """Context manager: replace values by name. functions: name or glob pattern -> function(value) -> value.

    The new value has the old one's shape, dtype and device, else ValueError. Gradients flow through the function.
    """
    return Patch(model, functions)


class Patch(Tap):
    """The functions of a `with taps.patch(...)` block and the places where they apply."""

    replaces = True

    def __init__(self, model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.targets: dict[tuple[nn.Module, str], list[tuple[str, Callable[[Tensor], Tensor]]]] = {}
        for pattern, function in functions.items():
            if not callable(function):
                raise ValueError(f"patch {pattern!r}: expected a function of the value, got {type(function).__name__}")
            for place, (name, _) in matching_places(model, [pattern]).items():
                self.targets.setdefault(place, []).append((name, function))

    def replace(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        for full_name, function in self.targets.get((module, name), ()):
            value = _checked(full_name, function(value), value)
        return value


def _checked(name: str, new: object, value: Tensor) -> Tensor:
    if not isinstance(new, Tensor):
        raise ValueError(f"the patch of {name} returned {type(new).__name__}, not a tensor")
    if new.shape != value.shape:
        raise ValueError(f"the patch of {name} returned {list(new.shape)}, the value has {list(value.shape)}")
    if new.dtype != value.dtype or new.device != value.device:
        actual, expected = f"{new.dtype} on {new.device}", f"{value.dtype} on {value.device}"
        raise ValueError(f"the patch of {name} returned {actual}, the value is {expected}: use .to(value)")
    return new
