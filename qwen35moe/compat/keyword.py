"""transformers' keywords: what each method does with one that it does not have itself.

A `Keyword` of the table (`qwen35moe.compat.TABLE`, one tuple per method) is translated, accepted because its value changes
nothing, or refused, with what to use instead. `read_keywords` applies the tuple of a method to the keywords of a call. A
keyword that neither the method nor the table has is a TypeError which suggests the nearest name: none is swallowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 60  # characters of a value from outside in a message


def anything(value: object) -> bool:
    """`neutral` of a keyword without effect here, whatever its value."""
    return True


@dataclass(frozen=True)
class Keyword:
    """One keyword of transformers.

    becomes: our keyword with the same meaning; `convert` turns the value into ours.
    neutral: values without effect here, or a function that is True for them; None is always one. They are accepted.
    does: what the method itself does with it, where it is one of the method's own keywords.
    instead: what to use instead, for the error of every other value and the note in docs/guide/from_transformers.md.
    tested_by: "tests/models/test_compat.py::test_name", a test that exists.
    """

    name: str
    becomes: str | None = None
    convert: Callable[[Any], Any] | None = None
    neutral: tuple[Any, ...] | Callable[[Any], bool] = ()
    instead: str = ""
    does: str = ""
    tested_by: str = ""

    def is_neutral(self, value: object) -> bool:
        """Whether a value changes nothing here."""
        if value is None:
            return True
        if callable(self.neutral):
            return self.neutral(value)
        return any(type(value) is type(other) and value == other for other in self.neutral)


def read_keywords(
    method: str, table: Iterable[Keyword], keywords: Mapping[str, Any], own: Collection[str]
) -> dict[str, Any]:
    """The keywords of a call in our words. own: the names of the method's own parameters.

    ValueError: a keyword of the table whose value is not supported, or two keywords for one thing with different values.
    TypeError: an unknown keyword.
    """
    known = {keyword.name: keyword for keyword in table}
    read = {name: value for name, value in keywords.items() if name in own}
    for name, value in keywords.items():
        if name in own:
            continue
        keyword = known.get(name)
        if keyword is None:
            raise TypeError(unknown_keyword(method, name, [*own, *known]))
        if keyword.is_neutral(value):
            continue
        if keyword.becomes is None:
            raise ValueError(f"{method}({name}={short(value)}) is not supported: {keyword.instead}")
        ours = keyword.convert(value) if keyword.convert else value
        if read.get(keyword.becomes) is not None and not _same(read[keyword.becomes], ours):
            raise ValueError(
                f"{method}() got {name}={short(value)} and {keyword.becomes}={short(read[keyword.becomes])}, which mean the "
                f"same: give {keyword.becomes}"
            )
        read[keyword.becomes] = ours
    return read


def unknown_keyword(method: str, name: str, names: Collection[str]) -> str:
    """The message for an unknown keyword, with the nearest name if there is one."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"{method}() has no keyword {short(name)}" + (f": did you mean {near[0]!r}?" if near else "")


def _same(one: Any, other: Any) -> bool:
    """Whether two values of one keyword agree; tensors (of any library) by shape and values."""
    if one is other:
        return True
    if hasattr(one, "shape") and hasattr(other, "shape"):
        alike = tuple(one.shape) == tuple(other.shape) and getattr(one, "device", None) == getattr(other, "device", None)
        return alike and bool((one == other).all())
    return not hasattr(one, "shape") and not hasattr(other, "shape") and bool(one == other)


def short(value: object) -> str:
    """repr of a value from outside, shortened for a message; of a tensor or array its shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {list(value.shape)} {value.dtype}"  # pyright: ignore[reportAttributeAccessIssue]
    text = safe_repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def safe_repr(value: object) -> str:
    """repr, also of integers of more digits than Python prints and of lists nested too deeply for it."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    try:
        return repr(value)
    except (RecursionError, ValueError):
        return f"<{type(value).__name__}>"
