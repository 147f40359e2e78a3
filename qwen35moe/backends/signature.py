"""How the signature of an implementation is read against that of the definition.

An implementation takes the parameters of the definition. It may leave out one that has a default (`tap` of `experts`,
`dropout` of `attention`): it is then called without it, and cannot run a call that passes another value.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from qwen35moe.taps.catalogue import LEAVES

_OWN = ("qwen35moe", "qwen35moe_kernels")  # packages of this library


def checked(
    definition: Callable[..., Any], operation: str, name: str, fn: Callable[..., Any] | None,
    unsupported: Callable[..., Any] | None, slower: Callable[..., Any] | None, skips: Sequence[str],
) -> dict[str, Any]:
    """The fields of an implementation that depend on its signature. ValueError where it does not fit the definition's, and for
    unknown names in `skips`."""
    if isinstance(skips, str):
        raise ValueError(f"{operation}: skips is a sequence of names, such as ({skips!r},), not a string")
    for value in skips:
        if value not in LEAVES:
            near = difflib.get_close_matches(str(value), sorted(LEAVES), n=3) or sorted(LEAVES)
            raise ValueError(f"{operation}: skips={value!r} is no tapped value; near it: {', '.join(near)}")
    parameters = inspect.signature(definition).parameters
    what = f"the implementation {name!r} of {operation}"
    absent = _absent(parameters, fn, what)
    return {
        "fn": _without(absent, fn),
        "unsupported": _without(_absent(parameters, unsupported, f"unsupported of {what}"), unsupported),
        "slower": _without(_absent(parameters, slower, f"slower of {what}"), slower),
        "skips": tuple(skips),
        "first": next(iter(parameters)),
        "absent": absent,
    }


def _absent(parameters: Mapping[str, inspect.Parameter], fn: Callable[..., Any] | None, what: str) -> dict[str, Any]:
    """The parameters with defaults that `fn` does not take -> default. ValueError where a call could not reach `fn`."""
    if fn is None:
        return {}
    if not callable(fn):
        raise ValueError(f"{what} is {type(fn).__name__}, not a function")
    try:
        own = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # a function of C without a signature
        return {}
    kinds = inspect.Parameter
    takes_any = any(p.kind is kinds.VAR_POSITIONAL for p in own.values())
    takes_any_name = any(p.kind is kinds.VAR_KEYWORD for p in own.values())
    positional = [p for p in own.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    leading = [p for p in parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    reached = {p.name for p in positional[: len(leading)]}
    absent: dict[str, Any] = {}
    if len(positional) < len(leading) and not takes_any:
        _mismatch(what, own, parameters, f"the first {len(leading)} arguments are passed by position")
    for parameter in parameters.values():
        if parameter.kind is not kinds.KEYWORD_ONLY or takes_any_name:
            continue
        taken = own.get(parameter.name)
        if taken is not None and taken.kind is not kinds.POSITIONAL_ONLY and taken.name not in reached:
            continue
        if parameter.default is kinds.empty:
            _mismatch(what, own, parameters, f"it must take {parameter.name}=")
        absent[parameter.name] = parameter.default
    for p in own.values():
        variable = p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        if p.name not in reached and p.name not in parameters and p.default is kinds.empty and not variable:
            _mismatch(what, own, parameters, f"{p.name} is never passed and has no default")
    return absent


def _mismatch(what: str, own: Mapping[str, Any], parameters: Mapping[str, Any], why: str) -> None:
    raise ValueError(f"{what} takes ({', '.join(own)}), the operation is called with ({', '.join(parameters)}): {why}")


def _without(absent: Mapping[str, Any], fn: Callable[..., Any] | None) -> Any:
    """`fn`, called without the keywords in `absent`."""
    if not absent or fn is None:
        return fn

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **{name: value for name, value in kwargs.items() if name not in absent})

    return called


def equal(value: Any, default: Any) -> bool:
    """Whether a value that may be a tensor is the default."""
    return not isinstance(value, Tensor) and type(value) is type(default) and value == default


def of_this_library(fn: Callable[..., Any]) -> bool:
    """Whether `fn` and every function that it wraps (functools.wraps copies `__module__`) was written in this library."""
    layer: Any = fn
    while layer is not None:
        package = str(getattr(layer, "__globals__", {}).get("__name__", "")).partition(".")[0]
        if package not in _OWN:
            return False
        layer = getattr(layer, "__wrapped__", None)
    return True
