"""Modules in another dtype than the rest of the model, and parameters that stay float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import Config, ops
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.support import peer
from tests.support.peer import FULL, LINEAR, odd_shape, relative_error

CASE = odd_shape(
    8, layer_types=[LINEAR, FULL], num_hidden_layers=2, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=5,
    num_experts_per_tok=2, tie_word_embeddings=False,
)
IDS = CASE.ids(2, 6)
BF16, FP32 = torch.bfloat16, torch.float32
KEPT = ("A_log", "dt_bias", "linear_attn.norm.weight")


@pytest.fixture(scope="module")
def wide() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model


@pytest.fixture
def half(wide: Any) -> Any:
    return copy.deepcopy(wide).to(BF16)


def body(model: Any, name: str) -> Any:
    return model.model.get_submodule(name) if name else model.model


@pytest.mark.parametrize("name", [
    "layers.0.mlp.gate", "layers.0.linear_attn", "layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_a",
    "layers.0.linear_attn.in_proj_z", "layers.0.linear_attn.out_proj", "layers.0.linear_attn.conv1d", "layers.1.self_attn",
    "layers.1.self_attn.k_proj", "layers.1.self_attn.o_proj", "layers.0.mlp.experts", "layers.0.mlp.shared_expert",
    "layers.0.mlp.shared_expert.up_proj", "layers.0.mlp.shared_expert_gate", "layers.1.input_layernorm", "norm", "layers.0",
    "layers.1.mlp",
])
@torch.no_grad()
def test_one_module_in_another_dtype_runs_in_its_own(wide, half, name):
    """float32 in a bfloat16 model and the reverse: within bfloat16's rounding of the float32 model, also step by step."""
    narrow_part = copy.deepcopy(wide)
    body(narrow_part, name).to(BF16)
    body(half, name).to(FP32)
    expected = wide(IDS).logits
    for model, dtype in ((half, BF16), (narrow_part, FP32)):
        logits = model(IDS).logits
        assert logits.dtype == dtype and relative_error(logits, expected) < 0.15
        cache = model.new_cache(2)
        steps = torch.cat([model(part, cache=cache).logits for part in IDS.split([3, 1, 1, 1], dim=1)], dim=1)
        assert cache[0].conv_state.dtype == cache[1].key.dtype == cache.dtype == dtype
        assert cache[0].recurrent_state.dtype == FP32
        assert relative_error(steps, logits) < 0.1
    model(IDS, cache=model.new_cache(2, 8))


def test_gradients_reach_a_module_in_another_dtype(half):
    for name in ("layers.0.mlp.gate", "layers.0.linear_attn.in_proj_a"):
        body(half, name).float()
    half(IDS, labels=IDS, output_router_logits=True).loss.backward()
    for name in ("layers.0.mlp.gate", "layers.0.linear_attn.in_proj_a"):
        gradient = body(half, name).weight.grad
        assert gradient.dtype == FP32 and torch.isfinite(gradient).all() and gradient.abs().max() > 0


@torch.no_grad()
def test_a_float32_router_computes_its_logits_in_float32(half):
    """They are the product of the float32 weights with the widened hidden states."""
    block = body(half, "layers.0.mlp")
    block.gate.float()
    seen: list[tuple[Tensor, Tensor]] = []
    block.gate.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    half(IDS)
    hidden, logits = seen[0]
    assert hidden.dtype == BF16 and logits.dtype == FP32
    assert relative_error(logits, hidden.double() @ block.gate.weight.double().T) < 1e-6


@torch.no_grad()
def test_a_whole_model_of_mixed_modules(wide, half):
    """Every second module that has weights is float32."""
    for index, part in enumerate(m for m in half.modules() if list(m.parameters(recurse=False))):
        if index % 2:
            part.float()
    assert relative_error(half(IDS).logits, wide(IDS).logits) < 0.15
    half.to(BF16)
    assert {p.dtype for n, p in half.named_parameters() if not n.endswith(KEPT)} == {BF16}


