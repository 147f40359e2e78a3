"""Checks of single values, and the base class of configurations, whose fields they check.

A check takes (name, value) and returns the value to keep, or raises ConfigError with the name, the value and the supported
values. Values come from untrusted files: JSON of any type, size and depth.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar, TypeVar

from qwen35moe.compat.keyword import safe_repr

MAX_LAYERS = 10_000  # limits loops over layers; the largest published model has 92
MAX_SIZE = 2**31 - 1
MAX_PARAMETERS = 10**14  # forty times the largest published model

Check = Callable[[str, Any], Any]


class ConfigError(ValueError):
    """An invalid or unsupported configuration; the message names the key, its value, and the supported values."""


# ---- checks of one value: (name, value) -> the value to keep, or ConfigError


def whole(low: int = 1, high: int = MAX_SIZE) -> Check:
    """An integer within [low, high]. JSON's true is not an integer, although isinstance(True, int) in Python."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} = {shown(value)} must be a whole number, not {kind(value)}")
        if not low <= value <= high:
            raise ConfigError(f"{name} = {shown(value)} must be within {low}..{high}")
        return value

    return check


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number within [low, high], or (low, high] when `above`."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} = {shown(value)} must be a number, not {kind(value)}")
        original = value
        try:
            value = float(value)
        except OverflowError:  # an integer beyond 1e308
            value = math.inf
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise ConfigError(f"{name} = {shown(original)} must be finite, {'above' if above else 'at least'} {low:g}{upper}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """true or false; 1 and 0 are numbers."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {shown(value)} must be true or false, not {kind(value)}")
    return value


def words(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} = {shown(value)} must be a string, not {kind(value)}")
    return value


def one_of(*supported: Any) -> Check:
    """One of the values that are implemented. true is not 1 and false is not 0."""

    def check(name: str, value: Any) -> Any:
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in supported):
            listed = " or ".join(shown(choice) for choice in supported)
            raise ConfigError(f"{name} = {shown(value)} is not supported; this library implements {listed}")
        return value

    return check


def optional(check: Check) -> Check:
    """null, or what `check` accepts."""
    return lambda name, value: None if value is None else check(name, value)


def token_ids(name: str, value: Any) -> int | list[int] | None:
    """null, one id, or a list of ids. Ids beyond the vocabulary are legal: their tokens never occur."""
    check = whole(low=-1)
    if isinstance(value, (list, tuple)):
        return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return optional(check)(name, value)


def names(name: str, value: Any) -> list[str]:
    """A list of strings."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} = {shown(value)} must be a list of strings, not {kind(value)}")
    return [words(f"{name}[{i}]", item) for i, item in enumerate(value)]


def dtype_name(name: str, value: Any) -> str:
    """The same for "bfloat16", "torch.bfloat16" and torch.bfloat16."""
    if not isinstance(value, str) and type(value).__module__ != "torch":
        raise ConfigError(f"{name} = {shown(value)} must name a dtype, not be {kind(value)}")
    text = str(value).removeprefix("torch.")
    if text not in ("float64", "float32", "bfloat16", "float16"):
        raise ConfigError(f"{name} = {shown(value)} is not supported; use float64, float32, bfloat16 or float16")
    return text


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A JSON object, copied one level deep."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} = {shown(value)} must be an object, not {kind(value)}")
    for key in value:
        words(f"a key of {name}", key)
    return dict(value)


def shown(value: Any, width: int = 80) -> str:
    """A value for a message, shortened."""
    if isinstance(value, (list, tuple)) and len(value) > 12:
        return f"a list of {len(value)}"
    if isinstance(value, Mapping) and len(value) > 12:
        return f"an object of {len(value)} keys"
    text = safe_repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def kind(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    table = ((bool, "a boolean"), (int, "a whole number"), (float, "a number"), (str, "a string"))
    table += (((list, tuple), "a list"), (Mapping, "an object"))
    return next((name for types, name in table if isinstance(value, types)), type(value).__name__)


# ---- fields that are fixed

# May be assigned on a checked config: these are read at each call, when weights are drawn or saved, or by other programs;
# the vocabulary follows a change of the model by a training library, which saving compares with the parameters.
RUNTIME: dict[str, Check] = {
    "use_cache": flag,
    "output_router_logits": flag,
    "router_aux_loss_coef": number(),
    "router_aux_loss_per_layer": flag,
    "vocab_size": whole(),
    "dtype": optional(dtype_name),
    "initializer_range": number(),
    "bos_token_id": token_ids,
    "eos_token_id": token_ids,
    "pad_token_id": token_ids,
}
# Assigned by scripts for transformers; here an argument of each call decides, or there is one value only.
_ONE_VALUE: dict[str, tuple[Check, str]] = {
    "return_dict": (one_of(True, None), "a call returns a mapping; output.to_tuple() is the tuple"),
    "output_hidden_states": (one_of(False, None), "pass output_hidden_states=True to the call"),
    "output_attentions": (one_of(False, None), "pass output_attentions=True to the call"),
    "pretraining_tp": (one_of(1, None), "it belongs to other architectures"),
}


class Unset:
    """The default of a field that follows from others; differs from None, which a file may contain as null."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __repr__(self) -> str:
        return self.shown  # in help(TextConfig)


