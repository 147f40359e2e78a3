"""A multimodal model on tensors that report a GPU: where the host waits for it, which implementations a Hopper would run, and
that every tensor is on the right device. Needs a CUDA build of torch, as in the leg `newest` of `make test-matrix`, and no GPU.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from tests.support import fake_gpu, fake_gpu_vision, pretend_gpu

pytest.importorskip("triton")
if torch.version.cuda is None or torch.cuda.is_available() or sys.platform != "linux":
    pytest.skip("needs a CUDA build of torch on a machine without a GPU", allow_module_level=True)

# docs/reference/synchronisations.md: how often the host waits in the files that place images; 0 where it is not named.
READS = {"grids_on_gpu": 1, "grids_of_both_on_gpu": 1, "generate_second_turn": 1}
NONE = (
    "text", "text_decode", "image", "images", "video", "triples", "features", "token_types", "with_and_without", "decode",
    "decode_static", "second_turn", "training",
)  # fmt: skip
ONE_SIZE = ("image", "video", "second_turn", "token_types", "grids_of_both_on_gpu")
CALLS = [name for name in fake_gpu_vision.SCENARIOS if not name.startswith("load")]
IMAGES = [name for name in CALLS if "text" not in name and "decode" not in name]


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    return pretend_gpu.reports("tests.support.fake_gpu_vision")


@pytest.mark.parametrize("scenario", CALLS)
def test_where_the_host_waits(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    result = report[scenario]
    assert result["failure"] is None and not result["mixed"]
    places = [re.sub(r"^values\.py:\d+ < ", "", read.split(" at ")[-1]) for read in result["reads"]]
    assert sum(place.startswith("vision") for place in places) == READS.get(scenario, 0), result["reads"]
    assert not (scenario in NONE and places)
    prefill = "decode" not in scenario
    assert bool(result["checks"]) == prefill, "counts are checked once, on the device"


@pytest.mark.parametrize("scenario", IMAGES)
def test_the_tower_runs_fused_attention(scenario: str, report: dict[str, dict[str, Any]]) -> None:
    """One launch per block: of SDPA where all frames have one size, else of varlen_attn. Neither has a mask, so that fused
    kernels take it (heads of 72 are a multiple of 8)."""
    result, depth = report[scenario], fake_gpu_vision.VISION["depth"]
    tower = [call for call in result["attention"] if call["query"][-1] == 72]
    launches = result["launches"].get("varlen_attn", 0)
    kinds = 2 if scenario in ("video", "grids_of_both_on_gpu") else 0 if scenario == "features" else 1
    assert len(tower) + launches == kinds * depth
    assert all(call["form"] == "none" and call["dtype"] == "torch.bfloat16" for call in tower)
    if kinds:
        assert result["chosen"]["vision_attention"] == (["torch"] if scenario in ONE_SIZE else ["varlen"])
        assert result["chosen"]["rotary"] == ["triton"]


LOADS = {"load": ["synchronize"], "load_fp8": ["copy from", "synchronize", "copy to"]}


@pytest.mark.parametrize(("scenario", "waits"), LOADS.items())
def test_loading_copies_through_pinned_buffers(scenario: str, waits: list[str], report: dict[str, dict[str, Any]]) -> None:
    """One synchronisation of the device; of block-FP8 one transfer of all scales, and of each batch's bounds, pinned too."""
    result = report[scenario]
    assert result["failure"] is None and not result["mixed"]
    assert len(result["reads"]) == len(waits) and all(map(str.startswith, result["reads"], waits)), result["reads"]
    assert len(result["copies"]) > 30 and all("transfer.py" in copy for copy in result["copies"])
    assert result["launches"].get("empty_cache", 0) == 1, "memory of the conversions is given back"


def test_the_published_tower_on_fake_tensors() -> None:
    """27 blocks and ten images of two sizes: torch's own varlen_attn accepts the call."""
    result = fake_gpu.reports("images")["images"]
    assert result["failure"] is None and result["elsewhere"] == {"_to_copy": 2}  # sizes and bounds of the images, to the GPU
    assert result["chosen"]["vision_attention"] == ["varlen"] and result["most"]["_varlen_attn"] == 27
    assert result["launches"] <= 850, result["most"]
