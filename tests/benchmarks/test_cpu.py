"""`decode`, `attention`, `cpu_targets`, `report`; the limits and the load that every suite measures. No timings are judged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, cpu_targets, decode
from benchmarks.__main__ import main
from benchmarks.decode import models
from benchmarks.moe.cases import Case as MoeCase
from benchmarks.moe.cases import rotation
from benchmarks.moe.packed import by_hand
from benchmarks.tools import limits, report
from benchmarks.tools.common import Case, Timing, relative_error, write_report
from benchmarks.tools.load import OtherLoad, sentence
from benchmarks.tools.machine import RESULTS, profile_name
from qwen35moe import Config, ops

TINY = {
    "vocab_size": 96, "hidden_size": 64, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48,
}  # fmt: skip


def tiny(preset: str, layers: int | None) -> Config:
    kinds = ("linear_attention", "full_attention")[: layers or 2]
    return Config.preset(preset).text_only().replace(**TINY, num_hidden_layers=len(kinds), layer_types=kinds)


# ------------------------------------------------------------------------------------------------------ limits and load


def test_the_limits_are_the_best_of_all_known_forms() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        measured = limits.measured("cpu", dtype)
        assert measured["read_gbps"] == max(measured["reads"].values()) == measured["reads"][measured["read_form"]] > 0
        assert measured["product_tflops"] == max(measured["products"].values())
        assert {"sum int64", "copy", "one row torch bf16", "one row torch fp32"} <= measured["reads"].keys()
        assert {f"torch {str(dtype)[6:]}", "torch float32"} <= measured["products"].keys()
        assert "limits: read" in limits.sentence(measured)


def test_of_two_measurements_the_better_counts() -> None:
    def of(read: float, product: float, busy: float) -> limits.Limits:
        row = {"reads": {"copy": read, "sum": read / 2}, "products": {"torch": product}, "copy_gbps": read}
        return {**row, "matmul_tflops": product, "load": {"other_cores": busy}}

    best = limits.better(of(10.0, 2.0, 0.9), of(12.0, 1.0, 0.1))
    assert (best["read_gbps"], best["read_form"], best["product_tflops"]) == (12.0, "copy", 2.0)
    assert best["load"]["other_cores"] == 0.1


def test_a_share_is_of_the_limit_that_is_nearer() -> None:
    limit = {"read_gbps": 20.0, "product_tflops": 0.1}
    few, many = limits.share(limit, 1.0, nbytes=10e9, flops=20e9), limits.share(limit, 1.0, nbytes=2e9, flops=80e9)
    assert few["of_limit"] == few["of_read"] == 0.5 and few["of_product"] == pytest.approx(0.2)
    assert many["of_limit"] == many["of_product"] == pytest.approx(0.8)
    assert "50% of read" in limits.share_text(few) and "80% of products" in limits.share_text(many)
    case = Case("x", timings={"a": Timing((1.0,))}, limits=limit, needed={"nbytes": 10e9, "flops": 20e9})
    assert case.as_dict()["implementations"]["a"]["of_read"] == 0.5 and "50% of read" in "".join(case.table())
    assert Case("x", timings={"a": Timing((1.0,))}).shares(1.0) == {}


def test_the_load_of_others_leaves_out_this_process() -> None:
    load = OtherLoad()
    torch.ones(1 << 18).sum()
    row = load.as_dict()
    assert not row or (row["other_cores"] >= 0 and row["seconds"] >= 0)
    assert "unknown" in sentence({})
    quiet = {"other_cores": 0.02, "stolen_cores": 0.0, "seconds": 3.0}
    assert sentence(quiet).startswith("quiet") and sentence({**quiet, "other_cores": 1.5}).startswith("NOT QUIET")


# --------------------------------------------------------------------------------------------------------------- decode


def test_decode_checks_answers_and_counts_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "configuration", tiny)
    path = tmp_path / "decode.json"
    words = ["--layers", "2", "--context", "5", "--batches", "1,3", "--prefill", "7", "--rounds", "1", "--dtype", "fp32,bf16"]
    assert main(["decode", *words, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    ids = [case["id"] for case in written["cases"]]
    assert ids[:3] == ["decode/moe-4.54b/L2/past5/B1/fp32", "decode/moe-4.54b/L2/past5/B3/fp32", "prefill/moe-4.54b/L2/T7/fp32"]
    for case in written["cases"]:
        rows = case["implementations"]
        assert {"transformers", "ours"} <= rows.keys() and all(row["wrong"] is None for row in rows.values())
        assert "experts" in case["facts"]["transformers_setting"] and rows["ours"]["of_limit"] > 0
        assert "ours packed" in rows or "ours packed" in case["refused"]
    one, three = (case["needed"]["nbytes"] for case in written["cases"][:2])
    assert one < three  # more experts are read
    assert written["cases"][0]["implementations"]["ours"]["ms_per_token"] > 0


def test_a_wrong_decode_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "configuration", tiny)
    model = models.build(tiny("moe-4.54b", 2), torch.float32)

    class Off(models.Ours):
        def step(self, ids: torch.Tensor, state: Any) -> torch.Tensor:
            return super().step(ids, state) * 1.01

    peers: dict[str, Any] = {"transformers": models.Theirs(model), "ours": models.Ours(model), "off": Off(model)}
    case = Case("x", rounds=1)
    routing = decode.check(case, peers, TINY["vocab_size"], "fp32", 3)
    assert routing is not None and routing.shape == (2, 3, decode.ANSWERED, 2)
    assert case.wrong.keys() == {"off"} and "bound 1e-04" in case.wrong["off"]
    assert model.lm_head.weight.data_ptr() == peers["transformers"].model.lm_head.weight.data_ptr()  # no second copy


def test_the_experts_that_a_step_reads() -> None:
    routing = torch.tensor([[[[0, 1], [2, 3]], [[0, 1], [3, 4]]]])  # one layer, two rows, two tokens
    assert decode.read_share(routing, 8, 2, 2) == 3 / 8
    assert decode.read_share(None, 8, 2, 1) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="moe-4.54b has 32 layers"):
        models.configuration("moe-4.54b", 33)


# ------------------------------------------------------------------------------------------------------------ attention


def test_attention_is_checked_against_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Config.preset
    monkeypatch.setattr(attention.Config, "preset", lambda name: preset(name).replace(head_dim=24, num_attention_heads=6,
                                                                                     num_key_value_heads=2))  # fmt: skip
    path = tmp_path / "attention.json"
    words = ["--heads", "35b-a3b", "--tokens", "70", "--dtype", "fp32,bf16", "--rounds", "1"]
    assert main(["attention", *words, "--json", str(path)]) == 0
    for case in json.loads(path.read_text())["cases"]:
        rows = case["implementations"]
        assert {"sdpa", "ours", "transformers eager"} <= rows.keys() and not any(row["wrong"] for row in rows.values())
        assert case["baseline"] == "sdpa" and case["needed"]["flops"] == 2 * 6 * 24 * 70 * 71
    query, key, value = attention.drawn(33, 6, 2, 24, torch.float64)
    rows = torch.tensor([0, 5, 32])
    expected = ops.attention.definition(query, key, value, scale=0.2)[:, rows]
    assert relative_error(attention.truth(query, key, value, 0.2, rows), expected) < 1e-12
    assert relative_error(attention.eager(query[:, rows], key, value, 0.2, rows), expected) < 1e-6  # its softmax is float32


# ------------------------------------------------------------------------------------------------------- experts, packed


def test_packed_experts_by_hand() -> None:
    hidden, gate_up, down, indices, weights = rotation(MoeCase("tiny", 9, dtype="fp32"), "cpu", 1)[0]()
    matrices = [[limits.pack(weight, 1) for weight in stack] for stack in (gate_up, down)]
    if matrices[0][0] is None:
        pytest.skip("this build of torch has no oneDNN")
    answer = by_hand(hidden, *matrices, indices, weights)  # type: ignore[arg-type]
    assert relative_error(answer, ops.experts.definition(hidden, gate_up, down, indices, weights)) < 1e-5
    assert limits.pack(gate_up[0].double(), 1) is None


# ----------------------------------------------------------------------------------------------- profiles and the report


def test_a_profile_names_the_file_and_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_name("sapphire-rapids-amx") == "sapphire-rapids-amx"
    monkeypatch.setattr("platform.node", lambda: "somebodys-box")
    for text in ("somebodys-box", "Zen 4", "../x", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            profile_name(text)
    monkeypatch.setattr("benchmarks.tools.common.RESULTS", tmp_path)
    write_report(argparse.Namespace(json=None, profile="zen4-avx2"), {"benchmark": "sums", "cases": []})
    written = json.loads((tmp_path / "zen4-avx2/sums.json").read_text())
    assert written == {"profile": "zen4-avx2", "benchmark": "sums", "cases": []}


def test_the_results_of_the_repository_have_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    reports = report.found(RESULTS)
    assert all(one["profile"] == name for name, suites in reports.items() for one in suites.values())
    assert not list(RESULTS.glob("*.json"))
    assert main(["report", "--profiles", "zen4-avx512", "delta"]) == 0
    assert "| layer/T2048/ordinary/bf16/forward | ours | 1.81x |" in capsys.readouterr().out
    assert main(["report", "--profiles", "abacus"]) == 2


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    """After new results: `python -m benchmarks report --write`."""
    reports = report.found(RESULTS)
    for name in report.PAGES:
        text = (report.ROOT / name).read_text(encoding="utf-8")
        assert report.rewritten(text, reports) == text, name


def test_the_report_shows_machines_side_by_side() -> None:
    def one(ratio: float, **more: Any) -> dict[str, Any]:
        rows = {"transformers a": {"min_s": 3.0 * ratio}, "transformers b": {"min_s": ratio}, "ours": {"min_s": 1.0, **more}}
        cases = [{"id": "x/N1", "implementations": rows}, {"id": "y", "implementations": {"ours": {"wrong": "error 1"}}}]
        return {"environment": {"processor": "any"}, "cases": cases, "load": {"other_cores": ratio / 10}}

    reports = {"first": {"moe": one(2.0, of_read=0.9, of_product=0.1)}, "second": {"moe": one(0.5)}}
    page = report.page(reports, ["moe"], ["first", "second"])
    assert "| x/N1 | ours | 2.00x (90% r) | 0.50x |" in page and "| y | ours | wrong answer | wrong answer |" in page
    assert "busy: others used 0.20 cores" in page and page.count("busy") == 1
    text = "before\n<!-- results: moe profile=first only=x -->\nold\n<!-- end of results -->\nafter"
    new = report.rewritten(text, reports)
    assert "old" not in new and "| x/N1 | ours | 2.00x (90% r) |" in new and "| y |" not in new and "second" not in new
    assert report.rewritten(new, reports) == new and new.startswith("before") and new.endswith("after")


# -------------------------------------------------------------------------------------------------------------- targets


def test_the_targets_read_the_reports_of_their_suites() -> None:
    fast = {"min_s": 1.0, "of_read": 0.85, "of_product": 0.1, "gb_per_s": 20.0}
    rows = {"transformers": {"min_s": 4.0}, "ours": fast, "ours packed": fast}
    ids = ["decode/moe-4.54b/L8/past32/B1/bf16", "decode/moe-4.54b/L8/past32/B4/bf16", "decode/moe-4.54b/L8/past32/B8/bf16",
           "prefill/moe-4.54b/L8/T512/bf16"]  # fmt: skip
    found = {"cases": [{"id": id, "baseline": "transformers", "implementations": rows} for id in ids]}
    options = cpu_targets.parser().parse_args([])
    lines = cpu_targets.table(cpu_targets.GROUPS[0], found, options)
    assert [line["verdict"] for line in lines] == ["reached"] * 6 and lines[0]["text"] == "4.00x" and lines[1]["text"] == "0.85"
    assert "| 4.54B, one cached token, plain | >= 1.8x | 4.00x | 85% r | reached |" in cpu_targets.page(lines)
    for case in found["cases"]:
        case["implementations"] = {"transformers": rows["transformers"], "ours": rows["transformers"]}
        case["refused"] = {"ours packed": "cannot pack"}
    lines = cpu_targets.table(cpu_targets.GROUPS[0], found, options)
    assert [line["verdict"] for line in lines[2:4]] == ["cannot pack"] * 2 and lines[0]["verdict"] == "missed"
    missing = cpu_targets.measured(cpu_targets.GROUPS[-1], options)
    assert missing == "needs --checkpoint DIR"
    assert {line["verdict"] for line in cpu_targets.table(cpu_targets.GROUPS[-1], missing, options)} == {missing}


def test_the_targets_name_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu_targets", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{group.name}: python -m benchmarks {group.suite} " in printed for group in cpu_targets.GROUPS)
    assert main(["cpu_targets", "--only", "nothing"]) == 2
