"""The measuring itself: contestants in turns, minima and medians, one JSON format, one plot.

    report = Report("norm")
    with report.case("rms_norm/N512/D2048/bf16") as case:
        case.check("ours", rms_norm(x, w), truth, bound=1e-2)      # a wrong answer has no speed
        case.time({"transformers": theirs, "ours": ours}, baseline="transformers")
    report.finish(arguments)

Case ids are stable: `operation/sizes/dtype`. Another run, or another machine, is compared by id.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import environment, header

SCHEMA = 1  # of the JSON file; a change of meaning or of a key raises it, a new key does not
PAGE = 4096


def arguments(description: str | None, *, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; add to it, then `parse_args(argv)`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks NAME",
        description=(description or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of each contestant")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (PNG; needs matplotlib)")
    return parser


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max|a-b| / max|b| in float64; inf where something is not finite."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    error = ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if error == error else float("inf")


def touch(*tensors: Tensor) -> None:
    """Read one byte of every page, so that the first round does not pay for mapping memory."""
    for tensor in tensors:
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE].sum()


def rotating(make: Callable[[], Any], nbytes: int, cache: int = 256 << 20) -> Callable[[], Any]:
    """Copies of some weights that together exceed the processor's cache, handed out in turn.

    One layer timed over and over finds its weights in the cache; in a model they come from memory every time.
    `nbytes` is the size of one copy; returns a function that gives the next copy.
    """
    copies = [make() for _ in range(max(2, -(-cache // max(nbytes, 1)) + 1))]
    turn = -1

    def following() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(copies)
        return copies[turn]

    return following


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contestant."""

    seconds: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Run every contestant once a round, the order turning by one each round, and time each run.

    Runs in turns meet the same disturbances, and turning the order keeps one contestant from always following the same
    other. Garbage is collected between runs, not during them.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _one_run(contestants[name], device)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _one_run(function: Callable[[], object], device: str) -> float:
    gc.collect()
    gc.disable()
    try:
        return _cuda_seconds(function, device) if device.startswith("cuda") else _seconds(function)
    finally:
        gc.enable()


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = function()
    taken = time.perf_counter() - start
    del kept  # freeing the result is not part of the run
    return taken


def _cuda_seconds(function: Callable[[], object], device: str) -> float:
    """Between two events on the device's stream: what the device takes, or the launches where those are slower."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        first.record()
        kept = function()
        last.record()
        torch.cuda.synchronize()
    del kept
    return first.elapsed_time(last) / 1e3


def saved_bytes(function: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `function()`: each storage once, those of `besides` (weights) not."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = function()  # while it lives, so does what it saved, and no address is used twice
    del alive
    return sum(kept.values())


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory that `function()` had allocated at once on a CUDA device, beyond what was there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass
class Case:
    """One measured situation: errors first, then times of the contestants that are right.

    facts: what the id says, as keys, and what else holds for the whole case. figures: of a contestant beside its time
    (bytes, rates). refused: contestants that cannot take part, and why.
    """

    id: str
    device: str = "cpu"
    rounds: int = 9
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    baseline: str | None = None

    def check(self, name: str, found: Tensor, expected: Tensor, *, bound: float) -> None:
        """Compare a contestant's answer with the truth; above the bound it is not timed."""
        self.errors[name] = max(self.errors.get(name, 0.0), relative_error(found, expected))
        if self.errors[name] > bound:
            self.wrong[name] = f"relative error {self.errors[name]:.1e}, bound {bound:.0e}"

    def time(self, contestants: Mapping[str, Callable[[], object]], *, baseline: str, warmup: int = 2) -> None:
        """Time the contestants that are right, in turns; ratios are to `baseline`."""
        right = {name: run for name, run in contestants.items() if name not in self.wrong}
        self.baseline = baseline
        self.timings.update(interleave(right, rounds=self.rounds, warmup=warmup, device=self.device))

    def ratio(self, name: str) -> float | None:
        """Minimum of the contestant over minimum of the baseline: below 1 is faster."""
        if self.baseline not in self.timings or name not in self.timings:
            return None
        return self.timings[name].min / self.timings[self.baseline].min

    def as_dict(self) -> dict[str, Any]:
        contestants = {}
        for name in {**self.errors, **self.wrong, **self.timings}:
            timing = self.timings.get(name)
            contestants[name] = {
                "error": self.errors.get(name),
                "wrong": self.wrong.get(name),
                "min_s": timing and timing.min,
                "median_s": timing and timing.median,
                "runs": len(timing.seconds) if timing else 0,
                "ratio": self.ratio(name),
                **self.figures.get(name, {}),
            }
        known = {"facts": self.facts, "refused": self.refused}
        more = {key: value for key, value in known.items() if value}
        return {"id": self.id, "baseline": self.baseline, **more, "contestants": contestants}

    def lines(self) -> Iterator[str]:
        yield self.id
        for name, row in self.as_dict()["contestants"].items():
            error = "" if row["error"] is None else f"  error {row['error']:.1e}"
            if row["min_s"] is None:
                yield f"  {name:<24} not timed: {row['wrong'] or 'did not run'}"
                continue
            ratio = "" if row["ratio"] is None else f"  {row['ratio']:6.3f}x"
            times = f"min {_readable(row['min_s'])}  median {_readable(row['median_s'])} of {row['runs']}"
            figures = "".join(f"  {key} {value:.4g}" for key, value in self.figures.get(name, {}).items())
            yield f"  {name:<24} {times}{ratio}{error}{figures}"
        for name, reason in self.refused.items():
            yield f"  {name:<24} not run: {reason}"


