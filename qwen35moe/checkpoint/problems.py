"""Everything that is wrong with a checkpoint, in one error.

Problems are collected while headers are read and names are matched, and raised together before any memory is taken.
The report folds what differs only in a layer or an expert into one row:

    missing     layers.{0-2,4-6}.linear_attn.A_log   (6 tensors)
    wrong shape layers.{0-39}.mlp.gate.weight        on disk [128, 2048], the model has [256, 2048]   (40 tensors)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_ROWS = 20
_STAR = "\0"  # stands for a number in a folded name
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Problem:
    """`kind` says what is wrong ("missing", "wrong shape", ...), `subject` with which tensor or file, `detail` how."""

    kind: str
    subject: str
    detail: str = ""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. `problems` lists all that was found; the message folds it into rows."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        self.problems = tuple(problems)
        rows = fold(self.problems)
        shown = [f"  {row}" for row in rows[:MAX_ROWS]]
        if len(rows) > MAX_ROWS:
            shown.append(f"  ... and {len(rows) - MAX_ROWS} more rows of this kind (all of them are in error.problems)")
        super().__init__("\n".join([message, *shown]))


def fold(problems: Iterable[Problem]) -> list[str]:
    """One row for all problems that differ only in numbers between dots (layers, experts); the first ones first."""
    groups: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
    for problem in problems:
        pattern = _NUMBER.sub(_STAR, problem.subject.replace(_STAR, "?"))
        numbers = tuple(int(number) for number in _NUMBER.findall(problem.subject))
        groups.setdefault((problem.kind, pattern, problem.detail), []).append(numbers)
    return [_row(*key, numbers) for key, numbers in groups.items()]


def _row(kind: str, pattern: str, detail: str, numbers: list[tuple[int, ...]]) -> str:
    first, *others = pattern.split(_STAR)
    filled = (ranges(values) if len(set(values)) > 1 else str(values[0]) for values in zip(*numbers, strict=True))
    subject = shown(first + "".join(number + other for number, other in zip(filled, others, strict=True)))
    row = f"{kind}: {subject}" + (f": {detail}" if detail else "")
    return row if len(numbers) == 1 else f"{row} ({len(numbers)} tensors)"


def nearest(names: Iterable[str], right: Iterable[str], most: int = MAX_ROWS) -> dict[str, str]:
    """For each of `names` the one of `right` that it was probably meant to be, where there is one that is close.

    Compared and told as patterns, N for layer and expert numbers, and only the first few patterns of either: the names may
    be hundreds of thousands, or very long.
    """
    candidates: dict[str, None] = {}
    for name in right:
        candidates[_NUMBER.sub("N", name[:300])] = None
        if len(candidates) == 10 * most:
            break
    found: dict[str, str | None] = {}
    answers: dict[str, str] = {}
    for name in names:
        pattern = _NUMBER.sub("N", name[:300])
        if pattern not in found:
            if len(found) == most:
                continue
            close = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.75)
            found[pattern] = close[0] if close else None
        if (best := found[pattern]) is not None:
            answers[name] = best
    return answers


def ranges(values: Iterable[int], longest: int = 8) -> str:
    """{0-2,4-6} for 0, 1, 2, 4, 5, 6; after `longest` runs the rest is left to the imagination: {0,2,4,...,98}."""
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
    """A name from a file, made safe to print: what is not printable escaped, what is long cut in the middle."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"
