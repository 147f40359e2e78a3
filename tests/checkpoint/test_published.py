"""Tensors of published repositories, computed from the presets: exactly the published counts and bytes."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter

import pytest
import torch
from torch import Tensor

from qwen35moe.checkpoint import names, published
from qwen35moe.checkpoint.block_fp8 import dequantise
from qwen35moe.checkpoint.published import QWEN35, QWEN36, TRANSFORMERS, Layout, quantization_config, tensors
from qwen35moe.checkpoint.quantise import quantise
from qwen35moe.config import Config
from tests.support.floors import ROOT

# tensors, scales, bytes. Those of 122b-a10b FP8 and 35b-a3b FP8 are computed by the same rules, not published.
REPOSITORIES = {
    "Qwen3.5-35B-A3B": ("35b-a3b", QWEN35, 1_811, 0, 71_903_655_008),
    "Qwen3.5-9B": ("9b", QWEN35, 775, 0, 19_306_216_416),
    "Qwen3.6-35B-A3B": ("3.6-35b-a3b", QWEN36, 1_045, 0, 71_903_645_408),
    "Qwen3.8-2.4T-A95B": ("3.8-2.4t-a95b", QWEN36, 1_609, 0, 4_892_365_451_008),
    "Qwen3.5-397B-A17B-FP8": ("397b-a17b", QWEN35.quantised(), 189_042, 94_078, 406_125_181_280),
    "Qwen3.6-35B-A3B-FP8": ("3.6-35b-a3b", QWEN36.quantised(), 64_196, 31_745, 37_454_789_472),
    "Qwen3.5-35B-A3B-FP8": ("35b-a3b", QWEN35.quantised(), 64_196, 31_745, 37_454_799_072),
    "Qwen3.5-122B-A10B-FP8": ("122b-a10b", QWEN35.quantised(), 76_656, 37_939, 127_152_313_312),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_counts_and_bytes_at_full_size(name: str) -> None:
    preset, layout, count, scales, nbytes = REPOSITORIES[name]
    actual = list(tensors(Config.preset(preset), layout))
    assert len(actual) == len({tensor.name for tensor in actual}) == count
    assert sum(tensor.name.endswith("weight_scale_inv") for tensor in actual) == scales
    assert sum(tensor.dtype == "F8_E4M3" for tensor in actual) == scales
    assert sum(tensor.nbytes for tensor in actual) == nbytes
    assert all(names.canonical(tensor.name) for tensor in actual)


def test_dtypes_and_parts() -> None:
    dtypes = Counter(tensor.dtype for tensor in tensors(Config.preset("3.6-35b-a3b"), QWEN36.quantised()))
    assert dtypes == {"BF16": 32_451, "F8_E4M3": 31_745}
    wide = [t.name for t in tensors(Config.preset("35b-a3b")) if t.dtype == "F32"]
    assert len(wide) == 60 and all(name.endswith(("A_log", "linear_attn.norm.weight")) for name in wide)
    for preset, layout, mtp in (("35b-a3b", QWEN35, 17 + 3 * 256), ("3.6-35b-a3b", QWEN36, 19), ("27b", QWEN35, 15)):
        actual = [t.name for t in tensors(Config.preset(preset), layout)]
        assert sum(name.startswith("mtp.") for name in actual) == mtp
    for preset, visual in (("35b-a3b", 333), ("4b", 297), ("0.8b", 153)):
        actual = [t.name for t in tensors(Config.preset(preset))]
        assert sum(name.startswith("model.visual.") for name in actual) == visual


@pytest.mark.parametrize(
    ("preset", "count"), [("35b-a3b", 1026), ("122b-a10b", 1164), ("397b-a17b", 1371), ("27b", 1184), ("moe-4.54b", 851)]
)
def test_named_parameters_of_a_model(preset: str, count: int) -> None:
    assert sum(1 for _ in tensors(Config.preset(preset), Layout(mtp=False))) == count


def test_checkpoints_saved_by_transformers_have_single_experts_and_no_mtp() -> None:
    actual = {tensor.name for tensor in tensors(Config.preset("35b-a3b"), TRANSFORMERS)}
    assert not any(name.startswith("mtp.") or name.endswith("experts.down_proj") for name in actual)
    assert len(actual) == 1026 - 2 * 40 + 3 * 256 * 40


def test_the_list_of_unquantised_modules() -> None:
    """The published list of 27B has 259 entries; the list of 35B follows the same rule."""
    assert len(quantization_config(Config.preset("27b"), QWEN35.quantised())["modules_to_not_convert"]) == 259
    file = ROOT / "tests" / "data" / "configs" / "reconstructed--Qwen3.5-35B-A3B-FP8.json"
    expected = json.loads(file.read_text())["quantization_config"]
    actual = quantization_config(Config.preset("35b-a3b"), QWEN35.quantised())
    assert sorted(expected.pop("modules_to_not_convert")) == sorted(actual.pop("modules_to_not_convert"))
    assert actual == expected


def test_fp8_is_never_grouped() -> None:
    for layouts in ({"experts": "grouped"}, {"mtp_experts": "grouped"}):
        with pytest.raises(ValueError, match="per_expert, not grouped"):
            Layout(**({"experts": "per_expert", "mtp_experts": "per_expert", "fp8": True} | layouts))


# ----------------------------------------------------------------------------------------------------------- block-FP8


def value_of(byte: int) -> float:
    """float8_e4m3fn, from its definition: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def bfloat16_of(pair: bytes) -> float:
    return struct.unpack("<f", b"\0\0" + pair)[0]


