"""Functions that take the name of an operation: run it, and list, register and unregister its implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .operation import AUTO, CHOICES, Implementation, Unsupported, choice_of, find_operation, prepare
from .signature import checked
from .transforms import TRANSFORMS


def run(name: str, *args: Any, caller: Any = None, **kwargs: Any) -> Any:
    """Run the operation `name`, as `ops.<name>(...)` does."""
    return find_operation(name)(*args, caller=caller, **kwargs)


def resolve(name: str, *args: Any, caller: Any = None, **kwargs: Any) -> Implementation:
    """The implementation that `run` would call with these arguments; ValueError with the reasons if none can run."""
    return find_operation(name).choose(args, kwargs, caller)[0]


def is_builtin(*names: str, caller: Any = None) -> bool:
    """Whether calls of these operations run this library's own implementations, whatever their arguments.

    A fused form that replaces several operations is not used where others have registered an implementation of one that
    "auto" may run or that was chosen by name. caller: the calling module, whose own choices come first.
    """
    prepare()
    for name in names:
        op = find_operation(name)
        choice = choice_of(op.name, caller)
        if op.replaced if choice is None else not op.find(choice).own:
            return False
    return True


def implementations(name: str) -> list[Implementation]:
    """The implementations of an operation, in order of preference."""
    op = find_operation(name)
    prepare()
    return list(op.entries)


def register(
    operation: str, name: str, fn: Callable[..., Any] | None, unsupported: Unsupported | None = None, *,
    before: str | None = None, skips: Sequence[str] = (), differentiable: bool = True, missing: str | None = None,
    slower: Unsupported | None = None, device: str | None = None, compiles: bool = True,
    transforms: Sequence[str] = TRANSFORMS, double_backward: bool = True,
) -> None:
    """Add an implementation: last in the order of preference, or in front of the one named `before`.

    fn takes the parameters of the definition. It may leave out one that has a default (`tap` of experts, `dropout` of
    attention): it is then called without it, and cannot run a call that passes another value than the default.

    unsupported(*args, **kwargs) -> None | reason gets exactly the call's arguments. skips: names of tapped values that it
    does not materialise; it cannot run while a tap reads one of them. differentiable=False: it cannot run when an input
    requires a gradient. missing: why it cannot run on this machine with any arguments (fn may then be None); `describe` lists
    it, and it costs nothing per call. slower(*args, **kwargs) -> None | reason: why a later implementation is faster for these
    arguments; it applies to "auto", not to a choice by name. device: "cpu" or "cuda", where the first argument must be.
    compiles=False: it cannot run under torch.compile. transforms: those of "grad", "jvp" and "vmap" of torch.func that it
    supports (jvp: forward-mode AD too). double_backward=False: its backward cannot be differentiated.
    """
    op = find_operation(operation)
    if not name or name == AUTO:
        raise ValueError(f"{name!r} cannot be the name of an implementation")
    if fn is None and not missing:
        raise ValueError(f"{op.name}: {name!r} has neither a function nor a reason (missing=) for having none")
    if unknown := [kind for kind in transforms if kind not in TRANSFORMS]:
        raise ValueError(f"{op.name}: transforms={unknown} are unknown; known: {', '.join(TRANSFORMS)}")
    options = {"device": device, "compiles": compiles, "double_backward": double_backward}
    options["transforms"] = TRANSFORMS if set(transforms) == set(TRANSFORMS) else tuple(transforms)
    fields = checked(op.definition, op.name, name, fn, unsupported, slower, skips)
    op.add(Implementation(op.name, name, differentiable=differentiable, missing=missing, **fields, **options), before)


def unregister(operation: str, name: str) -> None:
    """Remove an implementation. A choice of it by `backends.use` becomes "auto"; a model that has chosen it raises."""
    op = find_operation(operation)
    op.remove(name)
    if CHOICES.get(op.name) == name:
        del CHOICES[op.name]


def checked_choices(choices: Mapping[str, str]) -> dict[str, str]:
    """The choices with aliases resolved; ValueError for unknown operations and implementations lists the known ones."""
    result = {}
    for operation, name in choices.items():
        op = find_operation(operation)
        if name != AUTO:
            op.find(name)
        result[op.name] = name
    return result
