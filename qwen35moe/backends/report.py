"""`describe`: every implementation of every operation, and whether and why it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import measured
from .operation import OPERATIONS, choice_of, find_operation
from .registry import implementations


def describe(operation: str | None = None, *args: Any, caller: Any = None, **kwargs: Any) -> str:
    """Every implementation of an operation, or of all, in order of preference, and whether and why it is used.

    With an operation's arguments: for these arguments. Without: according to the calls of the process so far.
    """
    lines = []
    for name in OPERATIONS if operation is None else (find_operation(operation).name,):
        lines.append(name)
        status = _for_process if not args and not kwargs else _for_arguments
        lines += [f"    {entry:<12}  {text}" for entry, text in status(name, args, kwargs, caller)] or ["    none yet"]
        lines += [f"    measured: {kind}: {result}" for kind, result in measured.MEASURED.get(name, {}).items()]
    return "\n".join(lines)


def _for_arguments(operation: str, args: tuple, kwargs: dict[str, Any], caller: Any) -> Iterator[tuple[str, str]]:
    choice = choice_of(operation, caller)
    entries = implementations(operation)
    reasons = {entry.name: entry.refusal(args, kwargs, caller) for entry in entries}
    supported = [entry for entry in entries if reasons[entry.name] is None]
    fastest = (entry for entry in supported if entry.passed_over(args, kwargs) is None)
    first = next(fastest, supported[0] if supported else None)
    chosen = choice or (first.name if first else None)
    for entry in entries:
        if reason := reasons[entry.name]:
            yield entry.name, f"cannot run these arguments: {reason}" + (" (and is chosen)" if entry.name == chosen else "")
        elif entry.name == chosen:
            yield entry.name, "runs these arguments"
        else:
            slower = entry.passed_over(args, kwargs)
            yield entry.name, "could run these arguments" + (f", more slowly: {slower}" if slower else "")


def _for_process(operation: str, args: tuple, kwargs: dict[str, Any], caller: Any) -> Iterator[tuple[str, str]]:
    entries = implementations(operation)
    choice = choice_of(operation)
    op = find_operation(operation)
    unconditional = next((entry for entry in entries if not entry.conditional), None)
    for entry in entries:
        if entry.missing:
            yield entry.name, f"not on this machine: {entry.missing}"
        elif choice is not None:
            yield entry.name, "chosen by backends.use" if entry.name == choice else f"passed over: {choice} is chosen"
        elif entry is op.last:
            yield entry.name, "ran in the last call"
        elif reason := op.reasons.get(entry.name):
            yield entry.name, f"{'passed over' if entry.slower else 'refused'}: {reason}"
        elif unconditional is not None and entries.index(entry) > entries.index(unconditional):
            yield entry.name, f"only when chosen: {unconditional.name} comes first and runs anything"
        else:
            yield entry.name, "not needed yet" if entry.conditional else "runs anything"
