"""Named intermediate values: listen to them, or replace them.

In module code a named value passes through one quiet call, which returns it unchanged and costs next to nothing when
nobody listens:

    decay = tap(self, "decay", -self.A_log.exp() * F.softplus(a + self.dt_bias))

Outside, a value is known by the path of its module relative to the text model and its own name, as in
"layers.3.linear_attn.decay" (`catalogue()` has them all). Names may be glob patterns, in which * also matches dots:

    with taps.record(model, "layers.*.linear_attn.decay") as seen:
        model(ids)
    seen["layers.0.linear_attn.decay"]                    # [B, T, H], on the autograd graph if the forward was

    with taps.patch(model, {"layers.3.mlp.routed": torch.zeros_like}):
        model(ids)

Listeners belong to the modules of one model, found when tapped begins. Patches are applied in the order in which
they were opened; recordings see what the model goes on with. Under gradient checkpointing `checkpoint_contexts` keeps
the recomputation faithful: the patches that the forward saw are applied again, even when their with-block has ended,
and nothing is recorded twice.

The list of listeners is process-wide (autograd recomputes on threads of its own); only a recomputation in progress is a
matter of the thread that runs it.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .named_values import CATALOGUE, Entry

Positions: TypeAlias = "slice | int | Sequence[int] | None"

_listeners: list[Any] = []  # Recording, Patch, and _Recompute while a recomputation with listeners is in progress
_lock = threading.Lock()  # around changes of that list: each device's backward has a thread of its own
_thread = threading.local()  # .recomputes: the recomputations in progress on this thread, innermost last
_LEAVES = frozenset(entry.leaf for entry in CATALOGUE)
_RANKS = {entry.leaf: len(entry.shape) for entry in CATALOGUE if entry.shape[:2] == ("B", "T")}


def tap(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """`value`, or what a patch makes of it. `module` computes it; `name` is its own name in the catalogue."""
    if not _listeners:
        return value
    return _heard(module, name, value)


def tapped(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether somebody listens to one of these values of this module (own names, as given to `tap`)."""
    if not _listeners:
        return False
    return any((module, name) in listener.targets for listener in _current() for name in names)


def catalogue() -> tuple[Entry, ...]:
    """Every named value: name, shape, equation, what it is computed from, its names elsewhere. N is a layer number."""
    return CATALOGUE


def _current() -> Sequence[Any]:
    """The listeners that count here: inside a recomputation those of the forward that it repeats."""
    recomputes = getattr(_thread, "recomputes", None)
    if recomputes:
        return recomputes[-1].listeners
    return [listener for listener in _listeners if not isinstance(listener, _Recompute)]


def _heard(module: nn.Module, name: str, value: Tensor) -> Tensor:
    assert name in _LEAVES, f"{name!r} is not in the catalogue: add it to taps/named_values.py"
    listeners = _current()
    for listener in listeners:
        if isinstance(listener, Patch):
            value = listener.apply(module, name, value)
    if not getattr(_thread, "recomputes", None):
        for listener in listeners:
            if isinstance(listener, Recording):
                listener.hear(module, name, value)
    return value


# --------------------------------------------------------------------------------------------------------------- record


