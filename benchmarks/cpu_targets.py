"""The table of CPU targets: work, target, measured, share of the limit, command. About 15 minutes on two cores.

    python -m benchmarks cpu_targets [--only decode,moe] [--dtype bf16] [--checkpoint DIR] [--profile NAME] [--markdown out.md]
    python -m benchmarks cpu_targets --list

Each group of rows is a suite that runs in a process of its own; its command stands in the last column. Ratios are the time of
transformers' best setting over ours in that process. The cold start and the peak memory need a checkpoint on disk
(`python -m benchmarks synthetic DIR`). A model of fewer layers (--layers) stands for the whole one: the layers repeat.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tools.common import ROOT, SCHEMA, arguments, at_least_one, output_path, write_report
from benchmarks.tools.load import OtherLoad
from benchmarks.tools.load import sentence as load_sentence
from benchmarks.tools.machine import environment, header
from benchmarks.tools.report import baseline, share
from qwen35moe.files import write_text

Cases = Mapping[str, Mapping[str, Any]]  # by id
Measure = Callable[[Mapping[str, Any]], tuple[float, str] | str | None]


@dataclass(frozen=True)
class Row:
    """A target. measure reads the suite's report: (value, share of a limit), the reason why there is none, or None."""

    work: str
    goal: float
    measure: Measure
    at_most: bool = False
    unit: str = "x"


@dataclass(frozen=True)
class Group:
    """Rows that one run of a suite measures. minutes: about, on two cores."""

    name: str
    suite: str
    arguments: tuple[str, ...]
    rows: tuple[Row, ...]
    minutes: float

    def command(self, options: argparse.Namespace) -> list[str]:
        values = {name: str(getattr(options, name)) for name in ("dtype", "layers", "checkpoint")}
        return [self.suite, *(word.format(**values) for word in self.arguments)]


def faster(beginning: str, name: str = "ours") -> Measure:
    """Times faster than transformers, in the case whose id begins so."""

    def measure(report: Mapping[str, Any]) -> tuple[float, str] | str | None:
        for case in report["cases"]:
            if not case["id"].startswith(beginning):
                continue
            one = case["implementations"].get(name, {})
            reason = one.get("wrong") or one.get("skipped") or case.get("refused", {}).get(name)
            base = baseline(case)
            if not one.get("min_s") or base is None:
                return reason or "not in this version of the library"
            return base / one["min_s"], share(one).strip(" ()")
        return None

    return measure


def of_read(beginning: str, name: str = "ours") -> Measure:
    """Share of the read bandwidth."""

    def measure(report: Mapping[str, Any]) -> tuple[float, str] | None:
        rows = (case["implementations"].get(name, {}) for case in report["cases"] if case["id"].startswith(beginning))
        one = next(rows, {})
        return (one["of_read"], f"{one['gb_per_s']:.1f} GB/s") if one.get("of_read") else None

    return measure


def train_memory(report: Mapping[str, Any]) -> tuple[float, str] | None:
    """Peak memory beyond weights and gradients over that of transformers' fastest form."""
    for case in report["cases"]:
        peaks = {name: one["peak_bytes"] for name, one in case["implementations"].items() if one.get("peak_bytes")}
        if case.get("transformers_best") in peaks and "ours" in peaks:
            return peaks["ours"] / peaks[case["transformers_best"]], f"{peaks['ours'] / 1e6:.0f} MB"
    return None


def over_weights(name: str) -> Measure:
    """Peak memory over the bytes of the weights."""

    def measure(report: Mapping[str, Any]) -> tuple[float, str] | str:
        row = report.get("memory", {}).get(name)
        if row is None:
            return "not in this version of the library"
        return row["peak_over_weights"], f"{row['peak'] / 1e9:.2f} GB"

    return measure


def cold(report: Mapping[str, Any]) -> tuple[float, str] | None:
    """Time of load and first token over transformers'."""
    for case in report["cases"]:
        rows = case["implementations"]
        if "cold_first_token" in case["id"] and rows.get("ours", {}).get("min_s"):
            return rows["ours"]["min_s"] / rows["transformers"]["min_s"], f"{rows['ours']['min_s']:.1f} s"
    return None


