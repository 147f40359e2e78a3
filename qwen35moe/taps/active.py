"""The active taps of this process, and the two calls that module code makes: `tap` and `tapped`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .catalogue import LEAVES

_T = TypeVar("_T", bound="Tap")


class Tap:
    """Reads or replaces named values inside a with-block. `targets` has its places as keys: (module, own name)."""

    targets: Mapping[tuple[nn.Module, str], Any] = {}
    replaces = False  # whether `replace` may return another value

    def __enter__(self: _T) -> _T:
        if not ACTIVE:
            rows.shape = rows.lengths = None  # of an earlier forward
        with _lock:
            ACTIVE.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        with _lock:
            for index in reversed(range(len(ACTIVE))):  # the last entry: a tap may be entered repeatedly
                if ACTIVE[index] is self:
                    del ACTIVE[index]
                    break

    def replace(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        """The value that the model continues with."""
        return value

    def read(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Called with the value that the model continues with, except while a forward is recomputed."""


# The active taps, in the order in which they were opened. Never rebound: other modules read this list to see without a call
# whether a tap is active. It is shared by all threads, because autograd recomputes on threads of its own.
ACTIVE: list[Tap] = []
_lock = threading.Lock()  # around changes of ACTIVE


class Recomputations(threading.local):
    """For each recomputation in progress on this thread, innermost last: the taps that were active in its forward."""

    def __init__(self) -> None:
        self.taps: list[Sequence[Tap]] = []


recomputations = Recomputations()


class Rows(threading.local):
    """The rows of this thread's forward: shape (rows, tokens) of its values, and the number of tokens of each row, a tensor
    [rows]; None without padding."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.lengths: Tensor | None = None


rows = Rows()


def note_rows(shape: tuple[int, int], lengths: Tensor | None) -> None:
    """A model calls this at the start of a forward, for taps that select tokens."""
    if ACTIVE:
        rows.shape, rows.lengths = shape, lengths


def tap(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """`value`, or its replacement by a patch. `module` computes it; `name` is its own name in the catalogue."""
    if not ACTIVE:
        return value
    return _pass_through_taps(module, name, value)


def tapped(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether an active tap reads or replaces one of these values of this module (own names, as passed to `tap`)."""
    if not ACTIVE:
        return False
    return any((module, name) in active.targets for active in current_taps() for name in names)


def patched(module: nn.Module, name: str) -> bool:
    """Whether an active tap replaces this value of this module. A patch may write into the value that it gets and return it,
    so identity does not tell."""
    if not ACTIVE:
        return False
    return any(active.replaces and (module, name) in active.targets for active in current_taps())


def current_taps() -> Sequence[Tap]:
    """The taps that apply to this forward: in a recomputation, those of the forward that it repeats."""
    if recomputations.taps:
        return recomputations.taps[-1]
    return [active for active in ACTIVE if active.targets]


def _pass_through_taps(module: nn.Module, name: str, value: Tensor) -> Tensor:
    assert name in LEAVES, f"{name!r} is not in the catalogue: add it to taps/catalogue.py"
    taps = current_taps()
    for active in taps:
        value = active.replace(module, name, value)
    if not recomputations.taps:
        for active in taps:
            active.read(module, name, value)
    return value
