"""generate() on fake CUDA tensors: nothing waits for the device, from the prefill to the last token, also after a row has
ended. Needs a CUDA build of torch and no GPU, as `test_fake_gpu`.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.support.fake_gpu import STEP, WITHOUT_GRADIENT, reports
from tests.support.fake_gpu_generation import SCENARIOS

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return reports(*SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_step_waits_for_the_device(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    result = report[scenario]
    assert result["failure"] is None, "a value was read on the host, or a call failed"
    assert result["chosen"] == WITHOUT_GRADIENT | STEP
    # The rows' lengths go back to the device, once after the last step.
    assert result["elsewhere"] == ({"_to_copy": 1} if "kept" in scenario else {})