def _moe_rows() -> tuple[Row, ...]:
    goals = {
        "plain": ("ours", (1.8, 1.3, 1.05, 1.1, 1.25)), "packed": ("ours packed", (1.8, 1.5, 1.25, 1.5, 1.2)),
        "zentorch": ("ours zentorch", (3.5, 2.5, 2, 2.5, 1.5)),
    }
    return tuple(
        Row(f"MoE 256x8, {tokens} tokens, {kind}", goal, faster(f"moe/35b-a3b/N{tokens}/", name))
        for kind, (name, row) in goals.items() for tokens, goal in zip((1, 8, 64, 512, 2048), row, strict=True)
    )


def _attention_rows() -> tuple[Row, ...]:
    return tuple(
        Row(f"attention core, heads of {preset}, T={tokens}", 2.5, faster(f"attention/{preset}/T{tokens}/"))
        for preset in ("35b-a3b", "moe-4.54b") for tokens in (512, 2048, 8192)
    )


DECODE = "decode/moe-4.54b/"
GROUPS = (
    Group("decode", "decode", ("--layers", "{layers}", "--dtype", "{dtype}", "--prefill", "512", "--context", "32"), (
        Row("4.54B, one cached token, plain", 1.8, lambda r: faster(_decode(r, 1))(r)),
        Row("4.54B, one cached token, plain: share of the read bandwidth", 0.8, lambda r: of_read(_decode(r, 1))(r), unit=""),
        Row("4.54B, batch 4, packed", 2.0, lambda r: faster(_decode(r, 4), "ours packed")(r)),
        Row("4.54B, batch 8, packed", 2.0, lambda r: faster(_decode(r, 8), "ours packed")(r)),
        Row("4.54B, prefill of 512 tokens, plain", 1.5, faster("prefill/moe-4.54b/")),
        Row("4.54B, prefill of 512 tokens, packed", 1.6, faster("prefill/moe-4.54b/", "ours packed")),
    ), 4),
    Group("attention", "attention", ("--dtype", "{dtype}", "--rounds", "3", "--only", "ours"), _attention_rows(), 2),
    Group(
        "delta", "delta", ("--operations", "layer,step", "--tokens", "512,2048", "--gates", "ordinary", "--dtype", "{dtype}",
                           "--rounds", "5"), (
            Row("Gated DeltaNet layer, T=512", 2.0, faster("layer/T512/")),
            Row("Gated DeltaNet layer, T=2048", 2.7, faster("layer/T2048/")),
            Row("Gated DeltaNet layer, one cached token", 1.6, faster("step/")),
        ), 3),
    Group(
        "moe", "moe", ("--preset", "35b-a3b", "--dtype", "{dtype}", "--rounds", "5", "--seconds", "5", "--no-memory", "--only",
                       "=ours,ours packed,ours zentorch,packed by hand,transformers"),
        _moe_rows(), 4),
    Group(
        "moe_train", "moe", ("--preset", "35b-a3b", "--dtype", "{dtype}", "--tokens", "2048", "--train", "yes", "--rounds", "3",
                             "--seconds", "1", "--only", "=ours,transformers"), (
            Row("MoE forward + backward, 2,048 tokens", 1.3, faster("moe/35b-a3b/N2048/")),
            Row("the same, memory beyond weights and gradients over transformers'", 1 / 8, train_memory, True, ""),
        ), 2),
    Group("model", "text_4b", ("--checkpoint", "{checkpoint}", "--rounds", "1", "--prefills", "1", "--packed"), (
        Row("4.54B, cold start: load + first token, over transformers'", 0.6, cold, True, ""),
        Row("4.54B, peak memory over weights, plain", 1.10, over_weights("ours"), True, ""),
        Row("4.54B, peak memory over weights, packed", 1.12, over_weights("ours packed"), True, ""),
    ), 6),
)  # fmt: skip


