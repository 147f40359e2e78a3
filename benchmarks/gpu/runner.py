"""Runs the steps of a plan, each in a process that is ended at its limit, and prints rows as they arrive."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import rows
from benchmarks.gpu.plan import RESERVE, Step
from benchmarks.gpu.rows import CUT, FAILED, NOT_RUN, UNRUN, WRONG, Row, Rows

SPOILT = 70  # exit status of a step whose CUDA context is lost
STARTS = 3  # of a step that crashes: it goes on behind the row that ended it
# Imported once, before the processes of the steps are forked. None of them uses CUDA on import.
PRELOAD = ["torch", "torch.profiler", "qwen35moe", "qwen35moe.ops", "benchmarks.gpu.checks", "benchmarks.gpu.speed"]


@dataclass
class Running:
    step: Step
    process: Any
    deadline: float
    limit: float
    starts: int = 1


@dataclass
class Runner:
    """out: the folder of rows.jsonl and logs/. context: of multiprocessing. workers: steps of one group at once."""

    out: Path
    small: bool
    minutes: float = 9.0
    only: str | None = None
    workers: int = 1
    context: Any = None
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    started: float = field(default_factory=time.time)
    options: dict[str, Any] = field(default_factory=dict)  # of every step's Work
    running: list[Running] = field(default_factory=list)
    first: int = 0  # records of an earlier run
    printed: int = 0

    def __post_init__(self) -> None:
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.path = self.out / "rows.jsonl"
        self.first = self.printed = len(rows.read(self.path))
        if self.context is None:
            self.context = context(self.small)

    @property
    def left(self) -> float:
        """Seconds until the table must be printed."""
        return self.started + 60 * self.minutes - RESERVE - time.time()

    def records(self) -> list[Row]:
        """Those of this run: a run of `--only` adds to the file of another."""
        return rows.read(self.path)[self.first :]

    def rows(self) -> list[Row]:
        return rows.latest(self.records())

    def run(self, plan: Sequence[Step]) -> None:
        """All steps that `only` selects, in order; those of one group side by side."""
        waiting = [step for step in plan if step.wanted(self.only)]
        try:
            while waiting or self.running:
                while waiting and self._room(waiting[0]):
                    self._start(waiting.pop(0))
                self._look()
                time.sleep(0.05)
        finally:
            for one in self.running:
                self._kill(one)
            self._print()

    def _room(self, step: Step) -> bool:
        group = self.running[0].step.group if self.running else step.group
        return not self.running or (bool(group) and step.group == group and len(self.running) < self.workers)

    def _writer(self, step: Step) -> Rows:
        return Rows(self.path, step.name, started=self.started)

    def _start(self, step: Step, starts: int = 1, limit: float | None = None) -> None:
        limit = step.seconds(self.small, self.minutes) if limit is None else limit
        if self.left < min(5.0, limit):
            verdict = CUT if step.check else NOT_RUN
            self._writer(step).write(step.name, verdict, note=f"no time was left of {self.minutes:g} minutes")
            return
        limit = min(limit, self.left)
        done = [row["id"] for row in self.rows() if row["step"] == step.name] if starts > 1 else []
        only = self.only.removesuffix(step.suffix) if self.only and step.suffix else self.only
        job = {"only": only, "suffix": step.suffix, "skip": done, "started": self.started, "small": self.small,
               "limit": limit, "options": self.options}  # fmt: skip
        process = self._context(step).Process(target=child, args=(step, str(self.path), job), daemon=False)
        process.start()
        self.running.append(Running(step, process, time.time() + limit, limit, starts))

    def _context(self, step: Step) -> Any:
        return multiprocessing.get_context("spawn") if step.fresh else self.context

    def _look(self) -> None:
        """End the steps over their limit, and take note of those that ended."""
        self._print()
        for one in list(self.running):
            code = one.process.exitcode
            if code is None and time.time() > one.deadline:
                self._kill(one)
                self.running.remove(one)
                note = f"the step was ended at its limit of {one.limit:.0f} s"
                self._writer(one.step).write(self._begun(one.step), CUT, note=note, log=self._log(one.step))
            elif code is not None:
                self.running.remove(one)
                if code:
                    self._crashed(one, code)

    def _begun(self, step: Step) -> str:
        return rows.unfinished(self.records(), step.name) or step.name

    def _log(self, step: Step) -> str:
        """The last lines that the step printed."""
        log = log_of(self.path, step)
        return "\n".join(log.read_text(errors="replace").splitlines()[-6:]) if log.exists() else ""

    def _crashed(self, one: Running, code: int) -> None:
        """A row for the crash, unless the step has written it; then the rest of the step in a new process."""
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        name = one.step.name
        begun = rows.unfinished(self.records(), name)
        own = [row for row in self.rows() if row["step"] == name]
        reported = begun is None and code == SPOILT and bool(own) and own[-1]["verdict"] == FAILED
        if not reported:
            note = f"the process ended with {how}"
            self._writer(one.step).write(begun or name, FAILED, note=note, log=self._log(one.step))
        remaining = one.deadline - time.time()
        if (begun or reported) and one.starts < STARTS and remaining > 3:
            self._start(one.step, one.starts + 1, remaining)

    @staticmethod
    def _kill(one: Running) -> None:
        """End the step's process group: it may have started processes of its own."""
        for target in (os.killpg, os.kill):
            try:
                target(one.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        one.process.join(5)  # a process inside a driver call may not end; the run goes on

    def _print(self) -> None:
        records = rows.read(self.path)
        for record in records[self.printed :]:
            if "id" in record:
                self.say(line(record))
        self.printed = len(records)


def context(small: bool) -> Any:
    """A fork server that has imported what every step needs; new processes where torch counts GPUs without NVML, by the CUDA
    runtime: what a process that has used CUDA forks cannot use it."""
    if not small and torch.cuda._device_count_nvml() <= 0:
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def line(row: Row) -> str:
    """A row for the terminal."""
    value = "" if row["measured"] is None else number(row["measured"]) + (f" {row['unit']}" if row["unit"] else "")
    target = f" (target {row['target']})" if row["target"] else ""
    note = f"  {row['note']}" if row.get("note") else ""
    return f"[{row['seconds']:5.0f}s] {row['verdict']:<8} {row['id']:<52} {value}{target}{note}"


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def log_of(path: Path, step: Step) -> Path:
    return path.parent / "logs" / f"{step.name.replace('/', '.')}.log"


def child(step: Step, path: str, job: dict[str, Any]) -> None:
    """The process of a step: a group of its own, its output in a log, its rows in the file."""
    os.setsid()
    end_with_parent()
    log = os.open(log_of(Path(path), step), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(step.environment)
    named = {name: job[name] for name in ("started", "only", "skip")}
    writer = Rows(Path(path), step.name, suffix=step.suffix, **named)
    try:
        from benchmarks.gpu.work import Work

        work = Work(small=job["small"], limit=job["limit"], out=Path(path).parent, **job["options"])
        step.load()(writer, work, **step.options)
    except Exception as error:
        traceback.print_exc()
        if not rows.is_sticky(str(error)):
            writer.write(step.id, FAILED, note=rows.said(error))
            os._exit(0)  # it has its row, and would fail again
        os._exit(SPOILT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def end_with_parent() -> None:
    """On Linux: a step ends where the process that forked it does, so that a killed run leaves none behind."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL))


def status(results: Sequence[Row], plan: Sequence[Step]) -> int:
    """1 if a result is wrong, something failed, or a check was cut; missed speeds are no error."""
    checks = {step.name for step in plan if step.check}
    bad = any(row["verdict"] in (WRONG, UNRUN, FAILED) for row in results)
    return int(bad or any(row["verdict"] == CUT and row["step"] in checks for row in results) or not results)
