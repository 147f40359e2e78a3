"""A model on fake CUDA tensors: which implementations a Hopper GPU would run, that nothing waits for the device, and the
launches of a decoded token. Needs a CUDA build of torch, as in the leg `newest` of `make test-matrix`, and no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.support.fake_gpu import SEQUENCE, STEP, WITHOUT_GRADIENT, reports

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)

CHOSEN = {
    "prefill": WITHOUT_GRADIENT, "masked": WITHOUT_GRADIENT,
    "training": SEQUENCE | {"linear_cross_entropy": ["torch"]},
    "decode": STEP, "decode_static": STEP, "decode_35b": STEP,
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return reports(*CHOSEN)


@pytest.mark.parametrize("scenario", CHOSEN)
def test_nothing_waits_and_the_kernels_are_chosen(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    result = report[scenario]
    assert result["failure"] is None, "a value was read on the host, or a call failed"
    assert result["chosen"] == CHOSEN[scenario] and not result["elsewhere"]


def test_the_launches_of_a_decoded_token_of_the_35b_model(report: dict[str, dict[str, Any]]) -> None:
    """40 layers, 30 of them Gated DeltaNet. One for each layer: projections, norm, sum and norm, router, its choice, experts up
    and down, SwiGLU, shared down projection, output projection, sum of the block (440). Step of the delta rule 30; norm and
    rotation, gate 20; attention, in SDPA's composed form, 100; copies of keys and values 20, of states 60; once 20."""
    result = report["decode_35b"]
    assert result["launches"] <= 690, result["most"]
