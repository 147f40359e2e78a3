"""Rotary embedding: frequencies, tables of three axes, the rotation; against complex numbers and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import ops
from qwen35moe.config import Config, ConfigError
from qwen35moe.ops.mrope import rotary_tables
from qwen35moe.ops.precision import float64_device
from qwen35moe.ops.rope import inverse_frequencies
from qwen35moe.ops.vision_grid import rotation
from tests.support.peer import Case, assert_close, generator, odd_shape

rotary = ops.rotary.definition

YARN_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "betas": {"beta_fast": 16.0, "beta_slow": 2.0},
    "attention_factor": {"attention_factor": 1.3},
    "mscale": {"mscale": 0.8, "mscale_all_dim": 0.5},
    "not truncated": {"truncate": False},
}


def case_with(rope: dict[str, Any], **text: Any) -> Case:
    base = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    return odd_shape(3, head_dim=32, max_position_embeddings=4096, rope_parameters=base | rope, **text)


def frequencies(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    text = Config.from_dict(dict(case.text)).text_config
    return inverse_frequencies(text.rope, text.rotary_dim, text.max_position_embeddings, dtype=dtype)


def their_rotary(case: Case) -> Any:
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    text = {key: dict(value) if isinstance(value, dict) else value for key, value in case.text.items()}
    return Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(**text))


@pytest.mark.parametrize("options", YARN_OPTIONS.values(), ids=YARN_OPTIONS.keys())
@pytest.mark.parametrize("original", [64, 1024])
def test_yarn_frequencies_and_scaling_equal_those_of_transformers(options, original):
    case = case_with({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original} | options)
    inv_freq, scale = frequencies(case)
    module = their_rotary(case)
    assert_close(inv_freq, module.inv_freq, 1e-6)
    assert scale == pytest.approx(module.attention_scaling, rel=1e-7)


def test_default_frequencies_are_powers_of_theta():
    inv_freq, scale = frequencies(case_with({"rope_type": "default"}), torch.float64)
    expected = torch.tensor([10_000.0 ** (-2 * j / 16) for j in range(8)], dtype=torch.float64)
    assert scale == 1.0 and inv_freq.dtype == torch.float64
    assert_close(inv_freq, expected, 1e-14)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3", "made_up"])
def test_an_unsupported_rope_type_is_an_error_that_names_it(kind):
    with pytest.raises(ConfigError, match=kind):
        frequencies(case_with({"rope_type": kind, "factor": 2.0}))


@pytest.mark.parametrize("section", [[3, 3, 2], [11, 11, 10], [8, 0, 0], [1, 1, 1], [0, 4, 4]])
def test_tables_with_three_different_positions(section):
    """The axis of every frequency by the definition, and the tables of transformers for the same positions."""
    case = case_with({"rope_type": "default", "mrope_section": section})
    inv_freq, scale = frequencies(case)
    position_ids = torch.randint(0, 500, (3, 2, 5), generator=generator(0))
    cos, sin = rotary_tables(position_ids, inv_freq, section, scale)

    axis = [0] * 8
    for number in (1, 2):
        for j in range(number, 3 * section[number], 3):
            if j < 8:
                axis[j] = number
    for j in range(8):
        angle = position_ids[axis[j]].float() * inv_freq[j]
        assert_close(cos[..., j], angle.cos(), 1e-6)
        assert_close(sin[..., j], angle.sin(), 1e-6)

    their_cos, their_sin = their_rotary(case)(torch.zeros(1), position_ids)
    assert_close(cos, their_cos[..., :8], 1e-6)
    assert_close(sin, their_sin[..., :8], 1e-6)


def test_the_rotation_is_a_complex_multiplication_of_the_rotated_part():
    query, key = torch.randn(2, 5, 6, 16, generator=generator(0)), torch.randn(2, 5, 3, 16, generator=generator(1))
    query, key = query.double(), key.double()
    angle = torch.rand(2, 5, 4, generator=generator(2), dtype=torch.float64) * 6.28
    for out, x in zip(rotary(query, key, angle.cos(), angle.sin()), (query, key), strict=True):
        rotated = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        assert_close(out, torch.cat([rotated.real, rotated.imag, x[..., 8:]], dim=-1), 1e-14)
        assert torch.equal(out[..., 8:], x[..., 8:])


def test_scores_depend_on_the_distance_only():
    inv_freq, scale = frequencies(case_with({"rope_type": "default"}), torch.float64)
    query, key = torch.randn(1, 2, 1, 32, generator=generator(0)).double(), torch.randn(1, 2, 1, 32).double()

    def score(first: int, second: int) -> Tensor:
        position_ids = torch.tensor([[first, second]]).expand(3, 1, 2)
        q, k = rotary(query, key, *rotary_tables(position_ids, inv_freq, [3, 3, 2], scale))
        return (q[0, 1, 0] * k[0, 0, 0]).sum()

    assert score(3, 17).item() == pytest.approx(score(1000, 1014).item(), rel=1e-11)
    assert score(3, 17).item() != pytest.approx(score(3, 18).item(), rel=1e-3)


def test_gradcheck():
    query = torch.randn(1, 2, 3, 8, generator=generator(0), dtype=torch.float64).requires_grad_()
    key = torch.randn(1, 2, 1, 8, generator=generator(1), dtype=torch.float64).requires_grad_()
    angle = torch.rand(1, 2, 3, generator=generator(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, angle.cos(), angle.sin()), (query, key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_output_keeps_the_dtype_and_bfloat16_is_rounded_once(dtype):
    query, key = torch.randn(2, 3, 4, 16).to(dtype), torch.randn(2, 3, 2, 16).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    angle = torch.rand(2, 3, 5, dtype=wide)
    for out, x in zip(rotary(query, key, angle.cos(), angle.sin()), (query, key), strict=True):
        assert out.dtype == dtype
        expected = rotary(x.to(wide), x.to(wide), angle.cos(), angle.sin())[0].to(dtype)
        assert torch.equal(out, expected)


def test_tables_at_far_positions_are_as_exact_as_float32_allows():
    """The angle at position 200,000 has 18 bits before the binary point: float32 resolves 1e-2, bfloat16 nothing."""
    case = case_with({"rope_type": "default", "rope_theta": 1e7})
    position_ids = torch.tensor([[200_000, 262_143]]).expand(3, 1, 2)
    exact = rotary_tables(position_ids, frequencies(case, torch.float64)[0], [3, 3, 2], 1.0)
    tables = rotary_tables(position_ids, frequencies(case)[0], [3, 3, 2], 1.0)
    assert max((a - b).abs().max().item() for a, b in zip(tables, exact, strict=True)) < 3e-2
    assert tables[0].dtype == torch.float32


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_float32_tables_are_correctly_rounded_at_every_position(rope, integers):
    """Against cos and sin of Python's float64, for three different positions up to the published context."""
    inv_freq, scale = frequencies(case_with(rope | {"rope_theta": 1e7}), torch.float64)
    position_ids = torch.tensor([[[0, 999, 262_143]], [[1, 100_000, 262_080]], [[7, 200_003, 17]]], dtype=integers)
    tables = rotary_tables(position_ids, inv_freq, [3, 3, 2], scale, torch.float32)
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        assert table.dtype == torch.float32
        for j, frequency in enumerate(inv_freq.tolist()):
            positions = position_ids[j % 3, 0].tolist()
            expected = torch.tensor([function(p * frequency) * scale for p in positions], dtype=torch.float64)
            assert (table[0, :, j].double() - expected).abs().max() <= 6.1e-8 * scale  # half a unit in the last place of 1


def test_vision_tables_are_correctly_rounded():
    coordinates = torch.tensor([[0, 3, 799], [5, 4095, 1]], dtype=torch.int32)
    cos, sin = rotation(coordinates, 16, torch.float32)
    exact = rotation(coordinates, 16, torch.float64)
    for table, expected in zip((cos, sin), exact, strict=True):
        assert table.dtype == torch.float32 and torch.equal(table, expected.float())
    for patch, (row, column) in enumerate(coordinates.T.tolist()):
        angles = [position * 10_000.0 ** (-2 * j / 8) for position in (row, column) for j in range(4)]
        assert exact[0][0, patch].tolist() == pytest.approx([math.cos(x) for x in angles], abs=1e-12)


def test_a_device_without_float64_gets_tables_from_the_cpu():
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda:1")) == torch.device("cuda:1")
