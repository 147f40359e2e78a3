"""The CPU forms of the operations against their definitions in float64; they do not modify their inputs.

The inputs and the relative bounds of the delta rule are those of `tests.support.delta_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends, ops
from qwen35moe.ops.cpu import delta_chunks
from qwen35moe.ops.cpu.convolution import short_convolution_cpu
from qwen35moe.ops.cpu.decode_step import delta_net_step_cpu
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule_cpu
from qwen35moe.ops.cpu.norm import gated_rms_norm_cpu, rms_norm_cpu
from qwen35moe.ops.cpu.rope import rotary_cpu
from tests.support import peer
from tests.support.delta_rule import BETAS, CUTS, EXACT, FP32, GATES, recurrent_gated_delta_rule
from tests.support.peer import FULL, LINEAR, odd_shape, randn

direct_short_convolution = ops.short_convolution.definition


def compare(form: Callable[..., Any], definition: Callable[..., Any], args: tuple, options: dict, bound: float) -> None:
    """Assert that the form agrees with the definition in float64 and leaves its arguments unchanged."""
    tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    copies = [x.clone() for x in tensors]
    actual = form(*args, **options)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True)), "an input was modified"
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in (*args, *options.values())]
    expected = definition(*wide[: len(args)], **dict(zip(options, wide[len(args) :], strict=True)))
    for ours, true in zip(_tuple(actual), _tuple(expected), strict=True):
        assert ours.shape == true.shape
        if not true.numel():
            continue
        # `floored_exp` sets decays below e^-80 (e^-30 in float32) to zero.
        floor = 10 * math.exp(-80 if args[0].dtype == torch.float64 else -30) if "decay" in options else 0.0
        assert (ours.double() - true).abs().max() <= bound * true.abs().max() + floor


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, EXACT), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 7, 24), (3, 300, 2, 640)], ids=str)
def test_norms(shape, dtype, bound):
    x, gate = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    weight = randn(shape[-1], seed=2, dtype=torch.promote_types(dtype, torch.float32))
    compare(rms_norm_cpu, ops.rms_norm.definition, (x, weight), {"eps": 1e-6}, bound)
    compare(gated_rms_norm_cpu, ops.gated_rms_norm.definition, (x, gate, weight), {"eps": 1e-6}, bound)
    assert rms_norm_cpu(x, weight, eps=1e-6).dtype == dtype


@pytest.mark.parametrize("dtype,bound", [(torch.float64, EXACT), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("tokens", CUTS)
def test_rotary(tokens, dtype, bound, monkeypatch):
    monkeypatch.setattr("qwen35moe.ops.cpu.rope._BLOCK", 2 * 16 * 5 * 8)  # blocks of 16 tokens
    query, key = randn(2, tokens, 5, 12, dtype=dtype), randn(2, tokens, 3, 12, seed=1, dtype=dtype)
    table = torch.promote_types(torch.float32, dtype)
    angle = 6 * randn(1, tokens, 4, seed=2)
    compare(rotary_cpu, ops.rotary.definition, (query, key, angle.cos().to(table), angle.sin().to(table)), {}, bound)
    turned, _ = rotary_cpu(query, key, angle.cos().to(table), angle.sin().to(table))
    assert turned.transpose(1, 2).is_contiguous() and turned.dtype == dtype


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", CUTS)
def test_convolution(tokens, taps, monkeypatch):
    monkeypatch.setattr("qwen35moe.ops.cpu.convolution._BLOCK_BYTES", 3 * 10 * 4 * 16)  # blocks of 16 tokens
    x, weight, state = randn(3, tokens, 10), randn(10, taps, seed=1), randn(3, 10, taps - 1, seed=2)
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, 1e-6)):
        args = (x.to(dtype), weight.to(dtype))
        compare(short_convolution_cpu, direct_short_convolution, args, {}, bound)
        compare(short_convolution_cpu, direct_short_convolution, args, {"state": state.to(dtype)}, bound)
    lengths = torch.tensor([tokens, max(0, tokens - 2), min(tokens, 1)])
    y, after = short_convolution_cpu(x, weight, state=state, lengths=lengths)
    expected, expected_after = direct_short_convolution(x, weight, state=state, lengths=lengths)
    assert torch.equal(after, expected_after)
    for row, length in enumerate(lengths.tolist()):
        assert length == 0 or torch.allclose(y[row, :length], expected[row, :length], rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_delta_rule_at_every_gate(gate, beta):
    rng = torch.Generator().manual_seed(3)
    shape = (2, 130, 6)
    options = {"decay": gate(shape, rng), "beta": beta(shape, rng), "state": randn(2, 6, 5, 7, seed=4)}
    args = randn(2, 130, 3, 5), randn(2, 130, 3, 5, seed=1), randn(2, 130, 6, 7, seed=2)
    compare(chunked_gated_delta_rule_cpu, recurrent_gated_delta_rule, args, options, 1e-11)
    single = {name: tensor.float() for name, tensor in options.items()}
    compare(chunked_gated_delta_rule_cpu, recurrent_gated_delta_rule, tuple(x.float() for x in args), single, FP32)


@pytest.mark.parametrize("tokens", [*CUTS, 600])
def test_delta_rule_at_every_length_and_without_a_state(tokens, monkeypatch):
    monkeypatch.setitem(delta_chunks._BLOCK_BYTES, "cpu", 1)  # blocks of four chunks
    decay, beta = -randn(2, tokens, 6).exp() * 0.1, randn(2, tokens, 6, seed=5).sigmoid()
    mixed = randn(2, tokens, 3 * 5 * 2 + 6 * 7, seed=1)  # views of one tensor, as in the layer
    query, key, value = mixed.split([15, 15, 42], dim=-1)
    args = query.unflatten(-1, (3, 5)), key.unflatten(-1, (3, 5)), value.unflatten(-1, (6, 7))
    for keys in (args[1], torch.zeros_like(args[1]), args[1][:, :1].expand_as(args[1])):
        options = {"decay": decay, "beta": beta}
        compare(chunked_gated_delta_rule_cpu, recurrent_gated_delta_rule, (args[0], keys, args[2]), options, 1e-11)


@pytest.mark.parametrize("gates", ["ordinary", "transformers", "hard"])
@pytest.mark.parametrize("batch,groups,heads,taps", [(3, 2, 6, 4), (1, 5, 5, 2)])
def test_decode_step(batch, groups, heads, taps, gates):
    """Also with queries and keys of zero, and with the transposed conv_state that a prefill returns."""
    width, out = 8, 12
    channels = 2 * groups * width + heads * out
    A_log, dt_bias = (x.double() for x in peer._gates(torch.Size([heads]), peer.generator(5), gates))
    args = [randn(batch, channels), randn(batch, heads, out, seed=1), randn(batch, heads, seed=2), randn(batch, heads, seed=3)]
    floats = {
        "conv_state": randn(batch, taps - 1, channels, seed=4).mT, "recurrent_state": randn(batch, heads, width, out, seed=5),
        "conv_weight": randn(channels, taps, seed=6), "A_log": A_log, "dt_bias": dt_bias, "norm_weight": randn(out, seed=7),
    }
    zero_qk = args[0].clone()
    zero_qk[:, : 2 * groups * width] = 0
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, 4e-6), (torch.bfloat16, 8e-3)):
        wide = torch.promote_types(torch.float32, dtype)
        not_widened = {"conv_state", "conv_weight"}
        options: dict[str, Any] = {name: x.to(dtype if name in not_widened else wide) for name, x in floats.items()}
        options |= {"groups": groups, "eps": 1e-6}
        for qkv in (args[0], zero_qk):
            inputs = tuple(x.to(dtype) for x in (qkv, *args[1:]))
            compare(delta_net_step_cpu, ops.delta_net_step.definition, inputs, options, bound)
            outputs = delta_net_step_cpu(*inputs, **options)
            assert [x.dtype for x in outputs] == [dtype, dtype, wide]


@torch.no_grad()
def test_a_model_decodes_with_the_fused_step_and_leaves_snapshots_unchanged():
    case = odd_shape(7, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3)
    model = peer.ours(case)
    peer.draw(model, 0)
    ids = case.ids(2, 8)
    for max_length in (None, 9):
        cache = model.new_cache(2, max_length)
        model(ids[:, :6], cache=cache)
        snapshot = cache.snapshot()
        with backends.ran() as ran:
            fused = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in (6, 7)], dim=1)
        assert ran.counts["delta_net_step", "fused_cpu"] == 4 and "gated_delta_rule" not in {c.operation for c in ran.calls}
        cache.restore(snapshot)
        with backends.use(delta_net_step="torch"), backends.ran() as ran:
            composed = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in (6, 7)], dim=1)
        assert ran.counts["gated_delta_rule", "chunked_cpu"] == 4 and "delta_net_step" not in {c.operation for c in ran.calls}
        assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()


def test_the_form_of_rms_norm_runs_without_gradients_only():
    weight = nn.Parameter(torch.zeros(24))
    with backends.ran() as ran:
        backends.run("rms_norm", randn(2, 24, dtype=torch.float32), weight, eps=1e-6)
        with torch.no_grad():
            backends.run("rms_norm", randn(2, 24, dtype=torch.float32), weight, eps=1e-6)
    assert [call.name for call in ran.calls] == ["torch", "cpu"]


@pytest.mark.parametrize("shape", [(1, 1, 2560), (7,), (1, 3, 0)], ids=str)
def test_rms_norm_of_one_token(shape):
    """Also of zeros, infinities and NaN, with and without epsilon, and with a weight in a wider dtype."""
    x, weight = randn(*shape), randn(shape[-1], seed=1)
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        compare(rms_norm_cpu, ops.rms_norm.definition, (x.to(dtype), weight.float()), {"eps": 1e-6}, bound)
        for row in (torch.zeros_like(x), torch.full_like(x, math.inf), torch.full_like(x, math.nan)):
            for eps in (0.0, 1e-6):
                actual = rms_norm_cpu(row.to(dtype), weight.to(dtype), eps=eps)
                expected = ops.rms_norm.definition(row.to(dtype), weight.to(dtype), eps=eps)
                assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())
