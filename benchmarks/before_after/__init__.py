"""This checkout against another one (an older commit in a git worktree): prefill, decode, one layer, experts.

    git worktree add ../before v0.1                       # any checkout of the library that has the same public classes
    python -m benchmarks before_after --before ../before [--only text,delta/layer] [--rounds 9] [--json out.json]
    python -m benchmarks before_after --calls [--before ../before]

One long-lived process for each checkout times on request, in turns; imports and warm-up do not count. Both draw the same
weights (digests are compared) and get the same inputs. The answers come first: bit-equal or within a stated bound, otherwise
the scenario is not timed. Ratios are of minima; below 1 is faster than before. On CPU each process chooses some forms by
measurement, so two processes of one commit may differ in their last bits; with --deterministic none is measured, and bits
differ only where the arithmetic differs. --calls counts the Python calls into the package for one cached token in a Gated
DeltaNet layer with its experts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.before_after.scenarios import GROUPS, Scenario
from benchmarks.tools.common import ROOT, Case, Report, Timing, arguments, in_turns, limit_dtypes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BOUND = {"bf16": 2e-2, "fp32": 1e-5}  # relative error between two answers whose sums run in another order
PAUSE = 0.02  # seconds between requests: the other process' threads stop spinning


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--before", type=Path, help="the other checkout's folder")
    parser.add_argument("--only", default="", help=f"beginnings of ids, with commas: {', '.join(GROUPS)}, text/decode, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--warmup", type=int, default=1, help="requests to each process that do not count")
    parser.add_argument("--deterministic", action="store_true", help="both processes use deterministic algorithms")
    parser.add_argument("--calls", action="store_true", help="only count Python calls of one decoded layer")
    options = parser.parse_args(None if argv is None else list(argv))
    if options.before is None and not options.calls:
        parser.error("--before names the checkout to compare with")
    if options.before is not None and not (options.before / "qwen35moe").is_dir():
        parser.error(f"{options.before} is no checkout of the library: it has no folder qwen35moe")
    chosen = choose(options.only.split(","))
    if not chosen:
        ids = [scenario.id for group in GROUPS.values() for scenario in group.scenarios]
        parser.error(f"--only {options.only}: there are {', '.join(ids)}")
    checkouts = {"before": options.before, "after": ROOT} if options.before else {"after": ROOT}
    dtypes = () if options.calls else limit_dtypes(options, DTYPES[options.dtype])
    report = Report("before_after", device=options.device, rounds=options.rounds, dtypes=dtypes)
    report.extra["commits"] = {name: commit(folder) for name, folder in checkouts.items()}
    print(", ".join(f"{name} {revision}" for name, revision in report.extra["commits"].items()))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(started(folder, options.device)) for name, folder in checkouts.items()}
        if options.deterministic:
            for worker in workers.values():
                worker("deterministic")
        if options.calls:
            report.extra["calls"] = count_calls(workers)
        else:
            for name, scenarios in chosen.items():
                compare_group(report, name, scenarios, workers, options)
    return report.finish(options)


def choose(prefixes: Sequence[str]) -> dict[str, list[Scenario]]:
    """The scenarios of each group whose ids begin with one of the prefixes."""
    chosen = {name: [s for s in group.scenarios if s.id.startswith(tuple(prefixes))] for name, group in GROUPS.items()}
    return {name: scenarios for name, scenarios in chosen.items() if scenarios}


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, do: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise SystemExit(f"a worker ended with {self.process.wait()} at request {do!r}; its error stands above")
        return json.loads(reply)


@contextmanager
def started(folder: Path, device: str) -> Iterator[Worker]:
    """A worker that imports the library from `folder`."""
    root = folder.resolve()
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(root), device]
    process = subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    try:
        yield Worker(process)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compare_group(
    report: Report, name: str, scenarios: Sequence[Scenario], workers: dict[str, Worker], options: argparse.Namespace
) -> None:
    """Build one model in both processes, then a case for each scenario."""
    model = {"preset": GROUPS[name].preset, "changes": GROUPS[name].changes, "dtype": options.dtype}
    built = {who: worker("build", **model) for who, worker in workers.items()}
    if len({row["digest"] for row in built.values()}) > 1:
        raise SystemExit(f"{name}: the checkouts draw different weights, their answers cannot be compared")
    for scenario in scenarios:
        with report.case(f"{scenario.id}/{options.dtype}") as case:
            case.facts.update(vars(scenario), weight_bytes=built["after"]["bytes"])
            case.facts["bits_equal"] = check(case, scenario, workers, BOUND[options.dtype])
            if not case.wrong:
                case.baseline = "before"
                case.timings.update(time_in_turns(scenario, workers, case.rounds, options.warmup))
        print(f"  answers {'equal' if case.facts['bits_equal'] else 'not equal'} bit for bit", flush=True)


def check(case: Case, scenario: Scenario, workers: dict[str, Worker], bound: float) -> bool:
    """Compare the answers; returns whether they are bit-equal."""
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for who, worker in workers.items():
            file = Path(scratch) / f"{who}.pt"
            worker("prepare", kind=scenario.kind, tokens=scenario.tokens, past=scenario.past, answer=str(file))
            answers[who] = torch.load(file)
    case.check("after", answers["after"], answers["before"], bound=bound)
    return torch.equal(answers["after"], answers["before"])


def time_in_turns(scenario: Scenario, workers: dict[str, Worker], rounds: int, warmup: int) -> dict[str, Timing]:
    """Requests to the processes in turns; the first `warmup` rounds are not counted."""

    def request(who: str, number: int) -> list[float]:
        time.sleep(PAUSE)
        return workers[who]("time", runs=scenario.runs, uncounted=scenario.uncounted)["seconds"]

    rows = in_turns(list(workers), warmup + rounds, request)
    return {who: Timing(tuple(chain.from_iterable(seconds[warmup:]))) for who, seconds in rows.items()}


def count_calls(workers: dict[str, Worker]) -> dict[str, dict[str, int]]:
    """Calls by file for each checkout, printed."""
    counts: dict[str, dict[str, int]] = {}
    for who, worker in workers.items():
        counts[who] = worker("calls")["files"]
        print(f"{who}: {sum(counts[who].values())} calls in {len(counts[who])} files for one decoded layer")
        for file, calls in sorted(counts[who].items(), key=lambda item: -item[1]):
            print(f"  {calls:4d}  {file}")
    return counts


def commit(folder: Path) -> str:
    """The checkout's commit, with + where files were changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip() or "unknown"
