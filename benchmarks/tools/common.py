"""Measuring: implementations in turns, minima and medians, one JSON format, one plot.

    report = Report("norm")
    with report.case("rms_norm/N512/D2048/bf16") as case:
        case.check("ours", rms_norm(x, w), truth, bound=1e-2)      # a wrong implementation is not timed
        case.time({"transformers": theirs, "ours": ours}, baseline="transformers")
    report.finish(arguments)

Case ids are stable: `operation/sizes/dtype`. Another run, or another machine, is compared by id.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools import limits
from benchmarks.tools.load import OtherLoad
from benchmarks.tools.load import sentence as load_sentence
from benchmarks.tools.machine import RESULTS, environment, header, profile_name
from qwen35moe.figures import new_figure, save_figure
from qwen35moe.files import file_to_write, write_text

SCHEMA = 2  # of the JSON file; a change of meaning or of a key raises it, a new key does not
PAGE = 4096
NOISY = 1.5  # median over minimum; 1.02 to 1.2 on a quiet machine
ROOT = Path(__file__).resolve().parents[2]  # of the checkout


def arguments(description: str | None, *, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the arguments of every suite; add to it, then `parse_args(argv)`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks NAME",
        description=(description or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=at_least_one, default=rounds, help="runs of each implementation")
    parser.add_argument("--json", type=output_path, help="write the report here")
    parser.add_argument(
        "--profile", type=profile_name, metavar="NAME",
        help="the machine's kind, for example zen4-avx2, zen5-avx512, sapphire-rapids-amx, graviton: stored in the report, "
        "which without --json is benchmarks/results/NAME/SUITE.json (`python -m benchmarks report` shows them side by side)",
    )
    parser.add_argument("--no-limits", dest="limits", action="store_false", help="do not measure the machine's limits")
    parser.add_argument("--plot", type=output_path, help="draw the ratios here (PNG; needs matplotlib)")
    return parser


def limit_dtypes(options: argparse.Namespace, *dtypes: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes in which a suite measures the machine's limits: none with --no-limits."""
    return dtypes if options.limits else ()


def at_least_one(text: str) -> int:
    """An argument's number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def output_path(text: str) -> Path:
    """An argument's path, refused before hours of measuring if it cannot be written."""
    try:
        return file_to_write(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error}") from None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a-b| / max|b| in float64; inf if an element is not finite."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    error = ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if error == error else float("inf")


