"""The delta rule as an attention map: A is the rule's answer to the identity, and with it the rule is A v and a rest.

Judged by the recurrence in float64. EXACT is rounding: 1e-14 of the largest value.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwen35moe import Config, Qwen3_5MoeForCausalLM, ops, taps
from qwen35moe.ops.attention_map import attention_map, state_map
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule
from tests.ops.test_delta_rule import CUTS, FP32, GATES, HARD_GATE, KEYS, call, inputs, subnormal
from tests.support.peer import assert_close, generator

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

EXACT = 1e-14


def mapped(values: dict[str, Tensor], **options: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and p of a draw of `inputs`."""
    gates = {"decay": values["decay"], "beta": values["beta"], **options}
    return attention_map(values["query"], values["key"], **gates), state_map(values["key"], **gates)


def identity_answers(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition: the recurrence with value j the j-th unit vector answers A, and keeps p."""
    batch, tokens, heads = values["decay"].shape
    basis = torch.eye(tokens, dtype=values["decay"].dtype)[None, :, None].expand(batch, tokens, heads, tokens)
    named = {name: tensor for name, tensor in values.items() if name != "state"} | {"value": basis}
    out, memory = call(recurrent_gated_delta_rule, named)
    return out.transpose(1, 2), memory.mT


def assembled(values: dict[str, Tensor], **options: Tensor) -> tuple[Tensor, Tensor]:
    """(output, memory) put together from the map, the shares, and the rule's answer to no values."""
    a, p = mapped(values, **options)
    out, memory = call(recurrent_gated_delta_rule, values | {"value": torch.zeros_like(values["value"])}, **options)
    out = out + torch.einsum("bhij,bjhv->bihv", a, values["value"])
    return out, memory + torch.einsum("bhjk,bjhv->bhkv", p, values["value"])


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", ["ordinary", "any", "none"])
def test_the_map_is_what_the_rule_answers_to_the_identity(gates: str, keys: str) -> None:
    values = inputs(37, gates=gates, keys=keys, dtype=torch.float64)
    a, p = mapped(values)
    true_a, true_p = identity_answers(values)
    assert (a.triu(1) == 0).all()
    assert_close(a, true_a, EXACT)
    if keys != "zero":
        assert_close(p, true_p, EXACT)
    else:
        assert (p == 0).all() and (true_p == 0).all()


@pytest.mark.parametrize("length", CUTS)
def test_the_rule_is_the_map_and_the_share_of_the_state(length: int) -> None:
    values = inputs(length, dtype=torch.float64, seed=length)
    for found, true in zip(assembled(values), call(recurrent_gated_delta_rule, values), strict=True):
        assert_close(found, true, EXACT)


@pytest.mark.parametrize("gates", GATES)
def test_hard_gates_in_float32(gates: str) -> None:
    """Map, shares and their gradients: right, finite, and without a subnormal number."""
    values = inputs(66, gates=gates, state=False)
    leaves = {n: values[n].clone().requires_grad_() for n in ("query", "key", "decay", "beta")}
    true_leaves = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    found, true = mapped(leaves), identity_answers(true_leaves)
    rng = generator(3)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in true]
    for one, other in zip(found, true, strict=True):
        assert subnormal(one) == 0
        assert (one.double() - other).abs().max() <= FP32 * max(other.abs().max().item(), 1e-13)
    gradients = torch.autograd.grad(found, list(leaves.values()), [w.float() for w in weights])
    truths = torch.autograd.grad(true, list(true_leaves.values()), weights)
    hard = values["decay"].min() <= -20
    for name, one, other in zip(leaves, gradients, truths, strict=True):
        assert torch.isfinite(one).all() and subnormal(one) == 0, name
        bound = HARD_GATE if name == "decay" and hard else FP32
        assert (one.double() - other).abs().max() <= bound * max(other.abs().max().item(), 1e-13), name


def test_gradcheck() -> None:
    values = inputs(4, batch=1, dtype=torch.float64, heads=(1, 2, 3, 2), state=False)
    leaves = [values[name].requires_grad_() for name in ("query", "key", "decay", "beta")]
    assert torch.autograd.gradcheck(lambda q, k, g, b: mapped({"query": q, "key": k, "decay": g, "beta": b}), leaves)


def test_packed_documents_read_nothing_of_each_other() -> None:
    lengths = [1, 9, 0, 5, 17]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    values = inputs(sum(lengths), batch=1, dtype=torch.float64, state=False)
    values["state"] = torch.randn(len(lengths), 6, 5, 7, generator=generator(4), dtype=torch.float64)
    a, p = mapped(values, cu_seqlens=bounds)
    blocks = torch.zeros_like(a)
    for start, end in itertools.pairwise(bounds.tolist()):
        if end > start:
            alone, own = mapped({n: t[:, start:end] for n, t in values.items() if n != "state"})
            blocks[..., start:end, start:end] = alone
            assert_close(p[:, :, start:end], own, EXACT)
    assert_close(a, blocks, EXACT)
    documents = torch.repeat_interleave(torch.tensor(lengths))
    assert (a[..., documents[:, None] != documents] == 0).all()
    zeros = values | {"value": torch.zeros_like(values["value"])}
    rest, _ = call(chunked_gated_delta_rule, zeros, cu_seqlens=bounds)
    out, _ = call(chunked_gated_delta_rule, values, cu_seqlens=bounds)
    assert_close(rest + torch.einsum("bhij,bjhv->bihv", a, values["value"]), out, 1e-12)


# ---------------------------------------------------------------------------------------------------- the whole model

LINEAR, WORDS, HEADS = "layers.{}.linear_attn.{}", 50, 6


