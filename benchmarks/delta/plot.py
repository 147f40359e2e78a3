"""Time against length, a panel for each operation, gates and mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35moe.figures import new_figure, save_figure


def title(facts: Mapping[str, Any]) -> str:
    """A panel's title: the cases of one line differ in nothing but the number of tokens."""
    sizes = "".join(f", {name} {facts[name]}" for name in ("batch", "layers") if facts[name] > 1)
    return f"{facts['operation']}, {facts['gates']} gates, {facts['dtype']}, {facts['mode']}{sizes}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A PNG of the cases of a report with more than one token. Needs matplotlib (extra `plot`)."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case in report["cases"]:
        facts = case["facts"]
        if facts["tokens"] == 1:
            continue
        panel = panels.setdefault(title(facts), {})
        for name, row in case["implementations"].items():
            if row["min_s"] is not None:
                panel.setdefault(name, []).append((facts["tokens"], 1e3 * row["min_s"]))
    figure = new_figure(5 * max(1, len(panels)), 4)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axes, (words, panel) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels.items(), strict=False):
        for name, points in panel.items():
            lengths, times = zip(*sorted(points), strict=True)
            axes.plot(lengths, times, marker="o", markersize=3, label=name, color=f"C{names.index(name) % 10}")
        axes.set(xscale="log", yscale="log", title=words, xlabel="tokens", ylabel="ms, best of the rounds")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=8)
    figure.suptitle(str(report["environment"].get("gpu") or report["environment"]["processor"]), fontsize=9)
    save_figure(figure, path, dpi=120)
