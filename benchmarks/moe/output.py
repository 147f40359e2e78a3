"""What one reads: the table of a case, Markdown of a report, and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import header
from benchmarks.moe.contestants import AUTO


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """A measured case for the terminal, the fastest first, then those without a speed."""
    yield f"{row['id']}   {row['distinct_experts']} experts hit, {row['bytes'] / 1e6:.0f} MB, {row['flops'] / 1e9:.2f} GFLOP"
    found = row["contestants"]
    for name in sorted((n for n in found if found[n].get("min_s")), key=lambda n: found[n]["min_s"]):
        one = found[name]
        memory = f"  peak {one['peak_bytes'] / 1e6:8.1f} MB" if "peak_bytes" in one else ""
        error = f"  error {one['error']:.0e}" if one.get("error") is not None else ""
        yield (
            f"  {name:<26} min {one['min_s'] * 1e3:9.3f} ms  median {one['median_s'] * 1e3:9.3f} of {one['runs']}"
            f"  {one['tflops']:7.3f} TFLOP/s  {one['gbps']:7.1f} GB/s  {one['of_roofline']:4.0%} of roofline{memory}{error}"
        )
    for name, one in found.items():
        if reason := one.get("wrong") or one.get("skipped"):
            yield f"  {name:<26} not timed: {reason}"
    if "stages" in row:
        yield "  stages, ms: " + ", ".join(f"{stage} {s * 1e3:.3f}" for stage, s in row["stages"].items())


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: environment, roofline, a row per case and contestant."""
    roof = ", ".join(f"{key} {value:.4g}" for key, value in report["roofline"].items())
    text = [f"{header(report['environment'])}", "", f"Measured limits: {roof}.", ""]
    text += ["| case | contestant | min ms | median ms | TFLOP/s | GB/s | of roofline | peak MB |", "|" + "---|" * 8]
    for row in report["cases"]:
        for name, one in row["contestants"].items():
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


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Throughput against tokens, a panel per preset and direction, the roofline above; needs matplotlib (extra `plot`)."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("a plot needs matplotlib: pip install 'qwen35moe[plot]'") from None
    groups: dict[tuple[str, bool, str], list[Mapping[str, Any]]] = {}
    for row in report["cases"]:
        case = row["case"]
        groups.setdefault((case["preset"], case["train"], case["dtype"]), []).append(row)
    figure = Figure(figsize=(5.2 * max(len(groups), 1), 4.2), layout="constrained")
    for place, ((preset, train, dtype), rows) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), place + 1)
        rows = sorted(rows, key=lambda row: row["case"]["tokens"])
        tokens = [row["case"]["tokens"] for row in rows]
        axes.plot(tokens, [row["flops"] / row["roof_s"] / 1e12 for row in rows], "k--", label="roofline")
        for name in dict.fromkeys(name for row in rows for name in row["contestants"]):
            points = [(row["case"]["tokens"], row["contestants"].get(name, {}).get("tflops")) for row in rows]
            points = [(n, speed) for n, speed in points if speed]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, lw=2.2 if name == AUTO else 1, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(f"{preset}, {dtype}, {'forward + backward' if train else 'forward'}", fontsize=9)
        axes.legend(fontsize=6)
    figure.suptitle(str(report["environment"].get("gpu", report["environment"]["processor"])), fontsize=8)
    figure.savefig(path, dpi=110)
