"""Rows: one result each, appended to a file of JSON lines and flushed to disk, so that a run that is cut keeps them.

A line of the file is a row, or a mark: {"begin": id} before the work for a row starts, {"launched": [...]} after kernels ran.
Verdicts:

    right, wrong          an answer beside its bound
    met, missed           a speed beside its target
    measured              a number without a target on this device
    not run               something optional is missing, or no time was left; the row has the reason
    failed, cut           it raised or crashed; its step exceeded its time limit
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RIGHT, WRONG, MET, MISSED, MEASURED = "right", "wrong", "met", "missed", "measured"
NOT_RUN, FAILED, CUT = "not run", "failed", "cut"
UNRUN = "unrun"  # no case of a step ran an implementation; wrong unless a step of another dtype did
# What a CUDA context does not survive: every later call in the process fails as well.
STICKY = ("CUDA error", "CUDA_ERROR", "Triton Error [CUDA]", "illegal memory access", "device-side assert", "launch failure",
          "CUBLAS_STATUS_EXECUTION_FAILED")  # fmt: skip
Row = dict[str, Any]


def matches(id: str, only: str | None) -> bool:
    """Whether `--only` names the row or one of its beginnings (whole words between slashes)."""
    return only is None or id == only or id.startswith(f"{only}/")


class Rows:
    """Appends rows of one step. skip: ids that have a row already, of a step that starts again after a crash."""

    def __init__(
        self, path: Path, step: str = "", *, started: float | None = None, only: str | None = None, suffix: str = "",
        skip: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.path, self.step, self.only, self.suffix, self.skip = path, step, only, suffix, frozenset(skip)
        self.started = time.time() if started is None else started

    def selects(self, id: str) -> bool:
        """Whether the row is to be measured."""
        return matches(id, self.only) and id + self.suffix not in self.skip

    def selects_any(self, prefix: str) -> bool:
        """Whether a row whose id begins with `prefix` may be measured."""
        return matches(prefix, self.only) or (self.only or "").startswith(f"{prefix}/")

    def write(self, id: str, verdict: str, measured: Any = None, unit: str = "", target: str = "", **facts: Any) -> Row:
        """Append a row. facts: more of it, for the report; `note` is printed, `top` is a profile."""
        row = {"step": self.step, "id": id + self.suffix, "verdict": verdict, "measured": measured, "unit": unit,
               "target": target, "seconds": round(time.time() - self.started, 1), **facts}  # fmt: skip
        self.append(row)
        return row

    def measure(self, id: str, function: Callable[[], Mapping[str, Any] | None]) -> Row | None:
        """The row that `function` returns (arguments of `write`), or a failed one; an error that spoils the CUDA context
        passes on, after its row was written."""
        if not self.selects(id):
            return None
        self.append({"begin": id + self.suffix, "step": self.step})
        try:
            fields = function()
        except Exception as error:
            traceback.print_exc()
            row = self.write(id, FAILED, note=said(error))
            if is_sticky(str(error)):
                raise
            return row
        return None if fields is None else self.write(id, **fields)

    def append(self, record: Mapping[str, Any]) -> None:
        """One line in one write, flushed to disk."""
        line = (json.dumps(record, default=str) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_sticky(message: str) -> bool:
    return any(words in message for words in STICKY)


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def judged(measured: float, unit: str, target: float | None, *, most: bool = False, note: str = "", **facts: Any) -> Row:
    """Fields of a speed: met or missed. most: the target is an upper bound."""
    if target is None:
        return {"verdict": MEASURED, "measured": measured, "unit": unit, "note": note, **facts}
    met = measured <= target if most else measured >= target
    return {"verdict": MET if met else MISSED, "measured": measured, "unit": unit,
            "target": f"{'<=' if most else '>='} {target:.4g}", "note": note, **facts}  # fmt: skip


def bounded(error: float, bound: float, **facts: Any) -> Row:
    """Fields of an error beside its bound; NaN is wrong."""
    return {"verdict": RIGHT if error <= bound else WRONG, "measured": error, "unit": "error", "target": f"<= {bound:.2g}",
            **facts}  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a last line that was cut in the middle is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def latest(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows, in order; a row that was measured again replaces the one before."""
    rows: dict[str, Row] = {}
    for record in records:
        if "id" in record:
            rows[record["id"]] = dict(record)
    return list(rows.values())


def unfinished(records: Iterable[Mapping[str, Any]], step: str) -> str | None:
    """The id of the row that a step had begun and not written."""
    begun = None
    for record in records:
        if record.get("step") == step:
            begun = record["begin"] if "begin" in record else None if record.get("id") == begun else begun
    return begun