def logit_errors(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Of logits [T, vocabulary]: largest and root-mean-square error, relative to the largest and to the root mean square of
    the expected ones; share of tokens with the same most likely next token."""
    error = actual - expected
    return {
        "max": float(error.abs().max() / expected.abs().max()),
        "rms": float((error.square().mean() / expected.square().mean()).sqrt()),
        "top1": float((actual.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


def touch(*tensors: Tensor) -> None:
    """Read one byte of every page, so that the first round does not pay for mapping memory."""
    for tensor in tensors:
        tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE].sum()


def rotating(make: Callable[[], Any], nbytes: int, cache: int = 256 << 20) -> Callable[[], Any]:
    """Copies of some weights that together exceed the processor's cache, returned in turn.

    A layer that runs repeatedly reads its weights from the cache; in a model it reads them from memory every time.
    `nbytes` is the size of one copy; the returned function gives the next copy.
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
    """Seconds of each round of one implementation."""

    seconds: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    implementations: Mapping[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Run every implementation once a round, the order turning by one each round, and time each run.

    Interleaved runs share the machine's disturbances, and with a turning order no implementation always follows the same
    other. Garbage is collected between runs, not during them.
    """
    names = list(implementations)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _one_run(implementations[name], device)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def in_turns(names: Sequence[str], rounds: int, run: Callable[[str, int], Any]) -> dict[str, list[Any]]:
    """The results of `run(name, round)` by name; the order is reversed every other round."""
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            results[name].append(run(name, number))
    return results


def fresh_process(*arguments: str) -> Any:
    """The JSON value on the last line that `python *arguments` prints, run at the root of the checkout."""
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"python {' '.join(arguments)} ended with {run.returncode}\n{run.stdout}")
    return json.loads(run.stdout.splitlines()[-1])


def _one_run(function: Callable[[], object], device: str) -> float:
    gc.collect()
    gc.disable()
    try:
        return _cuda_seconds(function, device) if device.startswith("cuda") else _seconds(function)
    finally:
        gc.enable()


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    taken = time.perf_counter() - start
    del result  # freeing the result is not part of the run
    return taken


def _cuda_seconds(function: Callable[[], object], device: str) -> float:
    """Seconds between two events on the device's stream: of the device, or of the launches where those are slower."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        first.record()
        result = function()
        last.record()
        torch.cuda.synchronize()
    del result
    return first.elapsed_time(last) / 1e3


@dataclass
class Case:
    """One measured scenario: errors first, then times of the implementations whose answers are right.

    facts: the parts of the id, as keys, and other facts of the whole case. figures: further numbers of an implementation
    (bytes, rates). refused: implementations that cannot run, and why.
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
    needed: dict[str, float] = field(default_factory=dict)  # nbytes, flops: what every implementation has to read and compute
    limits: limits.Limits | None = None

    def check(self, name: str, actual: Tensor, expected: Tensor, *, bound: float) -> None:
        """Compare an implementation's answer with the expected one; above the bound it is not timed."""
        self.errors[name] = max(self.errors.get(name, 0.0), relative_error(actual, expected))
        if self.errors[name] > bound:
            self.wrong[name] = f"relative error {self.errors[name]:.1e}, bound {bound:.0e}"

    def time(self, implementations: Mapping[str, Callable[[], object]], *, baseline: str, warmup: int = 2) -> None:
        """Time the implementations whose answers are right, in turns; ratios are to `baseline`."""
        right = {name: run for name, run in implementations.items() if name not in self.wrong}
        self.baseline = baseline
        self.timings.update(interleave(right, rounds=self.rounds, warmup=warmup, device=self.device))

    def ratio(self, name: str) -> float | None:
        """Minimum of the implementation over minimum of the baseline: below 1 is faster."""
        if self.baseline not in self.timings or name not in self.timings:
            return None
        return self.timings[name].min / self.timings[self.baseline].min

    def shares(self, seconds: float) -> dict[str, float]:
        """Rates of a run, and shares of the machine's limits (`tools.limits.share`); empty where these are not known."""
        return limits.share(self.limits, seconds, **self.needed) if self.limits and self.needed else {}

    def as_dict(self) -> dict[str, Any]:
        implementations = {}
        for name in {**self.errors, **self.wrong, **self.timings}:
            timing = self.timings.get(name)
            implementations[name] = {
                "error": self.errors.get(name),
                "wrong": self.wrong.get(name),
                "min_s": timing and timing.min,
                "median_s": timing and timing.median,
                "runs": len(timing.seconds) if timing else 0,
                "ratio": self.ratio(name),
                **self.figures.get(name, {}),
                **(self.shares(timing.min) if timing else {}),
            }
        optional = {"facts": self.facts, "refused": self.refused, "needed": self.needed}
        more = {key: value for key, value in optional.items() if value}
        return {"id": self.id, "baseline": self.baseline, **more, "implementations": implementations}

    def table(self) -> Iterator[str]:
        """The case for the terminal, a line per implementation."""
        yield self.id
        for name, row in self.as_dict()["implementations"].items():
            error = "" if row["error"] is None else f"  error {row['error']:.1e}"
            if row["min_s"] is None:
                yield f"  {name:<24} not timed{error}: {row['wrong']}" if row["wrong"] else f"  {name:<24} not timed{error}"
                continue
            ratio = "" if row["ratio"] is None else f"  {row['ratio']:6.3f}x"
            times = f"min {_readable(row['min_s'])}  median {_readable(row['median_s'])} of {row['runs']}"
            figures = "".join(f"  {key} {value:.4g}" for key, value in self.figures.get(name, {}).items())
            yield f"  {name:<24} {times}{ratio}{error}{limits.share_text(row)}{figures}{noise(row)}"
        for name, reason in self.refused.items():
            yield f"  {name:<24} not run: {reason}"


def _readable(seconds: float) -> str:
    scale, unit = (1.0, "s ") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:8.2f} {unit}"


def noise(row: Mapping[str, Any]) -> str:
    """A remark for an implementation whose runs differ more than those of a quiet machine, else ""."""
    if row.get("runs", 0) < 2 or not row.get("min_s") or row["median_s"] <= NOISY * row["min_s"]:
        return ""
    return f"  NOISY: median {row['median_s'] / row['min_s']:.1f} times the minimum"


def warn_if_busy(cases: Iterable[Mapping[str, Any]]) -> bool:
    """Warns on standard error where some times are not to be relied on; True if there are any."""
    rows = [row for case in cases for row in case["implementations"].values()]
    noisy = sum(bool(noise(row)) for row in rows)
    if noisy:
        timed = sum(bool(row.get("min_s")) for row in rows)
        print(
            f"warning: {noisy} of {timed} times have a median of more than {NOISY} times the minimum: the machine was busy. "
            "Measure again on a quiet one, or with more --rounds",
            file=sys.stderr,
        )
    return bool(noisy)


class Report:
    """The cases of one benchmark, printed as they finish; `finish` writes JSON and plot and gives the exit status.

    dtypes: those of the cases. The machine's limits in them are measured at the beginning and again at the end, and the best
    counts; () measures none.
    """

    def __init__(self, name: str, *, device: str = "cpu", rounds: int = 9, dtypes: Sequence[torch.dtype] = ()) -> None:
        self.name, self.device, self.rounds = name, device, rounds
        self.cases: list[Case] = []
        self.extra: dict[str, Any] = {}  # further keys of the JSON file
        self.environment = environment()
        print(header(self.environment))
        self._load, self._dtypes = OtherLoad(), dtypes
        self.limits = limits.of_all(device, dtypes)
        self._print_limits()

    def _print_limits(self) -> None:
        for name, row in self.limits.items():
            print(f"{name} {limits.sentence(row)}", flush=True)

    def limits_of(self, dtype: str) -> limits.Limits | None:
        """The limits in a dtype (bf16, fp32, ...), None if they were not measured."""
        return self.limits.get(dtype)

    def close_limits(self) -> None:
        """Measure the limits again: the machine may have been busy at the beginning."""
        if self._dtypes:
            again = limits.of_all(self.device, self._dtypes)
            for name, row in self.limits.items():
                row.update(limits.better(row, again[name]))
            self._dtypes = ()
            self._print_limits()

    @contextmanager
    def case(self, id: str) -> Iterator[Case]:
        if any(case.id == id for case in self.cases):
            raise ValueError(f"two cases have the id {id!r}")
        case = Case(id, self.device, self.rounds)
        yield case
        self.cases.append(case)
        print("\n".join(case.table()), flush=True)

    def as_dict(self) -> dict[str, Any]:
        cases = [case.as_dict() for case in self.cases]
        head = {"schema": SCHEMA, "benchmark": self.name, "environment": self.environment}
        measured = {"limits": self.limits} if self.limits else {}
        return {**head, **measured, "cases": cases, **self.extra}

    def finish(self, options: argparse.Namespace) -> int:
        """Write the files that the options name; 1 if an implementation was wrong."""
        self.close_limits()
        self.extra["load"] = self._load.as_dict()
        print(load_sentence(self.extra["load"]))
        warn_if_busy(self.as_dict()["cases"])
        write_report(options, self.as_dict())
        if options.plot:
            plot(self.as_dict(), options.plot)
        return int(any(case.wrong for case in self.cases))


def write_report(options: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """The JSON file that --json or --profile names, with the name of the machine's profile."""
    profile = getattr(options, "profile", None)
    path = options.json
    if path is None and profile:
        path = RESULTS / profile / f"{getattr(options, 'result_name', report['benchmark'])}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    if path:
        named = {"profile": profile} if profile else {}
        write_text(path, json.dumps({**named, **report}, indent=1) + "\n")
        print(f"written: {path}")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of each implementation's time over the baseline's, a group per case; needs matplotlib (extra `plot`)."""
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["implementations"]))
    height = 0.8 / max(len(names), 1)
    figure = new_figure(8, 1 + 0.3 * len(names) * max(len(report["cases"]), 1))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        ratios = [case["implementations"].get(name, {}).get("ratio") or 0.0 for case in report["cases"]]
        rows = [row + (place - (len(names) - 1) / 2) * height for row in range(len(ratios))]
        axes.barh(rows, ratios, height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(report["cases"])), [case["id"] for case in report["cases"]])
    axes.invert_yaxis()
    axes.set_xlabel("time / time of the baseline (minima; below 1 is faster)")
    axes.set_title(f"{report['benchmark']} on {report['environment']['processor']}", fontsize=9)
    axes.legend()
    save_figure(figure, path, dpi=150)
