"""The measuring tool: turns, refusal of wrong answers, the JSON format, and that no machine is named. No timings."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import stat
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qwen35moe
from benchmarks.__main__ import TOOLS, main, suites
from benchmarks.text_4b.breakdown import Breakdown
from benchmarks.tools.common import Case, Report, arguments, interleave, plot, relative_error, rotating, touch
from benchmarks.tools.machine import environment, header


def test_implementations_run_in_turns_and_the_order_turns_too() -> None:
    order: list[str] = []
    implementations = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(implementations, rounds=3, warmup=1)
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert all(len(t.seconds) == 3 and 0 < t.min <= t.median for t in timings.values())


def test_a_wrong_answer_is_not_timed() -> None:
    ran: list[str] = []
    case = Case("add/N3/fp32", rounds=2)
    truth = torch.tensor([1.0, 2.0, 4.0])
    case.check("right", truth + 1e-7, truth, bound=1e-5)
    case.check("wrong", truth + 1e-1, truth, bound=1e-5)
    case.time({name: lambda name=name: ran.append(name) for name in ("right", "wrong")}, baseline="right")
    assert set(ran) == {"right"}
    row = case.as_dict()["implementations"]["wrong"]
    assert row["min_s"] is None and row["ratio"] is None and "bound 1e-05" in row["wrong"]
    assert any("not timed  error 2.5e-02: relative error 2.5e-02" in line for line in case.table())


def test_errors_are_relative_and_a_nan_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == pytest.approx(0.25)
    assert relative_error(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])) == math.inf
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        relative_error(torch.ones(2), torch.ones(3))


def test_the_report_has_its_schema_and_stable_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments("about").parse_args(["--json", str(tmp_path / "report.json"), "--rounds", "2"])
    report = Report("sums", rounds=options.rounds)
    with report.case("sum/N5/fp32") as case:
        case.time({"a": lambda: sum(range(5)), "b": lambda: sum(range(50))}, baseline="a")
    with pytest.raises(ValueError, match="two cases have the id 'sum/N5/fp32'"), report.case("sum/N5/fp32"):
        pass
    assert report.finish(options) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["schema"] == 2 and written["benchmark"] == "sums"
    assert [case["id"] for case in written["cases"]] == ["sum/N5/fp32"]
    a, b = (written["cases"][0]["implementations"][name] for name in "ab")
    assert a["ratio"] == 1.0 and b["ratio"] == b["min_s"] / a["min_s"] and a["runs"] == 2
    printed = capsys.readouterr().out
    assert "sum/N5/fp32" in printed and f"torch {torch.__version__}" in printed


def test_results_replace_regular_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would block until somebody reads it, after hours of measuring: it is refused before, and stays."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    writers = {"moe": ("--json", "--plot", "--markdown"), "delta": ("--json", "--plot"), "numerics": ("--write",),
               "routing_numerics": ("--json", "--markdown")}  # fmt: skip
    for benchmark, options in writers.items():
        for option in options:
            for name, kind in (("pipe", "a pipe"), ("device", "a device")):
                with pytest.raises(SystemExit):
                    main([benchmark, option, str(tmp_path / name)])
                assert kind in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "device").is_symlink()
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    report = Report("sums")
    with report.case("sum/N5") as case:
        case.time({"sum": lambda: torch.ones(5).sum()}, baseline="sum")
    report.finish(argparse.Namespace(json=tmp_path / "link.json", plot=None))
    assert (tmp_path / "old.json").read_text() == "old"  # the link is replaced, not followed
    assert json.loads((tmp_path / "link.json").read_text())["benchmark"] == "sums"


def test_the_header_names_no_machine() -> None:
    assert platform.node() not in json.dumps(environment())
    assert {"processor", "cores", "threads", "torch", "python"} <= environment().keys()


def test_the_header_names_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels from PyPI call themselves 2.14.1, torch 2.14.1+cu130: what a measurement ran on is the second."""
    monkeypatch.setattr(metadata, "version", lambda package: "2.14.1")
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert environment()["torch"] == "2.14.1+cu130" and "torch 2.14.1+cu130 " in header(environment())


def test_weights_come_back_cold_and_touched() -> None:
    made: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        made.append(torch.ones(1024))
        return made[-1]

    following = rotating(make, nbytes=4096, cache=3 * 4096)
    assert len(made) == 4  # three fill the cache, the fourth pushes out the first
    assert [id(following()) for _ in range(5)] == [id(made[i]) for i in (0, 1, 2, 3, 0)]
    touch(made[0], made[1].bfloat16(), torch.ones(7, 3).t(), torch.tensor(1.0))


def test_a_plot_is_drawn_or_asks_for_its_extra(tmp_path: Path) -> None:
    report = {"benchmark": "sums", "environment": {"processor": "any"}, "cases": []}
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        with pytest.raises(ValueError, match=r"qwen35moe\[plot\]"):
            plot(report, tmp_path / "plot.png")
    else:
        report["cases"] = [{"id": "sum/N5", "implementations": {"a": {"ratio": 1.0}, "b": {"ratio": 0.5}}}]
        plot(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_breakdown_names_modules_and_operations() -> None:
    model, _ = qwen35moe.load("tiny")
    with torch.no_grad(), Breakdown(model, "ours") as breakdown:
        model(torch.tensor([[1, 2, 3]]))
    parts = breakdown.table(wall=60.0)
    assert {"gated_delta_rule", "experts", "router", "in_proj_qkv", "mlp (rest)", "rest"} <= parts.keys()
    assert sum(row["ms"] for name, row in parts.items() if name != "total") == pytest.approx(parts["total"]["ms"]) == 60e3
    before = breakdown.calls.copy()
    model(torch.tensor([[1, 2, 3]]))
    assert breakdown.calls == before  # hooks and wrappers are removed


def test_the_command_lists_benchmarks_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in (*suites(), *TOOLS)) and "imports" in suites() and "common" not in listed
    assert not {"results", "tools", "__main__"} & set(suites())
    assert main(["nothing"]) == 2
    assert "no benchmark 'nothing'; there are" in capsys.readouterr().err