def _decode(report: Mapping[str, Any], batch: int) -> str:
    """The id of the case of a batch: it holds the number of layers."""
    ids = (case["id"] for case in report["cases"] if case["id"].startswith(DECODE) and f"/B{batch}/" in case["id"])
    return next(ids, "no case")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(None if argv is None else list(argv))
    if options.only and (unknown := set(options.only.split(",")) - {group.name for group in GROUPS}):
        raise ValueError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(group.name for group in GROUPS)}")
    chosen = [group for group in GROUPS if not options.only or group.name in options.only.split(",")]
    if options.list:
        for group in chosen:
            print(f"{group.name}: python -m benchmarks {' '.join(group.command(options))}   (about {group.minutes:g} minutes)")
            print("\n".join(f"  {row.work}: {target(row)}" for row in group.rows))
        return 0
    head, load = {"schema": SCHEMA, "benchmark": "cpu_targets", "environment": environment()}, OtherLoad()
    print(header(head["environment"]))
    lines, cases, limits = [], [], {}
    for group in chosen:
        report = measured(group, options)
        lines += table(group, report, options)
        if isinstance(report, dict):
            cases += report["cases"]
            limits = report.get("limits") or report.get("rooflines") or limits
    result = {**head, "limits": limits, "load": load.as_dict(), "cases": cases, "rows": lines}
    text = page(lines)
    print(f"\n{text}\n\n{load_sentence(result['load'])}")
    if options.markdown:
        write_text(options.markdown, text + "\n")
    write_report(options, result)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.prog = "python -m benchmarks cpu_targets"
    parser.add_argument("--only", help=f"groups of rows, with commas: {', '.join(group.name for group in GROUPS)}")
    parser.add_argument("--dtype", default="bf16", help="bf16 (the targets') or fp32")
    parser.add_argument("--layers", type=at_least_one, default=8, help="of the 4.54B model (32)")
    parser.add_argument("--checkpoint", type=Path, help="folder of the 4.54B model, for cold start and peak memory")
    parser.add_argument("--markdown", type=output_path, help="write the table here")
    parser.add_argument("--list", action="store_true", help="only print groups, commands and targets")
    return parser


def measured(group: Group, options: argparse.Namespace) -> dict[str, Any] | str:
    """The report of a group's suite, or the reason why there is none."""
    import subprocess
    import sys

    if "{checkpoint}" in group.arguments and options.checkpoint is None:
        return "needs --checkpoint DIR"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "benchmarks", *group.command(options), "--json", str(file)]
        print(f"\n{group.name}: python -m benchmarks {' '.join(group.command(options))}", flush=True)
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, check=False)
        print(f"{group.name}: {time.monotonic() - start:.0f} s", flush=True)
        if not file.exists():
            return f"the suite ended with {done.returncode} and no report"
        return json.loads(file.read_text(encoding="utf-8"))


def table(group: Group, report: dict[str, Any] | str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a group."""
    lines = []
    for row in group.rows:
        value = report if isinstance(report, str) else row.measure(report)
        line: dict[str, Any] = {"work": row.work, "target": target(row), "command": " ".join(group.command(options))}
        if isinstance(value, tuple):
            reached = value[0] <= row.goal if row.at_most else value[0] >= row.goal
            line |= {"measured": value[0], "text": f"{value[0]:.2f}{row.unit}", "verdict": "reached" if reached else "missed"}
            line["share"] = value[1]
        else:
            line |= {"measured": None, "text": "-", "verdict": value or "not measured", "share": ""}
        lines.append(line)
    return lines


def target(row: Row) -> str:
    return f"{'<=' if row.at_most else '>='} {row.goal:g}{row.unit}"


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown; r: share of read bandwidth, p: of the product rate."""
    text = ["| work | target | measured | share of the limit | verdict | `python -m benchmarks ...` |", "|---" * 6 + "|"]
    text += [
        f"| {one['work']} | {one['target']} | {one['text']} | {one['share']} | {one['verdict']} | `{one['command']}` |"
        for one in lines
    ]
    return "\n".join(text)