def dequantised_from_bytes(values: bytes, scales: bytes, shape: tuple[int, int]) -> Tensor:
    """block_fp8.dequantise from the bytes of a file: each number from a table, times the scale of its block."""
    rows, columns = shape
    across = math.ceil(columns / 128)
    table = torch.tensor([value_of(byte) for byte in range(256)], dtype=torch.float64)
    factors = [bfloat16_of(scales[at : at + 2]) for at in range(0, len(scales), 2)]
    block = torch.tensor([[i // 128 * across + j // 128 for j in range(columns)] for i in range(rows)])
    return table[torch.tensor(list(values)).view(shape)] * torch.tensor(factors, dtype=torch.float64)[block]


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def test_all_numbers_of_eight_bits() -> None:
    actual = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.tensor([value_of(byte) for byte in range(256)])
    assert torch.equal(actual.nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("shape", [(3, 5), (128, 7), (129, 131), (40, 260)])
def test_dequantised_equals_an_independent_form(shape: tuple[int, int]) -> None:
    """Incomplete blocks with different scales. In float32 the product of numbers with 4 and 8 binary digits is exact."""
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[1])
    values, scale = quantise(weight)
    assert values.shape == shape and scale.shape == published.scale_shape(shape) and scale.dtype is torch.bfloat16
    expected = dequantised_from_bytes(raw(values), raw(scale), shape)
    assert torch.equal(dequantise(values, scale).double(), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantise(values, scale).to(dtype), expected.float().to(dtype))


@pytest.mark.parametrize("shape", [(3, 5), (257, 300)])
def test_quantisation_keeps_four_digits(shape: tuple[int, int]) -> None:
    """The error is at most half of the last of 4 binary digits, or half of 2^-9, the smallest number of a block up to 448."""
    weight = torch.randn(shape)
    weight[-1, -1] = 50.0
    actual = dequantise(*quantise(weight))
    largest = torch.full_like(weight, weight.abs().max().item())
    assert ((actual - weight).abs() <= torch.maximum(weight.abs() * 2.0**-4, largest / 448 * 2.0**-9)).all()
    again = dequantise(*quantise(actual))
    assert torch.equal(again[-1], actual[-1]) or ((again - actual).abs() <= actual.abs() * 2.0**-4).all()
    zero = quantise(torch.zeros(shape))
    assert torch.equal(dequantise(*zero), torch.zeros(shape)) and (zero[1] == 1).all()
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="no block-FP8 form"):
            quantise(torch.full(shape, wrong))
