"""The time plan: steps, in order, with their limits. A step's function is named, and imported in the step's process."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.rows import matches

MINUTES = 9.0  # for which the limits are set
RESERVE = 8.0  # seconds kept for the table
SLOW = 120.0  # of a step in the small form, which takes seconds: a busy machine must not end it
HERE = "benchmarks.gpu"
PARTS = ("bf16", "fp32")


@dataclass(frozen=True)
class Step:
    """limit: seconds on a GPU; small: on a CPU. Steps of one group run side by side, since they are not timed.

    check: an answer depends on it, so that a step that is cut leaves the run unverified. `also`: beginnings of the ids of its
    rows beside its own id.
    """

    id: str
    function: str  # module:name, called with (Rows, Work, **options)
    limit: float
    small: float
    title: str
    check: bool = False
    group: str = ""
    also: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""  # of the ids of its rows
    part: str = ""  # of a check that two steps share
    fresh: bool = False  # in a process that is not forked: packages were installed, or are chosen by its environment

    @property
    def name(self) -> str:
        """In rows and of the log."""
        return f"{self.id}{':' if self.part else ''}{self.part}{self.suffix}"

    def wanted(self, only: str | None) -> bool:
        """Whether `--only` names the step, one of its rows, or a group of steps."""
        if only is None:
            return True
        bare = only.removesuffix(self.suffix) if self.suffix else only
        return any(matches(id, bare) or matches(bare, id) for id in (self.id, *self.also))

    def seconds(self, small: bool, minutes: float) -> float:
        """The limit; longer runs have longer limits."""
        return self.small if small else self.limit * max(1.0, minutes / MINUTES)

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


def check(operation: str, limit: float = 60.0, suffix: str = "", part: str = "", **fields: Any) -> Step:
    """The step that compares the implementations of an operation with its definition. part: the one dtype of the step."""
    title = " ".join(filter(None, (f"implementations of {operation} against its definition", part, suffix)))
    return Step(f"check/{operation}", f"{HERE}.checks:run", limit, SLOW, title, check=True, group="checks", suffix=suffix,
                part=part, options={"operation": operation, "dtypes": (part,) if part else PARTS}, **fields)  # fmt: skip


def steps(operations: Sequence[str]) -> list[Step]:
    """All steps. operations: those of the backends' table."""
    slow = [name for name in ("gated_delta_rule", "experts") if name in operations]  # many kernels to compile
    long = [check(name, 110, part=part) for name in slow for part in PARTS]  # they start first
    return [
        Step("environment", f"{HERE}.environment:run", 30, SLOW, "GPU, driver, versions, measured bandwidth and product rate"),
        Step("wheels", f"{HERE}.environment:build", 110, SLOW, "causal-conv1d from its sdist, if --wheels holds it",
             group="checks"),
        *long,
        Step("model", f"{HERE}.model:run", 110, SLOW, "4 layers of the 35B's shape against the CPU in float64 and transformers",
             check=True, group="checks"),
        *(check(name) for name in operations if name not in slow),
        Step("warm", f"{HERE}.suite:warm", 60, SLOW, "compiles the small sizes of memcheck", group="checks"),
        Step("suite", f"{HERE}.suite:tests", 60, SLOW, "the suite's tests that need a GPU", check=True),
        Step("delta", f"{HERE}.speed:delta", 50, SLOW, "delta rule at 32,768 tokens, beside fla"),
        Step("moe", f"{HERE}.speed:moe", 60, SLOW, "experts 256x8 at 1 to 32,768 tokens, beside grouped_mm"),
        Step("decode", f"{HERE}.decode:decode", 75, SLOW, "one token of the 35B's shape, eager and captured"),
        Step("prefill", f"{HERE}.decode:prefill", 40, SLOW, "prompts of 8,192 and 32,768 tokens"),
        Step("loading", f"{HERE}.decode:loading", 40, SLOW, "a checkpoint from the page cache to the device"),
        Step("memcheck", f"{HERE}.suite:memcheck", 45, SLOW, "compute-sanitizer on small sizes", check=True),
    ]  # fmt: skip


def listing(plan: Sequence[Step], small: bool, minutes: float) -> str:
    """The plan as a table, for --list."""
    lines = [f"{'id':<28} {'limit':>6}  work"]
    for step in plan:
        beside = " (several at once)" if step.group else ""
        lines.append(f"{step.name:<28} {step.seconds(small, minutes):5.0f}s  {step.title}{beside}")
    lines.append(f"together at most {minutes:g} minutes; a step that ends early leaves its time to the next ones")
    return "\n".join(lines)


def most(plan: Sequence[Step], minutes: float = MINUTES) -> float:
    """Seconds of the whole plan on a GPU, where the steps of a group run side by side."""
    total, group = 0.0, 0.0
    for number, step in enumerate(plan):
        group = max(group, step.seconds(False, minutes))
        if not step.group or number + 1 == len(plan) or plan[number + 1].group != step.group:
            total, group = total + group, 0.0
    return total
