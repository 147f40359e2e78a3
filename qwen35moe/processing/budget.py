"""A budget of work for a chat template: a program from a checkpoint must not take all time or memory.

One unit stands for about 64 bytes or 0.1 microseconds: an element of a list, 16 characters, a node of the program that
runs. Every loop iteration, macro call, filter, test, operator, method call and output is charged before it allocates.
"""

from __future__ import annotations

import re
import string
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

BASE = 2_000_000  # units for any input
PER_ITEM, PER_CHARACTER = 4_096, 8  # further units for each value and each character of the messages, tools, ...
CHARACTERS = 16  # a unit
MAX_BITS = 4_096  # of an integer
MAX_WIDTH = 10_000  # of a padded field in a format string


class BudgetError(Exception):
    """A template needs more work than its budget."""


class Budget:
    """Units left for a rendering, and the message that the template's loop is at."""

    def __init__(self, messages: list[Any] | None = None, values: Any = None) -> None:
        self.left = BASE
        if messages is not None or values is not None:
            items, characters = _extent([messages or [], values or {}])
            self.left += PER_ITEM * items + PER_CHARACTER * characters
        self.allowed = self.left
        self.turns = {id(message): number for number, message in enumerate(messages or [])}
        self.turn: int | None = None

    def charge(self, units: int) -> None:
        """BudgetError if fewer units are left."""
        self.left -= units
        if self.left < 0:
            raise BudgetError(f"it takes too much time or memory: more than {self.allowed:,} units for these messages")

    def text(self, length: int) -> None:
        """Charge for characters."""
        self.charge(length // CHARACTERS + 1)

    def shallow(self, value: Any) -> None:
        """Charge for going once over a value."""
        if isinstance(value, (str, bytes)):
            self.text(len(value))
        else:
            self.charge(1 + size(value))

    def deep(self, value: Any) -> None:
        """Charge for printing or comparing a value, with everything inside it as often as it occurs there."""
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, (str, bytes)):
                self.text(len(value))
                continue
            self.charge(1)
            if type(value).__name__ == "Namespace":  # jinja2's namespace(), which prints its attributes
                value = object.__getattribute__(value, "_Namespace__attrs")
            if isinstance(value, Mapping):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple, ItemsView, KeysView, ValuesView)):
                stack += value


_CURRENT: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def current() -> Budget:
    """The budget of the rendering that runs. While a template is compiled: a fresh one for each operation."""
    return _CURRENT.get() or Budget()


def enter(budget: Budget) -> Any:
    """Makes a budget the current one; returns what `leave` needs."""
    return _CURRENT.set(budget)


def leave(token: Any) -> None:
    _CURRENT.reset(token)


def size(value: Any) -> int:
    """The number of elements of a value, 0 for one that has none."""
    try:
        return len(value)
    except (TypeError, AttributeError):
        return 0


def counted(values: Iterator[Any]) -> Iterator[Any]:
    """An iterator whose steps are charged."""
    budget = current()
    for value in values:
        budget.charge(1)
        yield value


def _extent(value: Any) -> tuple[int, int]:
    """(values, characters) in plain data."""
    items, characters, stack = 0, 0, [value]
    while stack:
        value = stack.pop()
        items += 1
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value
    return items, characters


# ------------------------------------------------------------------------------------------------------------- operators


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Charge for a binary operator before it runs."""
    budget = current()
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        budget.charge(1)
        if isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), 1) * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise BudgetError(f"{operator} on integers that give more than {MAX_BITS} bits")
    elif operator == "*":
        sequence, count = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(count, int) and count > 0:
            length = size(sequence) * count
            budget.charge(1 + (length // CHARACTERS if isinstance(sequence, (str, bytes)) else length))
    elif operator == "%" and isinstance(left, (str, bytes)):
        check_percent(left, right)
    else:
        budget.shallow(left)
        budget.shallow(right)


def check_percent(text: Any, values: Any) -> None:
    """Charge for `text % values`. BudgetError for a wide field."""
    fields = re.findall(r"%(?:\([^()]*\))?[^a-zA-Z%(]*\(?", "" if isinstance(text, bytes) else text)
    if isinstance(text, bytes) or _wide(fields) or any("*" in form or form.endswith("(") for form in fields):
        raise BudgetError(f"a format string with fields wider than {MAX_WIDTH} or with a width from a variable")
    current().text(len(text))
    for _ in range(text.count("%")):
        current().deep(values)


def check_format(text: str, args: Any, kwargs: Any) -> None:
    """Charge for text.format(*args, **kwargs). BudgetError for a wide field or one whose format is a variable."""
    budget = current()
    budget.text(len(text))
    for _, field, form, _ in string.Formatter().parse(text):
        if form and ("{" in form or _wide([form])):
            raise BudgetError(f"a format string with fields wider than {MAX_WIDTH} or with a width from a variable")
        if field is not None:
            budget.deep([list(args), dict(kwargs)])


def _wide(forms: list[str]) -> bool:
    return any(int(number[:9]) > MAX_WIDTH for form in forms for number in re.findall(r"\d+", form))


# --------------------------------------------------------------------------------------------------------------- methods

_PADDING = ("center", "ljust", "rjust", "zfill")


def check_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Charge for a method of a str, list, dict, ... before it runs. Returns its arguments."""
    budget, owner, name = current(), getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, (int, float)) and name not in ("bit_length", "is_integer", "conjugate", "hex"):
        raise BudgetError(f"the method {name} of a number")
    if isinstance(owner, bytes) and name != "decode":
        raise BudgetError(f"the method {name} of bytes")
    budget.charge(1 + len(args) + len(kwargs))
    if isinstance(owner, str):
        return _check_text_method(owner, name, args, kwargs)
    if isinstance(owner, (list, tuple)):
        budget.deep(owner)
        budget.deep(list(args))
    return args


def _check_text_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    budget = current()
    budget.text(len(text))
    if name == "translate":
        raise BudgetError("the method translate of a str")
    if name in _PADDING:
        budget.text(max([0, *(value for value in args if isinstance(value, int))]))
    elif name == "expandtabs":
        budget.text(text.count("\t") * max([8, *(value for value in (*args, *kwargs.values()) if isinstance(value, int))]))
    elif name == "replace" and len(args) > 1:
        check_replace(text, args[0], args[1])
    elif name == "join" and args:
        return (check_join(text, args[0]), *args[1:])
    elif name in ("split", "rsplit"):
        separator = args[0] if args else kwargs.get("sep")
        budget.charge(text.count(separator) if isinstance(separator, str) and separator else len(text) // 2)
    elif name == "splitlines":
        budget.charge(len(text) // 2)
    for value in args:
        budget.shallow(value)
    return args


def check_replace(text: str, old: Any, new: Any) -> None:
    """Charge for text.replace(old, new)."""
    if isinstance(old, str) and isinstance(new, str):
        current().text(2 * len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def check_join(separator: str, values: Any) -> list[Any]:
    """Charge for separator.join(values); returns the values as a list."""
    values = values if isinstance(values, (list, tuple)) else list(counted(iter(values)))
    budget = current()
    budget.deep(values)
    budget.text(len(separator) * len(values))
    return list(values)