def _readable(seconds: float) -> str:
    scale, unit = (1.0, "s ") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:8.2f} {unit}"


class Report:
    """The cases of one benchmark, printed as they finish; `finish` writes JSON and plot and gives the exit status."""

    def __init__(self, name: str, *, device: str = "cpu", rounds: int = 9) -> None:
        self.name, self.device, self.rounds = name, device, rounds
        self.cases: list[Case] = []
        self.extra: dict[str, Any] = {}  # further keys of the JSON file
        self.environment = environment()
        print(header(self.environment))

    @contextmanager
    def case(self, id: str) -> Iterator[Case]:
        if any(case.id == id for case in self.cases):
            raise ValueError(f"two cases have the id {id!r}")
        case = Case(id, self.device, self.rounds)
        yield case
        self.cases.append(case)
        print("\n".join(case.lines()), flush=True)

    def as_dict(self) -> dict[str, Any]:
        cases = [case.as_dict() for case in self.cases]
        return {"schema": SCHEMA, "benchmark": self.name, "environment": self.environment, "cases": cases, **self.extra}

    def finish(self, options: argparse.Namespace) -> int:
        """Write what was asked for; 1 if a contestant was wrong."""
        if options.json:
            options.json.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        if options.plot:
            plot(self.as_dict(), options.plot)
        return int(any(case.wrong for case in self.cases))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of each contestant's time over the baseline's, a group per case; needs matplotlib (extra `plot`)."""
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["contestants"]))
    height = 0.8 / max(len(names), 1)
    figure = matplotlib_figure(figsize=(8, 1 + 0.3 * len(names) * max(len(report["cases"]), 1)))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        ratios = [case["contestants"].get(name, {}).get("ratio") or 0.0 for case in report["cases"]]
        rows = [row + (place - (len(names) - 1) / 2) * height for row in range(len(ratios))]
        axes.barh(rows, ratios, height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(report["cases"])), [case["id"] for case in report["cases"]])
    axes.invert_yaxis()
    axes.set_xlabel("time / time of the baseline (minima; below 1 is faster)")
    axes.set_title(f"{report['benchmark']} on {report['environment']['processor']}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=150)


def matplotlib_figure(**options: Any) -> Any:
    """An empty figure that belongs to no window; ValueError that names the extra where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("a plot needs matplotlib: pip install 'qwen35moe[plot]'") from None
    return Figure(layout="constrained", **options)
