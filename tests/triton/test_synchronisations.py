"""How often the host waits for a GPU, in every situation of docs/reference/synchronisations.md, whose numbers are the bounds.

Needs a CUDA build of torch, as in the leg `newest` of `make test-matrix`, and no GPU; see tests/support/pretend_gpu.py.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from tests.support.pretend_gpu import ROOT, reports
from tests.support.text_scenarios import SCENARIOS, VALUES, WRONG

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)

# The rows of the table, by their first words, and their scenarios, by a pattern.
SITUATIONS = {
    "prefill, with or without": r"prefill.*|second turn|second turn, static|base model|one layer|embeddings|logits_to_keep"
    r"|routing|attentions",
    "decode, growing": r"decode|decode, static|decode, (left.*|record.*|SDPA)",
    "decode with an": r"decode, (ones.*|right|ended.*|positions)",
    "prefill with `attention_mask`": r".*on the host.*",
    "prefill with an `attention_mask`": r"mask .*|second turn, .*",
    "prefill with `position_ids`": r"positions|three axes",
    "packed documents": r"packed.*",
    "training: forward": r"training.*",
    "training: packed by": r"training, packed",
    "`routing=` with": r"replayed routing",
    "`rollback`": r"rollback.*|draft.*",
    "`reorder`": r"reorder.*|restore.*|snapshot|clone",
}
COUNTED = [name for name in SCENARIOS if name not in VALUES and not name.startswith("wrong")]
ON_HOST = re.compile(SITUATIONS["prefill with `attention_mask`"])
SEQUENCE = {"attention", "experts", "gated_delta_rule", "gated_rms_norm", "rms_norm", "router", "short_convolution"}


def situation(scenario: str) -> str:
    """The row of a scenario: "on the host" first, then the longest pattern that fits."""
    if ON_HOST.fullmatch(scenario) and not scenario.startswith("training"):
        return "prefill with `attention_mask`"
    if scenario == "training, packed":
        return "training: packed by"
    return next(row for row, pattern in SITUATIONS.items() if re.fullmatch(pattern, scenario))


def documented() -> dict[str, int]:
    """Reads per call, by the first words of the rows of the table."""
    text = (ROOT / "docs/reference/synchronisations.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (\d+) \|", text, re.M)
    return {row: next(int(n) for words, n in rows if words.startswith(row)) for row in SITUATIONS}


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return reports("tests.support.text_scenarios")


def test_the_table_names_every_situation() -> None:
    assert set(documented()) == {situation(scenario) for scenario in COUNTED}


@pytest.mark.parametrize("scenario", COUNTED)
def test_the_host_waits_as_often_as_documented(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    result = report[scenario]
    assert result["failure"] is None and not result["mixed"]
    assert len(result["reads"]) == documented()[situation(scenario)], result["reads"]


@pytest.mark.parametrize("scenario", ["prefill", "mask left", "packed", "packed by positions", "second turn, left", "training"])
def test_a_sequence_runs_the_kernels(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    chosen = report[scenario]["chosen"]
    assert set(chosen) >= SEQUENCE
    assert all(names == (["torch"] if operation == "attention" else ["triton"]) for operation, names in chosen.items()), chosen


@pytest.mark.parametrize("scenario", ["decode", "decode, static", "decode, left", "decode, ended", "decode, ended, static"])
def test_a_step_is_fused_where_rows_have_ended_too(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    chosen = report[scenario]["chosen"]
    assert chosen["delta_net_step"] == ["triton"] and "gated_delta_rule" not in chosen


def test_a_mask_never_meets_grouped_heads(report: dict[str, dict[str, Any]]) -> None:
    """torch would materialise the scores; and the rows of a mask begin at multiples of 8 elements."""
    calls = [(name, call) for name in COUNTED for call in report[name]["attention"]]
    masked = [(name, call) for name, call in calls if call["form"] == "mask"]
    assert {"decode, left, SDPA", "decode, ended, SDPA", "second turn, left", "second turn, right, static"} <= set(dict(masked))
    for name, call in masked:
        assert not call["gqa"] and call["query"][1] == call["key"][1], name
        assert call["strides"][-1] == 1 and not any(stride % 8 for stride in call["strides"][:-1]), (name, call)
        assert call["dtype"] == call["mask_dtype"], name
    assert report["second turn"]["attention"][0]["form"] == "flash"  # grouped heads, no mask
    assert {call["form"] for call in report["decode, SDPA"]["attention"]} == {"none"}
    assert {call["query"][1] for _, call in calls if call["query"][2] == 2} == {2}  # one token: query heads as positions


@pytest.mark.parametrize("scenario", VALUES)
def test_the_values_are_those_of_a_cpu(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    """Logits, keys, values and states of a conversation with padding, ended rows, rollback, reorder and restore, in float64."""
    result = report[scenario]
    assert result["failure"] is None and result["value"] <= 1e-12
    assert ("delta_net_step" in result["chosen"]) == (scenario != "conversation, recorded")  # else the fused step is not tried


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_raise(name: str, report: dict[str, dict[str, Any]]) -> None:
    """A step asserts them on the device; where the host has the values, the error is that of a CPU."""
    assert (report[f"wrong: {name}"]["failure"] or "").startswith(WRONG[name][1])