class Recording(Mapping[str, Any]):
    """What was heard: name -> tensor, or a list of tensors when the value was computed several times.

    Readable inside the block and after it.
    """

    __eq__ = object.__eq__  # a mapping would compare its tensors

    def __init__(self, model: nn.Module, pattern: str | Sequence[str], positions: Positions = None) -> None:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        self.targets = _targets(model, patterns)
        self.positions = _checked_positions(positions)
        for name, entry in self.targets.values():
            if positions is not None and not {"T", "N"} & set(entry.shape) and name in map(_plain, patterns):
                shape = ", ".join(entry.shape)
                raise ValueError(f"positions= selects tokens, but {name} [{shape}] has no token axis: record it whole")
        self._modules = {module for module, _ in _places(model)}
        self._tokens: tuple[int, int] | None = None  # [B, T] of the forward in progress, to split N = B*T
        self._values: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Recording:
        _add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _remove(self)

    def hear(self, module: nn.Module, leaf: str, value: Tensor) -> None:
        if self.positions is not None and module in self._modules and value.dim() == _RANKS.get(leaf):
            self._tokens = (value.shape[0], value.shape[1])
        target = self.targets.get((module, leaf))
        if target is None:
            return
        name, entry = target
        if self.positions is not None:
            value = _select(name, entry, value, self.positions, self._tokens)
        if not value.requires_grad:
            value = value.detach().clone()  # a static cache is written in place: what was heard must not change later
        self._values.setdefault(name, []).append(value)

    def all(self, name: str) -> list[Tensor]:
        """Every value heard under this name, in order, as a list even if there is only one."""
        try:
            return list(self._values[_plain(name)])
        except KeyError:
            heard = difflib.get_close_matches(name, self._values, n=5, cutoff=0.3)
            raise KeyError(f"{name} was not heard; heard: {', '.join(heard) or 'nothing like it'}") from None

    def __getitem__(self, name: str) -> Any:
        values = self.all(name)
        return values[0] if len(values) == 1 else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forget what was heard so far."""
        self._values.clear()


def record(model: nn.Module, pattern: str | Sequence[str], positions: Positions = None) -> Recording:
    """Context manager: collect the values whose names match (one glob pattern or several).

    positions: a slice, an int or a list of ints selects tokens along T, counted within each forward and negative from
    its end. The axis stays: an int gives [B, 1, ...]. Values of shape [N, ...] are selected by token too and come as
    [B, T', ...]. Values without a token axis are recorded whole if a glob finds them and refused if they are named.
    Values stay on the autograd graph where they are on it; others are copies.
    """
    return Recording(model, pattern, positions)


def _checked_positions(positions: Positions) -> slice | list[int] | None:
    if positions is None or isinstance(positions, slice):
        return positions
    try:
        return [operator.index(p) for p in (positions if isinstance(positions, Sequence) else [positions])]
    except TypeError:
        raise ValueError(f"positions= takes a slice, an int or a list of ints, not {positions!r}") from None


def _select(
    name: str, entry: Entry, value: Tensor, positions: slice | list[int], tokens: tuple[int, int] | None
) -> Tensor:
    if "T" in entry.shape:
        axis = entry.shape.index("T")
    elif entry.shape[0] == "N":
        if tokens is None or tokens[0] * tokens[1] != value.shape[0]:
            known = "no value of this forward told [B, T]" if tokens is None else f"[B, T] is {list(tokens)}"
            shape = list(value.shape)
            raise ValueError(f"positions= cannot tell the tokens of {name} {shape}: {known}; record it whole")
        value, axis = value.unflatten(0, tokens), 1
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


# ---------------------------------------------------------------------------------------------------------------- patch


class Patch(AbstractContextManager["Patch"]):
    """The functions of a `with taps.patch(...)` block and the places where they apply."""

    def __init__(self, model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.targets: dict[tuple[nn.Module, str], list[tuple[str, Callable[[Tensor], Tensor]]]] = {}
        for pattern, function in functions.items():
            if not callable(function):
                raise ValueError(f"patch {pattern!r}: expected a function of the value, got {type(function).__name__}")
            for place, (name, _) in _targets(model, [pattern]).items():
                self.targets.setdefault(place, []).append((name, function))

    def __enter__(self) -> Patch:
        _add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _remove(self)

    def apply(self, module: nn.Module, leaf: str, value: Tensor) -> Tensor:
        for name, function in self.targets.get((module, leaf), ()):
            new = function(value)
            if not isinstance(new, Tensor):
                raise ValueError(f"the patch of {name} returned {type(new).__name__}, not a tensor")
            if new.shape != value.shape:
                raise ValueError(f"the patch of {name} returned {list(new.shape)}, the value has {list(value.shape)}")
            if new.dtype != value.dtype or new.device != value.device:
                has, should = f"{new.dtype} on {new.device}", f"{value.dtype} on {value.device}"
                raise ValueError(f"the patch of {name} returned {has}, the value is {should}: use .to(value)")
            value = new
        return value


def patch(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Patch:
    """Context manager: replace values by name. functions: name or glob pattern -> function(value) -> value.

    The new value has the old one's shape, dtype and device, else ValueError. Gradients flow through the function.
    """
    return Patch(model, functions)


def _add(listener: object) -> None:
    with _lock:
        _listeners.append(listener)


def _remove(listener: object) -> None:
    with _lock:
        _listeners[:] = [other for other in _listeners if other is not listener]


# ---------------------------------------------------------------------------------------------- gradient checkpointing


class _Recompute(AbstractContextManager[None]):
    """Around a recomputation: the listeners of its forward count, recordings are mute. May be entered repeatedly."""

    targets: Mapping[Any, Any] = {}

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.listeners = tuple(listeners)

    def __enter__(self) -> None:
        if not hasattr(_thread, "recomputes"):
            _thread.recomputes = []
        _thread.recomputes.append(self)
        if self.listeners:
            _add(self)  # so that taps are heard even if the with-blocks have ended

    def __exit__(self, *exc: object) -> None:
        _thread.recomputes.pop()
        _remove(self)


class _Nothing(AbstractContextManager[None]):
    def __exit__(self, *exc: object) -> None:
        return None


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=taps.checkpoint_contexts)`."""
    return _Nothing(), _Recompute(_current() if _listeners else ())


# ---------------------------------------------------------------------------------------------------------------- names

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_model"}
_PREFIX = re.compile(r"^(model\.|language_model\.)+")


def _plain(name: str) -> str:
    return _PREFIX.sub("", name)


def _relative(path: str) -> str:
    """A module's path as seen from the text model: without wrappers (compile, FSDP, DDP, peft) and outer models."""
    parts = [part for part in path.split(".") if part and part not in _WRAPPERS]
    while parts and parts[0] in ("model", "language_model"):
        del parts[0]
    return ".".join(parts)


def _general(path: str) -> str:
    """The catalogue's form of a path: layer numbers become N; the MTP head's layers are layers like others."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", path.removeprefix("mtp."))


def _numbered(path: str, layers: Sequence[int]) -> str:
    """A path with the checkpoint's layer number in place of the model's, where the model has some layers only."""
    found = re.match(r"layers\.(\d+)(.*)", path)
    if found is None or int(found[1]) >= len(layers):
        return path
    return f"layers.{layers[int(found[1])]}{found[2]}"


def _places(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[str, Entry]]:
    """Every place of this model that has a name: (module, own name) -> (full name, entry)."""
    numbers = next((m.__dict__["source_layers"] for m in model.modules() if "source_layers" in m.__dict__), ())
    modules = [(module, _numbered(_relative(path), numbers)) for path, module in model.named_modules()]
    roots = _roots({_general(path) for _, path in modules})
    places = {}
    for module, path in modules:
        for root in roots:
            parent = ".".join(part for part in (root, _general(path)) if part)
            for entry in CATALOGUE:
                if entry.parent == parent and (entry.needs is None or hasattr(module, entry.needs)):
                    places[module, entry.leaf] = (f"{path}.{entry.leaf}" if path else entry.leaf, entry)
    return places


def _roots(paths: set[str]) -> list[str]:
    """Where in the catalogue a model begins: "" for a text model, "layers.N" for a bare decoder layer, and so on: where
    most of its modules are found."""
    parents = sorted({entry.parent for entry in CATALOGUE}, key=len)
    found = {
        root: len({parent[len(root) :].lstrip(".") for parent in parents if parent != root and parent.startswith(root)} & paths)
        for root in parents
    }
    best = max(parents, key=lambda root: found[root])  # the first of several, the shortest
    return [best] if found[best] else [root for root in parents if root.count(".") > 1 and root.startswith("layers")]


def _targets(model: nn.Module, patterns: Sequence[str]) -> dict[tuple[nn.Module, str], tuple[str, Entry]]:
    """The places whose names match. ValueError with near names for a pattern that matches none."""
    places = _places(model)
    names = [name for name, _ in places.values()]
    found = {}
    for pattern in patterns:
        glob = re.sub(r"(?<=\.)N(?=\.)", "*", _plain(pattern))
        matches = {place: at for place, at in places.items() if fnmatch.fnmatchcase(at[0], glob)}
        if not matches:
            near = difflib.get_close_matches(glob, dict.fromkeys(names), n=5, cutoff=0.3)
            said = f"near: {', '.join(near)}" if near else "taps.catalogue() lists all names"
            raise ValueError(f"{pattern!r} matches no named value of this {type(model).__name__}; {said}")
        found.update(matches)
    return found
