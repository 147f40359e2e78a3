"""A decode step of fixed shape on fake CUDA tensors: what a Hopper GPU would run, that nothing waits for the device, and that
two steps run the same operations with the same arguments. Needs a CUDA build of torch, as `test_fake_gpu.py` does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.support.fake_gpu import STEP, reports

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)

CHOSEN = {name: chosen for name, chosen in STEP.items() if name != "attention"}
SCENARIOS = ("static_step_35b", "equal_steps", "captured", "captured_sampled")


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return reports(*SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_waits_and_the_kernels_are_chosen(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    """In equal_steps the scenario itself compares the two steps."""
    result = report[scenario]
    assert result["failure"] is None, "a value was read on the host, the steps differ, or a call failed"
    chosen = result["chosen"]
    assert all(chosen[name] == expected for name, expected in CHOSEN.items()) and not result["elsewhere"]
    assert "triton" in chosen["attention"]  # of the prefill another one


def test_the_states_are_written_in_place(report: dict[str, dict[str, Any]]) -> None:
    """No copies: one `where` for each DeltaNet layer (conv_state), two index_put_ for each attention layer, one for the ids."""
    result = report["static_step_35b"]
    most = result["most"]
    assert most.get("copy_", 0) == 0 and most["where"] == 30 and most["index_put_"] == 2 * 10 + 1
    assert result["launches"] <= 580, most
