"""The delta rule as an attention map: outputs are map @ value plus the contribution of the initial state.

The reference is the recurrence in float64. EXACT allows for rounding alone: 1e-14 of the largest value.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwen35moe import Config, Qwen3_5MoeForCausalLM, taps
from qwen35moe.ops.attention_map import attention_map, state_map
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule
from tests.support.delta_rule import (
    CUTS,
    FP32,
    GATES,
    HARD_GATE,
    KEYS,
    call,
    count_subnormals,
    inputs,
    recurrent_gated_delta_rule,
)
from tests.support.peer import assert_close, generator

EXACT = 1e-14


def map_and_shares(values: dict[str, Tensor], **options: Tensor | None) -> tuple[Tensor, Tensor]:
    """The map [B, H, T, T] and the share [B, H, T, K] of every token in the final state."""
    gates = {"decay": values["decay"], "beta": values["beta"], **options}
    return attention_map(values["query"], values["key"], **gates), state_map(values["key"], **gates)


def reference(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Map and shares by the recurrence: the output and the state of the rule whose value j is the j-th unit vector."""
    batch, tokens, heads = values["decay"].shape
    basis = torch.eye(tokens, dtype=values["decay"].dtype)[None, :, None].expand(batch, tokens, heads, tokens)
    identity = {name: tensor for name, tensor in values.items() if name != "state"} | {"value": basis}
    out, state = call(recurrent_gated_delta_rule, identity)
    return out.transpose(1, 2), state.mT


def from_the_map(values: dict[str, Tensor], **options: Tensor) -> tuple[Tensor, Tensor]:
    """Output and state from the map, the shares, and the contribution of the initial state (the rule with values of zero)."""
    a, p = map_and_shares(values, **options)
    out, state = call(recurrent_gated_delta_rule, values | {"value": torch.zeros_like(values["value"])}, **options)
    out = out + torch.einsum("bhij,bjhv->bihv", a, values["value"])
    return out, state + torch.einsum("bhjk,bjhv->bhkv", p, values["value"])


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", ["ordinary", "any", "none"])
def test_the_map_is_the_output_for_the_identity(gates: str, keys: str) -> None:
    values = inputs(37, gates=gates, keys=keys, dtype=torch.float64)
    a, p = map_and_shares(values)
    true_a, true_p = reference(values)
    assert (a.triu(1) == 0).all()
    assert_close(a, true_a, EXACT)
    if keys != "zero":
        assert_close(p, true_p, EXACT)
    else:
        assert (p == 0).all() and (true_p == 0).all()


@pytest.mark.parametrize("length", CUTS)
def test_outputs_and_states_from_the_map(length: int) -> None:
    values = inputs(length, dtype=torch.float64, seed=length)
    for actual, expected in zip(from_the_map(values), call(recurrent_gated_delta_rule, values), strict=True):
        assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("gates", GATES)
def test_hard_gates_in_float32(gates: str) -> None:
    """Map, shares and their gradients: within the bounds, finite, without subnormal numbers."""
    values = inputs(66, gates=gates, state=False)
    leaves = {n: values[n].clone().requires_grad_() for n in ("query", "key", "decay", "beta")}
    true_leaves = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    actual, expected = map_and_shares(leaves), reference(true_leaves)
    rng = generator(3)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in expected]
    for result, true in zip(actual, expected, strict=True):
        assert count_subnormals(result) == 0
        assert (result.double() - true).abs().max() <= FP32 * max(true.abs().max().item(), 1e-13)
    gradients = torch.autograd.grad(actual, list(leaves.values()), [w.float() for w in weights])
    expected_gradients = torch.autograd.grad(expected, list(true_leaves.values()), weights)
    hard = values["decay"].min() <= -20
    for name, gradient, true in zip(leaves, gradients, expected_gradients, strict=True):
        assert torch.isfinite(gradient).all() and count_subnormals(gradient) == 0, name
        bound = HARD_GATE if name == "decay" and hard else FP32
        assert (gradient.double() - true).abs().max() <= bound * max(true.abs().max().item(), 1e-13), name


def test_gradcheck() -> None:
    values = inputs(4, batch=1, dtype=torch.float64, heads=(1, 2, 3, 2), state=False)
    leaves = [values[name].requires_grad_() for name in ("query", "key", "decay", "beta")]
    assert torch.autograd.gradcheck(lambda q, k, g, b: map_and_shares({"query": q, "key": k, "decay": g, "beta": b}), leaves)


def test_packed_documents_are_separate() -> None:
    lengths = [1, 9, 0, 5, 17]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    values = inputs(sum(lengths), batch=1, dtype=torch.float64, state=False)
    values["state"] = torch.randn(len(lengths), 6, 5, 7, generator=generator(4), dtype=torch.float64)
    a, p = map_and_shares(values, cu_seqlens=bounds)
    blocks = torch.zeros_like(a)
    for start, end in itertools.pairwise(bounds.tolist()):
        if end > start:
            block, shares = map_and_shares({n: t[:, start:end] for n, t in values.items() if n != "state"})
            blocks[..., start:end, start:end] = block
            assert_close(p[:, :, start:end], shares, EXACT)
    assert_close(a, blocks, EXACT)
    documents = torch.repeat_interleave(torch.tensor(lengths))
    assert (a[..., documents[:, None] != documents] == 0).all()
    zeros = values | {"value": torch.zeros_like(values["value"])}
    rest, _ = call(chunked_gated_delta_rule, zeros, cu_seqlens=bounds)
    out, _ = call(chunked_gated_delta_rule, values, cu_seqlens=bounds)
    assert_close(rest + torch.einsum("bhij,bjhv->bihv", a, values["value"]), out, 1e-12)


# ---------------------------------------------------------------------------------------------------- the whole model

