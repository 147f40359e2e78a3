"""Results of several machines side by side; the tables of the documentation are written from them.

    python -m benchmarks report [SUITE ...] [--profiles zen4-avx2,zen5-avx512] [--all] [--markdown out.md]
    python -m benchmarks report --write        # the tables between the markers in README.md and docs/

A result lies in benchmarks/results/PROFILE/SUITE.json (`--profile NAME` of a suite writes it there). A cell is the time of the
fastest of transformers' implementations (or of the case's baseline) over the time of ours: above 1 is faster. Behind it the
share of the measured limit that ours reaches, where the result holds it: of read bandwidth (r) or of products (p). "busy":
others used more than a tenth of a core during the run. --all shows every implementation.

A marker is a line `<!-- results: SUITE ... [profile=NAME,...] [only=BEGINNING,...] -->`; the table reaches to
`<!-- end of results -->`. `<!-- results: moe profile=NAME table=targets -->` is the table of `moe --targets`, `table=gpu` that
of `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import table as gpu_table
from benchmarks.moe import targets
from benchmarks.tools import load
from benchmarks.tools.common import ROOT, output_path
from benchmarks.tools.compare import read
from benchmarks.tools.machine import RESULTS, header
from qwen35moe.files import write_text

PAGES = ("README.md", "docs/reports/benchmarks.md", "docs/reports/moe_benchmark.md", "docs/guide/gpu.md")
MARKED = re.compile(r"(<!-- results: ([^\n]*?) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
Reports = dict[str, dict[str, dict[str, Any]]]  # profile -> suite -> report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    parser.add_argument("--profiles", help="with commas; default: all")
    parser.add_argument("--all", action="store_true", help="every implementation, not only ours")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--markdown", type=output_path, help="write the tables here")
    parser.add_argument("--write", action="store_true", help="write the marked tables of the documentation again")
    options = parser.parse_args(None if argv is None else list(argv))
    reports = found(options.results)
    if options.write:
        for name in PAGES:
            path = ROOT / name
            text = path.read_text(encoding="utf-8")
            new = rewritten(text, reports)
            if new != text:
                write_text(path, new)
            print(f"{name}: {'written' if new != text else 'unchanged'}")
        return 0
    chosen = profiles(reports, options.profiles)
    text = page(reports, options.suites, chosen, every=options.all)
    if not text:
        raise ValueError(f"no results of {', '.join(options.suites) or 'any suite'} for {', '.join(chosen)}")
    print(text)
    if options.markdown:
        write_text(options.markdown, text + "\n")
    return 0


def found(folder: Path) -> Reports:
    """All results in a folder."""
    reports: Reports = {}
    for file in sorted(folder.glob("*/*.json")):
        reports.setdefault(file.parent.name, {})[file.stem] = read(file)
    return reports


def profiles(reports: Reports, text: str | None) -> list[str]:
    """The profiles that are shown."""
    names = text.split(",") if text else list(reports)
    if unknown := [name for name in names if name not in reports]:
        raise ValueError(f"no results of the profile {unknown[0]!r}; there are {', '.join(reports)}")
    return names


def page(reports: Reports, suites: Sequence[str], names: Sequence[str], every: bool = False, only: Sequence[str] = ()) -> str:
    """A line per profile, then one table."""
    suites = list(suites) or sorted({suite for name in names for suite in reports[name]})
    shown = [name for name in names if any(suite in reports[name] for suite in suites)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name in shown:
        for suite in suites:
            report = reports[name].get(suite)
            for case, implementation, cell in rows(report, every) if report else ():
                if not only or case.startswith(tuple(only)):
                    cells.setdefault((case, implementation), {})[name] = cell
    if not cells:
        return ""
    lines = [f"- **{name}**: {machine(reports[name], suites)}" for name in shown]
    second = "target" if suites == ["cpu_targets"] else "implementation"
    lines += ["", f"| case | {second} | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    for (case, implementation), columns in cells.items():
        lines.append(f"| {case} | {implementation} | {' | '.join(columns.get(name, '') for name in shown)} |")
    return "\n".join(lines)


def machine(of: Mapping[str, Mapping[str, Any]], suites: Sequence[str]) -> str:
    """What the results of a profile were measured on: environments, limits, load."""
    lines: list[str] = []
    for suite in suites:
        if suite not in of:
            continue
        report = of[suite]
        keys = ("processor", "isa", "cores", "threads", "torch", "transformers")
        facts = header({key: report["environment"].get(key) for key in keys})
        measured = report.get("limits") or report.get("rooflines") or {}
        if measured and any("read_gbps" not in row for row in measured.values() if isinstance(row, dict)):
            measured = {}
        limits = ", ".join(
            f"{dtype}: read {row['read_gbps']:.1f} GB/s, products {row['product_tflops'] * 1e3:.0f} GFLOP/s"
            for dtype, row in measured.items() if isinstance(row, dict) and "product_tflops" in row
        )
        busy = report.get("load", {}).get("other_cores", 0.0)
        beside = f"; busy: others used {busy:.2f} cores" if busy > load.QUIET else ""
        lines.append(f"{facts}{'; limits ' + limits if limits else ''}{beside}")
    return " / ".join(dict.fromkeys(lines))


def rows(report: Mapping[str, Any], every: bool) -> Iterator[tuple[str, str, str]]:
    """(case, implementation, cell) of those that were timed or were wrong; of `cpu_targets` (work, target, cell)."""
    for row in report.get("rows", ()):
        share_of = f" ({row['share']})" if row["share"] else ""
        yield row["work"], row["target"], f"{row['text']}{share_of}, {row['verdict']}" if row["measured"] else row["verdict"]
    if "rows" in report:
        return
    for case in report["cases"]:
        implementations = case["implementations"]
        base = baseline(case)
        for name, one in implementations.items():
            if not every and not name.startswith(("ours", "after", "every", "qwen35moe")):
                continue
            if one.get("wrong"):
                yield case["id"], name, "wrong answer"
            elif one.get("min_s"):
                ratio = f"{base / one['min_s']:.2f}x" if base else f"{one['min_s'] * 1e3:.3g} ms"
                yield case["id"], name, ratio + share(one)


def baseline(case: Mapping[str, Any]) -> float | None:
    """Seconds of the fastest of transformers' implementations, or of the case's baseline."""
    timed = {name: one["min_s"] for name, one in case["implementations"].items() if one.get("min_s")}
    theirs = [seconds for name, seconds in timed.items() if name.startswith("transformers")]
    if case.get("baseline") in timed:
        return timed[case["baseline"]]
    return min(theirs) if theirs else None


def share(one: Mapping[str, Any]) -> str:
    """The larger of the two shares of a limit."""
    read, product = one.get("of_read") or 0.0, one.get("of_product") or 0.0
    if not read and not product:
        return ""
    return f" ({read:.0%} r)" if read >= product else f" ({product:.0%} p)"


def rewritten(text: str, reports: Reports) -> str:
    """A page with its marked tables made again."""

    def table(match: re.Match[str]) -> str:
        words = match[2].split()
        named = dict(word.split("=", 1) for word in words if "=" in word)
        names = [name for name in named["profile"].split(",") if name in reports] if "profile" in named else list(reports)
        only = named["only"].split(",") if "only" in named else []
        if named.get("table") == "targets":
            made = "\n\n".join(targets.table(reports[name]["moe"]) for name in names if "moe" in reports[name])
            return f"{match[1]}\n{made or 'Not measured yet.'}\n\n{match[4]}"
        if named.get("table") == "gpu":
            made = gpu_table.markdown({name: reports[name]["gpu"] for name in names if "gpu" in reports[name]})
            return f"{match[1]}\n{made or 'Not measured yet.'}\n\n{match[4]}"
        made = page(reports, [word for word in words if "=" not in word], names, only=only)
        return f"{match[1]}\n{made or 'Not measured yet.'}\n\n{match[4]}"

    return MARKED.sub(table, text)
