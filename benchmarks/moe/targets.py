"""Targets of the forms beside the measurements: `python -m benchmarks moe --targets`.

The ratios were set on a 2-core machine with AMX. They are to the fastest of transformers' three forms in the same process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.moe.cases import Case
from benchmarks.moe.implementations import AUTO, TRANSFORMERS

PRESETS = ("35b-a3b", "moe-4.54b")
FORWARD = {1: (1.5, 1.5), 8: (1.15, 1.3), 64: (1.05, 1.1), 512: (1.0, 1.1), 2048: (1.3, 1.05), 8192: (1.5, 1.1)}
TRAIN = {2048: (2.3, 1.3)}
MEMORY = {2048: (1 / 8, 1 / 4)}  # of transformers' peak beyond weights and their gradients


def cases(presets: Iterable[str] = PRESETS, tokens: Iterable[int] | None = None, train: bool | None = None) -> list[Case]:
    """The cases behind the table, or some of them."""
    kinds = [kind for kind in (False, True) if train in (None, kind)]
    return [
        Case(preset, n, train=kind)
        for preset in presets for kind in kinds for n in (TRAIN if kind else FORWARD)
        if preset in PRESETS and (tokens is None or n in tokens)
    ]


def best(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """transformers' fastest form of a measured case."""
    names = [f"transformers {kind}" for kind in TRANSFORMERS]
    timed = [(name, row["implementations"][name]) for name in names if row["implementations"].get(name, {}).get("min_s")]
    return min(timed, key=lambda form: form[1]["min_s"]) if timed else None


def fastest(row: Mapping[str, Any]) -> tuple[str, float]:
    """The name and seconds of the fastest form of a case, bare products included."""
    seconds = {name: one["min_s"] for name, one in row["implementations"].items() if one.get("min_s")}
    name = min(seconds, key=seconds.__getitem__)
    return name, seconds[name]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: case, transformers' best, ours, ratio, target, verdict, and the ratio of the fastest known form.

    That is the fastest of all measured implementations and of the bare products in every form: not a bound of the machine.
    """
    lines = ["| case | transformers' best, ms | ours, ms | ratio | target | verdict | fastest known form |"]
    lines.append("|" + "---|" * 7)
    for row in sorted(report["cases"], key=_place):
        case, theirs, ours = row["case"], best(row), row["implementations"].get(AUTO, {})
        goals = (TRAIN if case["train"] else FORWARD).get(case["tokens"])
        if case["preset"] not in PRESETS or goals is None or theirs is None or not ours.get("min_s"):
            continue
        goal, ratio = goals[PRESETS.index(case["preset"])], theirs[1]["min_s"] / ours["min_s"]
        name, fast = fastest(row)
        limit = f"{theirs[1]['min_s'] / fast:.2f}x ({name})"
        name = f"{case['preset']}, {case['tokens']} tokens" + (", forward + backward" if case["train"] else "")
        times = f"{theirs[1]['min_s'] * 1e3:.2f} ({theirs[0][13:]}) | {ours['min_s'] * 1e3:.2f} | {ratio:.2f}x"
        lines.append(f"| {name} | {times} | >= {goal}x | {verdict(ratio >= goal)} | {limit} |")
        if case["train"]:
            lines.append(_memory(row, case, goals=MEMORY[case["tokens"]]))
    return "\n".join(lines)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The order of the table, whatever the runs that make up a report."""
    case = row["case"]
    return PRESETS.index(case["preset"]) if case["preset"] in PRESETS else len(PRESETS), case["train"], case["tokens"]


def _memory(row: Mapping[str, Any], case: Mapping[str, Any], goals: tuple[float, float]) -> str:
    peaks = {name: one["peak_bytes"] for name, one in row["implementations"].items() if one.get("peak_bytes")}
    fast = best(row)
    if fast is None or not {AUTO, fast[0]} <= peaks.keys():
        return f"| {case['preset']}, peak memory of it | | | | | not measured | |"
    ours, theirs = peaks[AUTO], peaks[fast[0]]
    goal = goals[PRESETS.index(case["preset"])]
    return (
        f"| {case['preset']}, peak memory of it, MB | {theirs / 1e6:.0f} | {ours / 1e6:.0f} | {ours / theirs:.3f} | "
        f"<= {goal} | {verdict(ours <= goal * theirs)} | |"
    )


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"
