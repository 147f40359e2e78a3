"""The model classes: sizes of the published presets, methods for other libraries, parameters kept in float32."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import qwen35moe
from qwen35moe import Config, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from qwen35moe.config import ConfigError, TextConfig

FP32 = ("A_log", "dt_bias", "linear_attn.norm.weight")


def small(**changes: object) -> TextConfig:
    sizes = dict(
        vocab_size=59, hidden_size=24, num_hidden_layers=2, layer_types=["full_attention", "linear_attention"], head_dim=16,
        num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=10,
        shared_expert_intermediate_size=14,
    )
    return TextConfig(**(sizes | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", Config.presets())
def test_a_preset_on_the_meta_device_has_the_published_parameters(name):
    """The counts themselves are held against the published ones in test_config."""
    config = Config.preset(name)
    with torch.device("meta"):
        model = (Qwen3_5MoeForCausalLM if config.text_config.is_moe else Qwen3_5ForCausalLM)(config)
    assert model.num_parameters() == config.num_parameters(vision=False)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_class_of_the_other_family_is_refused():
    with pytest.raises(ConfigError, match="num_experts=5.*Qwen3_5Moe"):
        Qwen3_5ForCausalLM(small())
    with pytest.raises(ConfigError, match="num_experts=0.*Qwen3_5"):
        Qwen3_5MoeForCausalLM(Config.preset("0.8b"))


@pytest.mark.parametrize("way", ["to", "bfloat16", "half", "assign", "to_empty"])
def test_fp32_parameters_stay_float32_and_keep_their_digits(way):
    model = Qwen3_5MoeForCausalLM(small()).init_weights(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if way == "to":
        model.to(torch.bfloat16)
    elif way == "bfloat16":
        model.bfloat16()
    elif way == "half":
        model.half()
    elif way == "assign":
        model.load_state_dict({name: tensor.bfloat16() for name, tensor in before.items()}, assign=True)
    else:
        with torch.device("meta"):
            model = Qwen3_5MoeForCausalLM(small()).to(torch.bfloat16)
        model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        kept = name.endswith(FP32)
        assert (parameter.dtype == torch.float32) == kept, name
        if kept and way not in ("assign", "to_empty"):
            assert torch.equal(parameter, before[name])
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_init_weights_is_a_function_of_the_seed_and_draws_ordinary_gates():
    one, same, other = (Qwen3_5MoeForCausalLM(small()).init_weights(seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    mixer = Qwen3_5MoeForCausalLM(small(linear_num_value_heads=400)).init_weights().model.layers[1].linear_attn
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1 + 1e-6
    assert 1 <= mixer.A_log.exp().min() < 1.5 and 15 < mixer.A_log.exp().max() <= 16
    with pytest.raises(ValueError, match="hard"):
        one.init_weights(gates="hard")


def test_a_model_is_copied_with_its_backends_and_without_its_original():
    model = Qwen3_5MoeForCausalLM(small()).init_weights()
    model.use_backends(experts="loop")
    twin, ids = copy.deepcopy(model), torch.arange(6)[None]
    with torch.no_grad(), qwen35moe.backends.ran() as ran:
        assert torch.equal(twin(ids).logits, model(ids).logits)
        model.lm_head.weight.zero_()
        assert twin(ids).logits.any()
    assert {call.name for call in ran.calls if call.operation == "experts"} == {"loop"}


def test_training_is_the_same_with_gradient_checkpointing_and_without():
    model = Qwen3_5MoeForCausalLM(small()).init_weights()
    ids = torch.randint(0, 59, (2, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    reentrant = functools.partial(model.gradient_checkpointing_enable, {"use_reentrant": True})  # no effect: see there
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable, reentrant):
        switch()
        model.zero_grad()
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.is_gradient_checkpointing
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="determinism_check"):
        model.gradient_checkpointing_enable({"determinism_check": "none"})


def test_the_whole_model_compiles_into_one_graph():
    model = Qwen3_5MoeForCausalLM(small()).init_weights()
    ids = torch.randint(0, 59, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_the_balancing_loss_by_layer_shows_a_layer_that_the_pooled_one_hides(padded):
    """Two layers with opposite loads: pooled they are even, E sum f p = k, while each layer is as far from even as can be."""
    config = small(num_experts=4, router_aux_loss_coef=0.5, output_router_logits=True)
    model = Qwen3_5MoeForCausalLM(config).init_weights()
    by_layer = Qwen3_5MoeForCausalLM(config.replace(router_aux_loss_per_layer=True))
    by_layer.load_state_dict(model.state_dict())
    for m in (model, by_layer):
        for layer, chosen in zip(m.model.layers, ((0, 1), (2, 3)), strict=True):
            def only(module, inputs, output, chosen=chosen):
                logits, weights, indices = output
                wanted = torch.tensor(chosen).expand(len(logits), 2)
                return torch.full_like(logits, -40.0).scatter(1, wanted, 0.0), weights, wanted
            layer.mlp.gate.register_forward_hook(only)
    ids = torch.randint(0, 59, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 * padded + [1] * (7 - 3 * padded), [1] * 7])
    with torch.no_grad():
        pooled, single = (m(ids, attention_mask=mask, labels=ids) for m in (model, by_layer))
        crossed = model(ids, attention_mask=mask, labels=ids, output_router_logits=False).loss
    assert pooled.aux_loss.item() == pytest.approx(2) and single.aux_loss.item() == pytest.approx(4)
    assert torch.allclose(pooled.loss, crossed + 0.5 * 2) and torch.allclose(single.loss, crossed + 0.5 * 4)
    assert pooled.load_imbalance.tolist() == single.load_imbalance.tolist() == [2, 2]  # E/k: half of the experts do all the work
    assert by_layer.config.to_dict()["router_aux_loss_per_layer"] is True
    assert "router_aux_loss_per_layer" not in model.config.to_dict()
