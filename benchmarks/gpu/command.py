"""`python -m benchmarks.gpu`: the arguments, the order of the work, the exit status."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.gpu as package
from benchmarks.gpu import rows, table
from benchmarks.gpu.environment import PTXAS
from benchmarks.gpu.plan import MINUTES, PARTS, Step, check, listing, steps
from benchmarks.gpu.rows import CUT, FAILED, NOT_RUN, RIGHT, UNRUN, WRONG
from benchmarks.gpu.runner import Runner, status
from benchmarks.tools.machine import RESULTS, profile_name

IMPORT = 60  # seconds for the first import of torch
SIDE_BY_SIDE = 8  # checks at once, at most: some hold 20 GB of GPU memory
DOUBTED = "gated_delta_rule"  # known to be miscompiled on Hopper by the ptxas of Triton 3.6 and 3.7


def main(argv: Sequence[str] | None = None) -> int:
    started = time.time()
    options = parsed(argv)
    if options.table:
        return show(rows.latest(rows.read(options.table)), options)
    small = options.device == "cpu" or (options.device == "auto" and not has_gpu())
    if small:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # without a CUDA context, see `runner`
    plan = whole_plan()
    if options.list:
        print(listing(plan, small, options.minutes))
        return 0
    if options.only and not any(step.wanted(options.only) for step in plan):
        raise ValueError(f"--only {options.only}: no step has that row; --list shows the steps")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only is None and (old := options.out / "rows.jsonl").exists():
        old.replace(options.out / "rows.before.jsonl")
    prepare_packages(options)
    runner = Runner(options.out, small, options.minutes, options.only, workers(small), started=started,
                    options={"wheels": options.wheels})  # fmt: skip
    plan = drive(runner, plan)
    print()
    shown = rows.latest(rows.read(runner.path))
    show(shown, options)
    return status(runner.rows(), plan)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole run, the table included")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "build/gpu"),
                        help="default: $OUT or build/gpu")  # fmt: skip
    parser.add_argument("--only", metavar="ID", help="one row, or all whose ids begin with this; adds to OUT/rows.jsonl")
    parser.add_argument("--list", action="store_true", help="print the time plan")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: the small form")
    parser.add_argument("--wheels", help="a folder with wheels, installed into OUT/site, and perhaps causal-conv1d's sdist")
    parser.add_argument("--profile", type=profile_name, metavar="NAME", help="also write benchmarks/results/NAME/gpu.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a rows.jsonl, of a run that was cut too")
    options = parser.parse_args(None if argv is None else list(argv))
    options.out = options.out.resolve()
    options.wheels = str(Path(options.wheels).resolve()) if options.wheels else None
    return options


def has_gpu() -> bool:
    """Whether torch has a CUDA device, found out in another process: this one never uses CUDA."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=IMPORT).stdout.strip() == "True"
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"torch did not say within {IMPORT} s whether there is a GPU: pass --device cuda or cpu") from None


def whole_plan() -> list[Step]:
    from qwen35moe.backends import OPERATIONS

    return steps(OPERATIONS)


def workers(small: bool) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(SIDE_BY_SIDE, max(1, cores // 2)) if not small else min(2, cores)


def prepare_packages(options: argparse.Namespace) -> None:
    """Install --wheels into OUT/site and put it in front of the path of every step."""
    site = options.out / "site"
    wheels = sorted(Path(options.wheels).glob("*.whl")) if options.wheels else []
    if wheels and not options.only:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *map(str, wheels)], timeout=60, check=False)
    if options.wheels or site.exists():
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


def drive(runner: Runner, plan: list[Step]) -> list[Step]:
    """Run the plan; behind the checks, what follows from them. Ends at SIGTERM with the rows so far."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    last = max(number for number, step in enumerate(plan) if step.group) + 1
    extra: list[Step] = []
    try:
        runner.run(plan[:last])
        extra = follow_up(runner)
        runner.run(extra)
        runner.run(plan[last:])
    except KeyboardInterrupt:
        writer = rows.Rows(runner.path, "interrupted", started=runner.started)
        runner.say(f"interrupted: {writer.write('interrupted', FAILED, note='the run was ended from outside')['note']}")
    finally:
        signal.signal(signal.SIGTERM, before)
    return plan + extra


def follow_up(runner: Runner) -> list[Step]:
    """The coverage of the kernels as a row; checks to repeat with another ptxas, or with a package that was just built."""
    results = runner.rows()
    coverage(runner)
    built = any(row["id"] == "wheels/causal_conv1d" and row["verdict"] == RIGHT for row in results)
    again = [check("short_convolution", 40, "@built", fresh=True)] if built else []
    doubted = [row["verdict"] for row in results if row["id"].startswith(f"check/{DOUBTED}/triton")]
    if {WRONG, FAILED, CUT} & set(doubted) and not runner.small and Path(PTXAS).exists():
        environment = {"TRITON_PTXAS_PATH": PTXAS, "TRITON_CACHE_DIR": str(runner.out / "triton-cache-of-ptxas")}
        again += [check(DOUBTED, 110, "@ptxas", part, environment=environment, fresh=True) for part in PARTS]
    return again


def coverage(runner: Runner) -> None:
    """Wrong if a kernel of the package was launched by no check, or an implementation was run by none."""
    from benchmarks.gpu.checks import implementations_not_run, kernels_not_launched, kernels_of_the_package

    writer, records = rows.Rows(runner.path, "check/coverage", started=runner.started), runner.records()
    if runner.only is None:
        missing, count = kernels_not_launched(records), len(kernels_of_the_package())
        note = f"no check launched {', '.join(missing)}" if missing else ""
        verdict, unit = WRONG if missing else RIGHT, f"of {count} kernels launched"
        writer.write("check/coverage", verdict, count - len(missing), unit, note=note)
    forgotten = implementations_not_run(records)
    for row in runner.rows():
        if row["verdict"] == UNRUN:
            writer.write(row["id"], WRONG if row["id"] in forgotten else NOT_RUN, note=row["note"])


def show(results: list[rows.Row], options: argparse.Namespace) -> int:
    """Print profiles and the table, write the report; the status of the rows alone."""
    if not results:
        print("no rows")
        return 1
    profiles = table.profiles(results)
    if profiles and options.only is None:
        print(f"Profiles: kernels with most time\n{profiles}\n")
    print(table.table(results, "python -m benchmarks.gpu"))
    print(f"\n{table.summary(results)}")
    folder = options.table.parent if options.table else options.out
    table.write(folder / "report.json", results, options.profile)
    print(f"written: {folder / 'report.json'}")
    if options.profile:
        path = RESULTS / options.profile / "gpu.json"
        table.write(path, results, options.profile)
        print(f"written: {path}")
    return int(any(row["verdict"] in (WRONG, UNRUN, FAILED, CUT) for row in results))