@pytest.fixture(scope="module")
def model() -> Qwen3_5MoeForCausalLM:
    """Two delta-net layers around an attention layer, in float64."""
    config = Config.preset("35b-a3b").replace(
        **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 40, "vocab_size": WORDS, "head_dim": 16},
        **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": HEADS, "linear_key_head_dim": 12, "linear_value_head_dim": 8},
    )
    return Qwen3_5MoeForCausalLM(config.text_config).init_weights(seed=0).double()


def read_through(maps: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhv->bihv", maps, value)


def test_a_map_for_every_layer(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(WORDS, (2, 11))
    with taps.record(model, ["*.value", "*.core", "*.scores"]) as seen, torch.no_grad():
        out = model(ids, output_attentions=True)
    assert [list(a.shape) for a in out.attentions] == [[2, HEADS, 11, 11], [2, 4, 11, 11], [2, HEADS, 11, 11]]
    for layer in (0, 2):
        maps = out.attentions[layer]
        assert torch.equal(maps, seen[LINEAR.format(layer, "scores")])
        assert_close(read_through(maps, seen[LINEAR.format(layer, "value")]), seen[LINEAR.format(layer, "core")], EXACT)
    with torch.no_grad():
        assert_close(model(ids).logits, out.logits, 1e-13)  # asking for the maps changes nothing


def test_with_a_cache_the_map_covers_the_new_tokens_and_the_memory_answers_the_rest(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(WORDS, (2, 14))
    cache = model.new_cache(2)
    names = ["query", "key", "value", "decay", "beta", "core", "state"]
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        before = cache[2].recurrent_state.clone()
        with taps.record(model, [LINEAR.format(2, name) for name in names]) as seen:
            out = model(ids[:, 9:], cache=cache, output_attentions=True)
    assert [list(a.shape[2:]) for a in out.attentions] == [[5, 5], [5, 14], [5, 5]]
    values = {name: seen[LINEAR.format(2, name)] for name in names}
    zeros = torch.zeros_like(values["value"])
    gates = {"decay": values["decay"], "beta": values["beta"]}
    rest, kept = recurrent_gated_delta_rule(values["query"], values["key"], zeros, **gates, state=before)
    assert rest.abs().max() > 1e-6  # the memory does answer something
    assert_close(read_through(out.attentions[2], values["value"]) + rest, values["core"], EXACT)
    shares = torch.einsum("bhjk,bjhv->bhkv", state_map(values["key"], **gates), values["value"])
    assert_close(shares + kept, values["state"], EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_read_nor_reads(model: Qwen3_5MoeForCausalLM, side: str) -> None:
    ids = torch.randint(WORDS, (2, 10))
    mask = torch.ones_like(ids)
    there = slice(3, None) if side == "left" else slice(None, 7)
    mask[1] = 0
    mask[1, there] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, output_attentions=True).attentions
        alone = model(ids[1:, there], output_attentions=True).attentions
        whole = model(ids[:1], output_attentions=True).attentions
    for one, row, other in zip(padded, alone, whole, strict=True):
        expected = torch.zeros_like(one[1])
        expected[:, there, there] = row[0]
        assert_close(one[1], expected, EXACT)
        assert_close(one[0], other[0], EXACT)


@pytest.mark.parametrize("how", ["positions", "bounds", "bounds and cache"])
def test_documents_of_a_packed_row_have_maps_of_their_own(model: Qwen3_5MoeForCausalLM, how: str) -> None:
    lengths = [4, 7, 2]
    rows = 2 if how == "positions" else 1
    ids = torch.randint(WORDS, (rows, sum(lengths)))
    places = torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    given = {"position_ids": places} if how == "positions" else {"cu_seqlens": bounds}
    if how == "bounds and cache":
        given["cache"] = model.new_cache(len(lengths))
    with torch.no_grad():
        packed = model(ids, **given, output_attentions=True).attentions
        expected = [torch.zeros_like(maps) for maps in packed]
        for start, end in itertools.pairwise(bounds.tolist()):
            for whole, part in zip(expected, model(ids[:, start:end], output_attentions=True).attentions, strict=True):
                whole[..., start:end, start:end] = part
    for found, true in zip(packed, expected, strict=True):
        assert_close(found, true, EXACT)


def test_a_patched_map_is_what_the_layer_goes_on_with(model: Qwen3_5MoeForCausalLM) -> None:
    """Without its first token's column, the output is that of a first value of zero."""
    ids = torch.randint(WORDS, (1, 8))

    def blind(maps: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(maps[..., :1]), maps[..., 1:]], dim=-1)

    def silent(value: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(value[:, :1]), value[:, 1:]], dim=1)

    with torch.no_grad():
        plain = model(ids).logits
        with taps.patch(model, {LINEAR.format(0, "scores"): blind}):
            patched = model(ids).logits
        with taps.patch(model, {LINEAR.format(0, "value"): silent}):
            expected = model(ids).logits
        with taps.patch(model, {LINEAR.format(0, "scores"): lambda maps: maps}):
            assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(patched, plain)
    assert_close(patched, expected, 1e-12)


def test_gradients_flow_through_the_maps_with_and_without_checkpointing(model: Qwen3_5MoeForCausalLM) -> None:
    ids = torch.randint(WORDS, (1, 6))
    found = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.train()
        loss = sum(maps.square().sum() for maps in model(ids, output_attentions=True).attentions)
        weight = model.model.layers[0].linear_attn.in_proj_qkv.weight
        found.append(torch.autograd.grad(loss, weight)[0])
    model.gradient_checkpointing_disable()
    model.eval()
    assert found[0].abs().max() > 0
    assert_close(found[1], found[0], EXACT)
