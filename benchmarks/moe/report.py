"""The table of a case for the terminal, the Markdown page of a report, and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.moe.implementations import AUTO
from benchmarks.tools.common import noise
from benchmarks.tools.machine import header
from qwen35moe.figures import new_figure, save_figure


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """A measured case for the terminal, the fastest first, then the implementations that were not timed."""
    yield f"{row['id']}   {row['distinct_experts']} experts hit, {row['bytes'] / 1e6:.0f} MB, {row['flops'] / 1e9:.2f} GFLOP"
    rows = row["implementations"]
    for name in sorted((n for n in rows if rows[n].get("min_s")), key=lambda n: rows[n]["min_s"]):
        one = rows[name]
        memory = f"  peak {one['peak_bytes'] / 1e6:8.1f} MB" if "peak_bytes" in one else ""
        error = f"  error {one['error']:.0e}" if one.get("error") is not None else ""
        yield (
            f"  {name:<26} min {one['min_s'] * 1e3:9.3f} ms  median {one['median_s'] * 1e3:9.3f} of {one['runs']}"
            f"  {one['tflops']:7.3f} TFLOP/s  {one['gbps']:7.1f} GB/s  {one['of_roofline']:4.0%} of {_limit(one)}{memory}"
            f"{error}{noise(one)}"
        )
    for name, one in rows.items():
        if reason := one.get("wrong") or one.get("skipped"):
            yield f"  {name:<26} not timed: {reason}"
    if "breakdown" in row:
        yield "  breakdown, ms: " + ", ".join(f"{step} {s * 1e3:.3f}" for step, s in row["breakdown"].items())


def _limit(one: Mapping[str, Any]) -> str:
    """The limit that the implementation is nearer to."""
    if "of_read" not in one:
        return "roofline"  # a report of an older version
    return "read" if one["of_read"] >= one["of_product"] else "products"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: environment, roofline, a row per case and implementation."""
    numbers = ((key, value) for key, value in report["roofline"].items() if isinstance(value, int | float))
    roof = ", ".join(f"{key} {value:.4g}" for key, value in numbers)
    text = [f"{header(report['environment'])}", "", f"Measured limits: {roof}.", ""]
    text += ["| case | implementation | min ms | median ms | TFLOP/s | GB/s | of the limit | peak MB |", "|" + "---|" * 8]
    for row in report["cases"]:
        for name, one in row["implementations"].items():
            if not one.get("min_s"):
                if one.get("wrong"):
                    text.append(f"| {row['id']} | {name} | wrong: {one['wrong']} | | | | | |")
                continue
            peak = f"{one['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in one else ""
            text.append(
                f"| {row['id']} | {name} | {one['min_s'] * 1e3:.3f} | {one['median_s'] * 1e3:.3f} | {one['tflops']:.3f} | "
                f"{one['gbps']:.1f} | {one['of_roofline']:.0%} | {peak} |"
            )
    return "\n".join(text) + "\n"


def panels(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The cases by panel: those of one line differ in nothing but the number of tokens."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["cases"]:
        case = row["case"]
        how = f"trace {Path(case['trace']).stem}, layer {case['layer']}" if case.get("trace") else case["skew"]
        direction = "forward + backward" if case["train"] else "forward"
        seed = f", seed {case['seed']}" if case.get("seed") else ""
        title = f"{case['preset']}, {case['dtype']}, {direction}, {how}{'' if case['cold'] else ', warm'}{seed}"
        groups.setdefault(title, []).append(row)
    return groups


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Throughput against tokens, a panel per kind of case, the roofline above; needs matplotlib (extra `plot`)."""
    groups = panels(report)
    figure = new_figure(5.2 * max(len(groups), 1), 4.2)
    for place, (title, rows) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), place + 1)
        rows = sorted(rows, key=lambda row: row["case"]["tokens"])
        tokens = [row["case"]["tokens"] for row in rows]
        axes.plot(tokens, [row["flops"] / row["roof_s"] / 1e12 for row in rows], "k--", label="roofline")
        for name in dict.fromkeys(name for row in rows for name in row["implementations"]):
            points = [(row["case"]["tokens"], row["implementations"].get(name, {}).get("tflops")) for row in rows]
            points = [(n, speed) for n, speed in points if speed]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, lw=2.2 if name == AUTO else 1, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=6)
    figure.suptitle(str(report["environment"].get("gpu", report["environment"]["processor"])), fontsize=8)
    save_figure(figure, path, dpi=110)