TAP, VOCABULARY, HEADS = "layers.{}.linear_attn.{}", 50, 6


@pytest.fixture(scope="module")
def model() -> Qwen3_5MoeForCausalLM:
    """Two delta-net layers around an attention layer, in float64."""
    config = Config.preset("35b-a3b").replace(
        **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 40, "vocab_size": VOCABULARY, "head_dim": 16},
        **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": HEADS, "linear_key_head_dim": 12, "linear_value_head_dim": 8},
    )
    return Qwen3_5MoeForCausalLM(config.text_config).init_weights(seed=0).double()


def apply_map(maps: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhv->bihv", maps, value)


def test_a_map_for_every_layer(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (2, 11))
    with taps.record(model, ["*.value", "*.core", "*.scores"]) as recorded, torch.no_grad():
        out = model(ids, output_attentions=True)
    assert [list(a.shape) for a in out.attentions] == [[2, HEADS, 11, 11], [2, 4, 11, 11], [2, HEADS, 11, 11]]
    for layer in (0, 2):
        maps = out.attentions[layer]
        assert torch.equal(maps, recorded[TAP.format(layer, "scores")])
        assert_close(apply_map(maps, recorded[TAP.format(layer, "value")]), recorded[TAP.format(layer, "core")], EXACT)
    with torch.no_grad():
        assert_close(model(ids).logits, out.logits, 1e-13)  # computing the maps changes nothing


def test_with_a_cache_the_map_covers_the_new_tokens_and_the_state_the_earlier_ones(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (2, 14))
    cache = model.new_cache(2)
    names = ["query", "key", "value", "decay", "beta", "core", "state"]
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        state_before = cache[2].recurrent_state.clone()
        with taps.record(model, [TAP.format(2, name) for name in names]) as recorded:
            out = model(ids[:, 9:], cache=cache, output_attentions=True)
    assert [list(a.shape[2:]) for a in out.attentions] == [[5, 5], [5, 14], [5, 5]]
    values = {name: recorded[TAP.format(2, name)] for name in names}
    zeros = torch.zeros_like(values["value"])
    gates = {"decay": values["decay"], "beta": values["beta"]}
    from_state, decayed_state = recurrent_gated_delta_rule(values["query"], values["key"], zeros, **gates, state=state_before)
    assert from_state.abs().max() > 1e-6  # the state does contribute
    assert_close(apply_map(out.attentions[2], values["value"]) + from_state, values["core"], EXACT)
    shares = torch.einsum("bhjk,bjhv->bhkv", state_map(values["key"], **gates), values["value"])
    assert_close(shares + decayed_state, values["state"], EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_rows_and_columns_of_zeros(model: Qwen3_5MoeForCausalLM, side: str) -> None:
    ids = torch.randint(VOCABULARY, (2, 10))
    mask = torch.ones_like(ids)
    tokens = slice(3, None) if side == "left" else slice(None, 7)
    mask[1] = 0
    mask[1, tokens] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, output_attentions=True).attentions
        alone = model(ids[1:, tokens], output_attentions=True).attentions
        unpadded = model(ids[:1], output_attentions=True).attentions
    for maps, row, first_row in zip(padded, alone, unpadded, strict=True):
        expected = torch.zeros_like(maps[1])
        expected[:, tokens, tokens] = row[0]
        assert_close(maps[1], expected, EXACT)
        assert_close(maps[0], first_row[0], EXACT)


@pytest.mark.parametrize("packing", ["positions", "bounds", "bounds and cache"])
def test_every_document_of_a_packed_row_has_its_own_map(model: Qwen3_5MoeForCausalLM, packing: str) -> None:
    lengths = [4, 7, 2]
    rows = 2 if packing == "positions" else 1
    ids = torch.randint(VOCABULARY, (rows, sum(lengths)))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    arguments = {"position_ids": position_ids} if packing == "positions" else {"cu_seqlens": bounds}
    if packing == "bounds and cache":
        arguments["cache"] = model.new_cache(len(lengths))
    with torch.no_grad():
        packed = model(ids, **arguments, output_attentions=True).attentions
        expected = [torch.zeros_like(maps) for maps in packed]
        for start, end in itertools.pairwise(bounds.tolist()):
            for whole, part in zip(expected, model(ids[:, start:end], output_attentions=True).attentions, strict=True):
                whole[..., start:end, start:end] = part
    for actual, true in zip(packed, expected, strict=True):
        assert_close(actual, true, EXACT)


def test_the_layer_uses_a_patched_map(model: Qwen3_5MoeForCausalLM) -> None:
    """A map whose first column is zero gives the output of a first value of zero."""
    ids = torch.randint(VOCABULARY, (1, 8))

    def without_first_column(maps: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(maps[..., :1]), maps[..., 1:]], dim=-1)

    def without_first_value(value: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], dim=1)

    with torch.no_grad():
        plain = model(ids).logits
        with taps.patch(model, {TAP.format(0, "scores"): without_first_column}):
            patched = model(ids).logits
        with taps.patch(model, {TAP.format(0, "value"): without_first_value}):
            expected = model(ids).logits
        with taps.patch(model, {TAP.format(0, "scores"): lambda maps: maps}):
            assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(patched, plain)
    assert_close(patched, expected, 1e-12)


def test_gradients_flow_through_the_maps_with_and_without_checkpointing(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (1, 6))
    gradients = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.train()
        loss = sum(maps.square().sum() for maps in model(ids, output_attentions=True).attentions)
        weight = model.model.layers[0].linear_attn.in_proj_qkv.weight
        gradients.append(torch.autograd.grad(loss, weight)[0])
    model.gradient_checkpointing_disable()
    model.eval()
    assert gradients[0].abs().max() > 0
    assert_close(gradients[1], gradients[0], EXACT)
