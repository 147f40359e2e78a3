"""All problems of a checkpoint in one error.

Problems are collected while headers are read and names are matched, and raised together before memory is allocated.
Problems that differ only in a layer or an expert become one row of the message:

    missing     layers.{0-2,4-6}.linear_attn.A_log   (6 tensors)
    wrong shape layers.{0-39}.mlp.gate.weight        on disk [128, 2048], the model has [256, 2048]   (40 tensors)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ROWS = 20
MAX_MESSAGE = 1900  # characters
_STAR = "\0"  # stands for a number in a folded name
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Problem:
    """kind: "missing", "wrong shape", ...; subject: the tensor or file; detail: both values, or what to do."""

    kind: str
    subject: str
    detail: str = ""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. `problems` lists all problems; the message folds them into rows."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        self.problems = tuple(problems)
        rows = _rows(self.problems)
        chosen = _chosen(rows, MAX_MESSAGE - len(message))
        lines = [f"  {rows[number][1]}" for number in sorted(chosen)]
        if len(rows) > len(chosen):
            lines.append(f"  ... and {len(rows) - len(chosen)} more rows (error.problems has all problems)")
        super().__init__("\n".join([message, *lines]))


def _chosen(rows: Sequence[tuple[str, str]], room: int) -> list[int]:
    """The numbers of the rows that are shown: of each kind of problem in turn, so that no kind hides another."""
    waiting: dict[str, list[int]] = {}
    for number, (kind, _) in enumerate(rows):
        waiting.setdefault(kind, []).append(number)
    chosen: list[int] = []
    for turn in range(MAX_ROWS):
        for numbers in waiting.values():
            if turn >= len(numbers) or len(chosen) == MAX_ROWS:
                continue
            room -= len(rows[numbers[turn]][1]) + 3
            if room < 0 and chosen:
                return chosen
            chosen.append(numbers[turn])
    return chosen


def fold(problems: Iterable[Problem]) -> list[str]:
    """One row for all problems that differ only in numbers between dots (layers, experts), in the order of the first."""
    return [row for _, row in _rows(problems)]


def _rows(problems: Iterable[Problem]) -> list[tuple[str, str]]:
    """(kind, row)."""
    groups: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
    for problem in problems:
        pattern = _NUMBER.sub(_STAR, problem.subject.replace(_STAR, "?"))
        numbers = tuple(int(number) for number in _NUMBER.findall(problem.subject))
        groups.setdefault((problem.kind, pattern, problem.detail), []).append(numbers)
    return [(key[0], _row(*key, numbers)) for key, numbers in groups.items()]


def _row(kind: str, pattern: str, detail: str, numbers: list[tuple[int, ...]]) -> str:
    first, *others = pattern.split(_STAR)
    filled = (ranges(values) if len(set(values)) > 1 else str(values[0]) for values in zip(*numbers, strict=True))
    subject = shown(first + "".join(number + other for number, other in zip(filled, others, strict=True)))
    row = f"{kind}: {subject}" + (f": {detail}" if detail else "")
    return row if len(numbers) == 1 else f"{row} ({len(numbers)} tensors)"


def pattern_of(name: str) -> str:
    """model.layers.*.extra.weight for model.layers.3.extra.weight: what `ignore=` takes; the first part for a short name."""
    pattern = _NUMBER.sub("*", name)
    return pattern if pattern.count(".") > 2 else f"{pattern.partition('.')[0]}.*" if "." in pattern else pattern


def nearest(names: Iterable[str], valid: Iterable[str], most: int = MAX_ROWS) -> dict[str, str]:
    """For each of `names` the most similar one of `valid`, if any is similar.

    Compared and returned as patterns, N for layer and expert numbers, and only the first few patterns of either: there may
    be hundreds of thousands of names, and very long ones.
    """
    candidates: dict[str, None] = {}
    for name in valid:
        candidates[_NUMBER.sub("N", name[:300])] = None
        if len(candidates) == 10 * most:
            break
    closest: dict[str, str | None] = {}  # by pattern
    by_name: dict[str, str] = {}
    for name in names:
        pattern = _NUMBER.sub("N", name[:300])
        if pattern not in closest:
            if len(closest) == most:
                continue
            matches = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.75)
            closest[pattern] = matches[0] if matches else None
        if (best := closest[pattern]) is not None:
            by_name[name] = best
    return by_name


def ranges(values: Iterable[int], longest: int = 8) -> str:
    """{0-2,4-6} for 0, 1, 2, 4, 5, 6; more than `longest` runs are abbreviated: {0,2,4,...,98}."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(shown) > longest:
        shown = [*shown[: longest - 1], "...", shown[-1]]
    return "{" + ",".join(shown) + "}"


def shown(text: str, longest: int = 200) -> str:
    """A name from a file, safe to print: unprintable characters are escaped, long names are cut in the middle."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """ValueError if the argument `name` has a value that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
