"""The record of the calls inside a `with backends.ran() as ran:` block, and the log."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .operation import Implementation, Operation, PassedOver

log = logging.getLogger("qwen35moe.backends")

RECORDING: list[Ran] = []  # the open blocks of the process
_logged: set[str | tuple[str, str]] = set()  # operations, and (operation, refused implementation)


class Call(NamedTuple):
    """One call. name: the implementation; path: of the calling module; shapes: of the tensor arguments, in order."""

    operation: str
    name: str
    path: str
    shapes: tuple[tuple[int, ...], ...]


class Ran:
    """The calls inside the block: `.calls` in order, `.counts[operation, implementation]`. Prints as a table.

    Recomputations of gradient checkpointing are included. Compiled code is not recorded.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __enter__(self) -> Ran:
        RECORDING.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        RECORDING[:] = [other for other in RECORDING if other is not self]

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return Counter((call.operation, call.name) for call in self.calls)

    def __str__(self) -> str:
        rows = [("operation", "ran", "calls", "where", "shapes")]
        for (operation, name), count in self.counts.items():
            calls = [call for call in self.calls if (call.operation, call.name) == (operation, name)]
            shapes = list(dict.fromkeys(call.shapes for call in calls))
            first = " ".join(str(list(shape)) for shape in shapes[0])
            more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
            rows.append((operation, name, str(count), joined_paths(call.path for call in calls), first + more))
        return columns(rows) if self.calls else "nothing ran"

    __repr__ = __str__


def note(
    op: Operation[..., Any], entry: Implementation, refused: PassedOver, args: tuple, kwargs: Mapping[str, Any], caller: Any
) -> None:
    """Record the call, store its reasons for `describe`, and log each operation and each refused fast path once."""
    op.last, op.refused = entry, refused
    if RECORDING:
        path = "" if caller is None else caller.__dict__.get("path") or ""
        shapes = tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        call = Call(op.name, entry.name, path, shapes)
        for recording in tuple(RECORDING):
            recording.calls.append(call)
    op.reasons.update((other.name, reason) for other, reason, _ in refused)
    unlogged = [
        other for other, _, supported in refused
        if not supported and not other.builtin and (op.name, other.name) not in _logged
    ]
    if not unlogged and op.name in _logged:
        return
    _logged.add(op.name)
    _logged.update((op.name, other.name) for other in unlogged)
    reasons = "; ".join(
        f"{other.name} was {'passed over' if supported else 'refused'}: {reason}"
        for other, reason, supported in op.passed_over(refused, entry)
    )
    level = logging.WARNING if unlogged else logging.INFO
    log.log(level, "%s runs on %r%s", op.name, entry.name, f" ({reasons})" if reasons else "")


def joined_paths(paths: Iterable[str]) -> str:
    """Paths of layers in one string: layers.{0-2,4}.linear_attn."""
    groups: dict[str, list[int]] = {}
    for path in dict.fromkeys(paths):
        number = re.search(r"\d+", path)
        pattern = path if number is None else f"{path[: number.start()]}{{}}{path[number.end() :]}"
        groups.setdefault(pattern, []).extend([] if number is None else [int(number[0])])
    return " ".join(pattern.replace("{}", _ranges(numbers)) if numbers else pattern for pattern, numbers in groups.items())


def _ranges(numbers: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return text if "," not in text and "-" not in text else f"{{{text}}}"


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as left-aligned columns with two spaces between them."""
    rows = list(rows)
    widths: Mapping[int, int] = {i: max(len(row[i]) for row in rows) for i in range(len(rows[0]))}
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)