T = TypeVar("T")


def suggests_names(cls: type[T]) -> type[T]:
    """A dataclass whose constructor names every unknown keyword and the closest field, instead of a TypeError of Python."""
    init: Any = cls.__init__

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **values: Any) -> None:
        known = field_names(cls)
        if args:
            raise ConfigError(f"{cls.__name__} takes keywords only: {cls.__name__}({known[0]}=...), or from_dict(a dict)")
        if unknown := [name for name in values if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=3)
            hint = f": did you mean {' or '.join(near)}?" if near else f"; fields are {', '.join(known)}"
            raise ConfigError(f"{cls.__name__} has no field {shown(unknown[0])}{hint}")
        init(self, **values)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


def checked(default: Any, check: Check) -> Any:
    """A dataclass field with its check."""
    return field(default=default, metadata={"check": check})


def field_names(cls: Any) -> tuple[str, ...]:
    """The fields of a dataclass, in order."""
    return tuple(f.name for f in fields(cls))


class Fixed:
    """Base class of configurations: the check of every field runs once; later assignments raise and name `replace`."""

    # Results that transformers' Trainer leaves out of predictions; it adds a list to this list.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "cache", "last_hidden_state", "aux_loss", "router_logits", "routing", "load_imbalance",
    ]  # fmt: skip
    is_encoder_decoder: ClassVar[bool] = False
    _name_or_path = ""
    _attn_implementation = None  # read by Trainer and TRL; backends chooses the implementation
    _prefix = ""  # of field names in messages

    def _check_fields(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            if "check" in f.metadata:
                setattr(self, f.name, f.metadata["check"](self._prefix + f.name, getattr(self, f.name)))

    def __setattr__(self, name: str, value: Any) -> None:
        if "_closed" not in self.__dict__ or name.startswith("_"):
            object.__setattr__(self, name, value)
        elif name in RUNTIME and hasattr(type(self), name):
            object.__setattr__(self, name, RUNTIME[name](name, value))
        elif name in _ONE_VALUE:
            check, instead = _ONE_VALUE[name]
            try:
                check(name, value)
            except ConfigError:
                raise ConfigError(f"config.{name} = {shown(value)} is not supported: {instead}") from None
        elif not hasattr(self, name) or getattr(self, name) != value:
            present = f"; it is {shown(getattr(self, name))}" if hasattr(self, name) else ""
            raise ConfigError(
                f"{name} cannot be assigned, because a checked configuration is fixed{present}. Make a changed copy: "
                f"config.replace({name}=...). Assignable are {', '.join(self._assignable())} and names that begin with _"
            )

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{name} cannot be deleted: a checked configuration is fixed")

    @classmethod
    def _assignable(cls) -> list[str]:
        return [name for name in RUNTIME if hasattr(cls, name)]

    @property
    def return_dict(self) -> bool:
        """True: a call returns a mapping, as in transformers."""
        return True

    @property
    def name_or_path(self) -> str:
        """The folder or Hub name that the model was loaded from."""
        return self._name_or_path

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this part of config.json."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as to_dict: defaults are included, because other programs have other defaults."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json, with all keys. use_diff is accepted because Trainer and peft pass it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class FixedDict(dict):
    """A dict that cannot be changed in place, so that a checked configuration stays valid."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("this part of a checked configuration is fixed: use config.replace(...)")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    update = pop = popitem = clear = setdefault = _refuse  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> FixedDict:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FixedDict, (dict(self),)


# ---- checks of values against each other


def divides(config: Fixed, divisor: str, name: str) -> None:
    """One size must be a multiple of another, for example heads of key/value heads."""
    small, large = getattr(config, divisor), getattr(config, name)
    if large % small:
        raise ConfigError(f"{config._prefix}{name} = {large} must be a multiple of {divisor} = {small}")


def limit(parameters: int) -> None:
    """Refuse sizes that fit into no machine, before memory is allocated."""
    if parameters > MAX_PARAMETERS:
        raise ConfigError(f"these sizes give {shown(parameters)} parameters; at most {MAX_PARAMETERS:.0e} are accepted")
