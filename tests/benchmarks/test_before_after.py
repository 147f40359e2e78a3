"""`python -m benchmarks before_after` at tiny sizes, this checkout against itself. No timings are judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import before_after
from benchmarks.before_after.scenarios import GROUPS, Group

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48,
}  # fmt: skip
QUICK = ["--before", str(before_after.ROOT), "--dtype", "fp32", "--rounds", "1", "--warmup", "0"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, group in GROUPS.items():
        monkeypatch.setitem(GROUPS, name, Group(group.preset, group.changes | TINY, group.scenarios))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_scenario_has_equal_answers_and_times(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert before_after.main([*QUICK, "--deterministic", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    scenarios = [scenario for group in GROUPS.values() for scenario in group.scenarios]
    assert [case["id"] for case in report["cases"]] == [f"{scenario.id}/fp32" for scenario in scenarios]
    for case, scenario in zip(report["cases"], scenarios, strict=True):
        assert case["baseline"] == "before" and case["facts"]["bits_equal"] and case["facts"]["weight_bytes"] > 0
        assert case["implementations"].keys() == {"before", "after"}
        assert all(row["runs"] == scenario.runs for row in case["implementations"].values())
    assert report["limits"]["fp32"]["read_gbps"] > 0
    assert report["load"].keys() <= {"other_cores", "stolen_cores", "seconds", "load_average"}
    assert report["commits"]["before"] == report["commits"]["after"]
    assert str(before_after.ROOT) not in path.read_text()


@pytest.mark.usefixtures("tiny")
def test_a_different_answer_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = torch.load

    def off(file: Path) -> torch.Tensor:
        answer = load(file)
        return answer * 1.01 if file.stem == "after" else answer

    monkeypatch.setattr(before_after.torch, "load", off)
    path = tmp_path / "report.json"
    assert before_after.main([*QUICK, "--only", "moe/block/N1", "--json", str(path)]) == 1
    (case,) = json.loads(path.read_text())["cases"]
    after = case["implementations"]["after"]
    assert "bound 1e-05" in after["wrong"] and after["min_s"] is None
    assert not case["facts"]["bits_equal"]


def test_calls_of_one_decoded_layer_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert before_after.main(["--calls", "--json", str(path)]) == 0
    files = json.loads(path.read_text())["calls"]["after"]
    assert files["qwen35moe/modules/gated_deltanet.py"] >= 1 and files["qwen35moe/modules/moe.py"] >= 1
    assert f"after: {sum(files.values())} calls in {len(files)} files" in capsys.readouterr().out


def test_arguments_that_name_nothing_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        ([], "--before names the checkout"),
        (["--before", str(tmp_path)], "is no checkout of the library"),
        (["--before", str(before_after.ROOT), "--only", "vision"], "there are text/prefill/T512"),
    ):
        with pytest.raises(SystemExit):
            before_after.main(arguments)
        assert message in capsys.readouterr().err