# ------------------------------------------------------------------------------------------------ parameters in float32


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if name.endswith(KEPT)}


@pytest.mark.parametrize("convert", [
    lambda m: m.to(BF16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("meta").to(BF16),
    lambda m: m.to(BF16).to_empty(device="cpu"), lambda m: copy.deepcopy(m.to(BF16)), lambda m: m.type(BF16),
    lambda m: m.to(torch.empty(0, dtype=BF16)),
    lambda m: (m.load_state_dict({k: v.to(BF16) for k, v in m.state_dict().items()}), m)[1],
    lambda m: (m.load_state_dict({k: v.to(BF16) for k, v in m.state_dict().items()}, assign=True), m)[1],
], ids=["to", "bfloat16", "half", "meta", "to_empty", "deepcopy", "type", "to a tensor", "load", "assign"])
@pytest.mark.parametrize("swap", ["set data", "overwrite", "swap"])
def test_decays_and_the_output_norm_stay_float32(wide, convert, swap):
    """With each of torch's three ways to convert a module."""
    model, before = copy.deepcopy(wide), {name: value.clone() for name, value in kept(wide).items()}
    torch.__future__.set_overwrite_module_params_on_conversion(swap == "overwrite")
    torch.__future__.set_swap_module_params_on_conversion(swap == "swap")
    try:
        model = convert(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert len(kept(model)) == 3
    for name, value in kept(model).items():
        assert value.dtype == FP32 and isinstance(value, nn.Parameter) and value.requires_grad, name
        if not value.is_meta and value.abs().max() > 0 and not torch.isnan(value).any():
            assert relative_error(value, before[name]) < 2**-7


def test_values_in_float32_are_not_rounded_on_the_way(wide):
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model = copy.deepcopy(wide).to(BF16).half()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for name, value in kept(model).items():
            assert torch.equal(value, kept(wide)[name]), (swap, name)


def test_a_bfloat16_default_dtype(wide):
    torch.set_default_dtype(BF16)
    try:
        model = Qwen3_5MoeForCausalLM(Config.from_dict(dict(CASE.text)))
    finally:
        torch.set_default_dtype(FP32)
    assert {value.dtype for value in kept(model).values()} == {FP32} and model.lm_head.weight.dtype == BF16


# ------------------------------------------------------------------------------------------------ modes of a cache


@pytest.mark.parametrize("max_length", [None, 20])
def test_a_cache_keeps_its_dtype_under_autocast(wide, max_length):
    """Filled and continued under autocast, then without it."""
    with torch.no_grad(), torch.autocast("cpu", BF16):
        cache = wide.new_cache(2, max_length, record=3)
        wide(IDS[:, :3], cache=cache)
        logits = wide(IDS[:, 3:4], cache=cache).logits
        cache.rollback(1)
        wide(IDS[:, 3:4], cache=cache)
    for layer in cache:
        assert {getattr(layer, name).dtype for name in layer.names} == {FP32}
    with torch.no_grad():
        rest, whole = wide(IDS[:, 4:], cache=cache).logits, wide(IDS).logits
    assert relative_error(torch.cat([logits, rest], 1), whole[:, 3:]) < 0.1
    if max_length is None:
        ragged = torch.tensor([[1] * 6, [0, 0] + [1] * 4])
        with torch.autocast("cpu", BF16):  # with gradients, of rows of other lengths
            cache = wide(IDS, attention_mask=ragged, cache=wide.new_cache(2)).cache
            wide(IDS[:, :2], cache=cache).logits.sum().backward()
        assert cache[1].key.dtype == FP32


@pytest.mark.parametrize("max_length", [None, 20])
def test_a_cache_goes_from_one_mode_to_another(wide, max_length):
    """inference_mode, no_grad, gradients, in every order; edits, rollback, snapshots and reorder in between."""
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    with torch.no_grad():
        expected = wide(IDS).logits
    for first in modes:
        for second in modes:
            if max_length and "grad" in (first, second):
                continue
            with modes[first]():
                cache = wide.new_cache(2, max_length, record=2)
                wide(IDS[:, :3], cache=cache)
                wide(IDS[:, 3:4], cache=cache)
                snapshot = cache.snapshot()
            with modes[second]():
                cache.rollback(1)
                cache.restore(snapshot)
                cache[0].recurrent_state.mul_(1.0)
                cache[1].key[:] = cache[1].key.clone()
                logits = wide(IDS[:, 4:], cache=cache).logits
                cache.reorder([0, 1])
                cache.clone()
            assert relative_error(logits, expected[:, 4:]) < 1e-5, (first, second)
            if second == "grad":
                wide.zero_grad()
                logits.square().sum().backward()
                assert all(torch.isfinite(p.grad).all() for p in wide.parameters() if p.grad is not None)
            with modes[first]():
                assert torch.isfinite(wide(IDS[:, :1], cache=cache).logits).all()


def test_a_no_grad_continuation_leaves_the_backward_of_the_prompt_alone(wide):
    """The keys of a forward with gradients are not overwritten by the tokens that follow without."""
    cache = wide.new_cache(2)
    wide.zero_grad()
    loss = wide(IDS, cache=cache).logits.square().sum()
    with torch.no_grad():
        for _ in range(3):
            wide(IDS[:, :1], cache=cache)
    loss.backward()
    actual = peer.gradients(wide)
    wide.zero_grad()
    wide(IDS).logits.square().sum().backward()
    peer.assert_all_close(actual, peer.gradients(wide), 1e-5)


def test_a_cache_on_another_device_is_refused(wide):
    cache = wide.new_cache(2)
    away = copy.deepcopy(wide).to("meta")
    with pytest.raises(ValueError, match="cpu.*meta.*new_cache"):
        away(IDS.to("meta"), cache=cache)


# ------------------------------------------------------------------------------------------------------ padding


@torch.no_grad()
def test_what_is_in_the_padding_reaches_nothing(wide):
    """nan and inf as embeddings of padding, on both sides, with a cache that continues."""
    embeds, mask = wide.model.embed_tokens(IDS).clone(), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    clean = wide(inputs_embeds=embeds, attention_mask=mask, cache=wide.new_cache(2), output_router_logits=True)
    for value in (float("nan"), float("inf")):
        embeds[mask == 0] = value
        dirty = wide(inputs_embeds=embeds, attention_mask=mask, cache=wide.new_cache(2), output_router_logits=True)
        assert torch.equal(dirty.logits, clean.logits) and torch.equal(dirty.aux_loss, clean.aux_loss)
        late = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        steps = [wide(IDS[:, :1], attention_mask=late, cache=out.cache.clone()).logits for out in (dirty, clean)]
        assert torch.equal(*steps)


@torch.no_grad()
def test_tokens_that_were_rolled_back_reach_nothing(wide):
    """A draft whose keys and values are nan, rolled back in rows of other lengths."""
    for max_length in (None, 20):
        cache, other = (wide.new_cache(2, max_length, record=4) for _ in range(2))
        for one in (cache, other):
            wide(IDS, cache=one)
        draft = torch.full((2, 3, wide.config.text_config.hidden_size), float("nan"))
        wide(inputs_embeds=draft, cache=cache)
        wide(IDS[:, :3], cache=other)
        for one in (cache, other):
            one.rollback(torch.tensor([3, 3]))
            wide(IDS[:, 3:5], attention_mask=torch.tensor([[1] * 6 + [0] * 3 + [1, 1], [1] * 6 + [0] * 3 + [1, 0]]), cache=one)
        assert torch.equal(wide(IDS[:, :1], cache=cache).logits, wide(IDS[:, :1], cache=other).logits)


def test_the_operations_of_mixed_dtypes_are_those_of_the_definition():
    """The router's definition in the wider dtype."""
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(7, 8)
    logits = ops.router(hidden.float(), weight, top_k=3)[0]
    assert logits.dtype == FP32
