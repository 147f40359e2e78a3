"""How often the host waits for a GPU in one call of generate(), on tensors that pretend to be on one: never for a token.

Needs a CUDA build of torch and no GPU, as `test_fake_gpu`.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.support.generation_scenarios import SCENARIOS, STEPS
from tests.support.pretend_gpu import reports

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)

# At the call, before anything runs: the ids of a prompt are checked, and the text of a cache is compared with it.
READS = {
    "tensors on the GPU": 1, "tensors on the GPU with a mask": 1, "a cache that holds a part": 1,
    "a cache that holds rows of different lengths": 1, "a criterion that reads": STEPS,
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return reports("tests.support.generation_scenarios", *SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_host_waits_for_no_token(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    result = report[scenario]
    assert result["failure"] is None and not result["mixed"]
    assert len(result["reads"]) == READS.get(scenario, 0), result["reads"]
