"""Two results of one benchmark, case by case: the ratio of times with an interval; exit status 1 if B is slower.

    python -m benchmarks compare A.json B.json [--tolerance 0.02] [--relative] [--only NAME]

For each case and implementation in both files: the median of B over the median of A, and the 95 % interval of that ratio
over resampled runs (bootstrap). Slower means that the whole interval lies above 1 + tolerance, the same that all of it lies
within the tolerance of 1; anything else is undecided: measure with more rounds, or on a quiet machine. An implementation
that is wrong in B and was timed in A counts as slower. --relative divides by an implementation of the same file, to compare two
machines.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_DRAWS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--relative", metavar="NAME", help="divide by this implementation of the same case")
    parser.add_argument("--only", help="implementations, with commas")
    options = parser.parse_args(None if argv is None else list(argv))
    first, second = (read(file) for file in options.files)
    for key in ("schema", "benchmark"):
        if first.get(key) != second.get(key):
            parser.error(f"the files' {key} differ: {first.get(key)!r} and {second.get(key)!r}")
    chosen = options.only.split(",") if options.only else None
    slower, compared, undecided = 0, 0, 0
    for id, name, a, b in matched(first, second, options.relative):
        if chosen is not None and name not in chosen:
            continue
        compared += 1
        if isinstance(b, str):
            slower += 1
            print(f"{id}  {name:<26} not timed in {options.files[1].name}: {b}")
            continue
        ratio, low, high = interval(a, b)
        judgement = verdict(low, high, options.tolerance)
        slower += judgement == "SLOWER"
        undecided += judgement == "undecided"
        single = "  (one number each)" if len(a) == len(b) == 1 else ""
        print(f"{id}  {name:<26} {ratio:6.3f}x  [{low:.3f}, {high:.3f}]  {judgement}{single}")
    print(f"{compared} compared, {slower} slower" + (f", {undecided} undecided" if undecided else ""))
    if not compared:
        print("the files have no case and implementation in common")
    return int(bool(slower) or not compared)


def verdict(low: float, high: float, tolerance: float) -> str:
    """Of the interval of a ratio of times."""
    if low > 1 + tolerance:
        return "SLOWER"
    if high < 1 - tolerance:
        return "faster"
    return "same" if 1 - tolerance <= low and high <= 1 + tolerance else "undecided"


def read(file: Path) -> dict[str, Any]:
    """A report; raises ValueError if the file holds none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as a report of a benchmark: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list):
        raise ValueError(f"{file} is no report of a benchmark: it has no list of cases")
    return report


def matched(
    first: Mapping[str, Any], second: Mapping[str, Any], relative: str | None
) -> Iterator[tuple[str, str, list[float], list[float] | str]]:
    """(case, implementation, runs in the first, runs in the second or why there are none)."""
    later = {case["id"]: case["implementations"] for case in second["cases"]}
    for case in first["cases"]:
        others = later.get(case["id"], {})
        for name, one in case["implementations"].items():
            other = others.get(name)
            if other is None or not one.get("min_s") or other.get("skipped"):
                continue
            if not other.get("min_s"):
                yield case["id"], name, [], other.get("wrong") or "it did not run"
                continue
            yield case["id"], name, _runs(one, case["implementations"], relative), _runs(other, others, relative)


def _runs(one: Mapping[str, Any], others: Mapping[str, Any], relative: str | None) -> list[float]:
    """Seconds of each run; only the median if the file holds no single runs (its interval is empty)."""
    runs = one.get("seconds") or [one["median_s"]]
    if relative is None:
        return runs
    base = others.get(relative, {}).get("median_s")
    if not base:
        raise ValueError(f"--relative {relative}: a case has no time of it, only of {', '.join(others)}")
    return [seconds / base for seconds in runs]


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median of b over median of a, and the 95 % interval over resampled runs."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(b, k=len(b))) / statistics.median(draw.choices(a, k=len(a))) for _ in range(_DRAWS)
    )
    return statistics.median(b) / statistics.median(a), ratios[int(0.025 * _DRAWS)], ratios[int(0.975 * _DRAWS)]
