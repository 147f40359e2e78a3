"""Layers over several devices. Without a GPU the second device is "meta": a tensor left on the first device meets a meta
tensor in an operation, which raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen35moe import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, taps
from qwen35moe.config import TextConfig
from qwen35moe.models.device_map import chosen_devices, plan_device_map

LINEAR, FULL = "linear_attention", "full_attention"
CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.arange(14).view(2, 7) % 61


def config(**changes: object) -> TextConfig:
    sizes = dict(
        vocab_size=61, hidden_size=24, num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, FULL], head_dim=16,
        num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, tie_word_embeddings=False,
    )
    return TextConfig(**(sizes | changes))  # type: ignore[arg-type]


def experts(**changes: object) -> TextConfig:
    sizes = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=14)
    return config(**(sizes | changes))


def dense(**changes: object) -> Qwen3_5ForCausalLM:
    return Qwen3_5ForCausalLM(config(num_experts=0, intermediate_size=20, **changes)).init_weights(seed=1).eval()


def test_layers_go_to_devices_in_order_and_by_bytes() -> None:
    model = dense().place([CPU, META])
    assert model.device_map is not None and model.device_map.layers == (CPU, CPU, META, META)
    assert str(model.device_map) == "cpu: layers 0-1, meta: layers 2-3"
    device = {name: parameter.device for name, parameter in model.named_parameters()}
    assert {device[name] for name in device if ".layers.0." in name or ".layers.1." in name} == {CPU}
    assert {device[name] for name in device if ".layers.2." in name or ".layers.3." in name} == {META}
    assert device["model.embed_tokens.weight"] == CPU and device["lm_head.weight"] == META == device["model.norm.weight"]
    assert model.device == CPU


def mixture() -> Qwen3_5MoeForCausalLM:
    model = Qwen3_5MoeForCausalLM(experts(router_aux_loss_coef=0.01)).init_weights(seed=2).eval()
    model.use_backends(experts="grouped")  # the form that never looks at a value; on meta tensors it takes bfloat16
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [dense, mixture])
def test_a_forward_moves_everything_along(build: Callable[[], Qwen3_5MoeForCausalLM], padded: bool) -> None:
    """Mask, positions, rotation, labels and routing reach the layers' devices; the layers on the CPU compute the same bits."""
    model, mask = build(), torch.ones_like(IDS)
    if padded:
        mask[0, :3] = 0
    options = {"attention_mask": mask, "labels": IDS, "output_attentions": not padded}
    if build is mixture:
        options |= {"output_router_logits": True, "output_routing": True}
    with taps.record(model, "layers.1.output") as whole:
        model(IDS, **options)
    with taps.record(model.place([CPU, META]), "layers.1.output") as halved:
        out = model(IDS, output_hidden_states=True, **options)
    assert torch.equal(whole["layers.1.output"], halved["layers.1.output"])
    assert out.logits is not None and out.logits.device == META and out.logits.shape == (2, 7, 61)
    assert out.loss is not None and out.loss.device == META
    assert {state.device for state in out.hidden_states or ()} == {META} and len(out.hidden_states or ()) == 5
    if build is mixture:
        assert out.routing is not None and out.routing.indices.shape == (4, 14, 2)


def test_the_cache_is_on_its_layers_devices() -> None:
    model = dense().place([CPU, META])
    cache = model.new_cache(2)
    with torch.no_grad():
        model(IDS, cache=cache)
        out = model(IDS[:, :1], cache=cache)
    assert out.logits is not None and out.logits.shape == (2, 1, 61) and cache.lengths.tolist() == [8, 8]
    assert cache[0].recurrent_state.device == CPU and cache[2].recurrent_state.device == META  # type: ignore[union-attr]
    assert cache[1].key.device == CPU and cache[3].key.device == META  # type: ignore[union-attr]


def test_a_saved_cache_is_loaded_on_its_layers_devices(tmp_path: Path) -> None:
    model = dense()
    cache = model.new_cache(2)
    with torch.no_grad():
        model(IDS, cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    device_map = model.place([CPU, META]).device_map
    assert device_map is not None
    back = type(cache).load(tmp_path / "cache.safetensors", model.config.text_config, devices=device_map.layers)
    assert [layer.tensors()[0].device for layer in back.layers] == list(device_map.layers)
    assert torch.equal(back[1].key_buffer, cache[1].key)  # type: ignore[union-attr]


def test_a_tied_head_stays_with_the_embedding() -> None:
    model = dense(tie_word_embeddings=True).place([CPU, META])
    assert model.device_map is not None and model.device_map.head == CPU == model.device_map.of("lm_head.weight")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.model.norm.weight.device == META
    with pytest.raises(NotImplementedError, match="meta"):  # the hidden state was on its way back to the embedding
        model(IDS)


def test_one_device_needs_no_map_and_to_moves_everything_to_one() -> None:
    model = dense()
    before = model(IDS).logits
    assert model.place(["cpu", "cpu"]).device_map is None and torch.equal(model(IDS).logits, before)
    model.place([CPU, META])
    assert model.device_map is not None
    assert model.to("meta").device_map is None and model.model.device_map is None


def test_auto_is_all_gpus_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert chosen_devices("auto") == [CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in chosen_devices("auto")] == ["cuda:0", "cuda:1", "cuda:2"]


def test_gpus_get_layers_by_free_memory_and_too_little_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(experts(num_hidden_layers=12, layer_types=None))
    whole = sum(p.numel() * 4 for p in model.parameters())
    free = {0: whole // 3 + 60_000, 1: 2 * whole}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[torch.device(device).index], 0))
    layers = [device.index for device in plan_device_map(model, ["cuda:0", "cuda:1"]).layers]
    assert layers == sorted(layers) and 0 < layers.count(0) < 4
    free[0], free[1] = whole // 2, whole // 4
    with pytest.raises(ValueError, match=r"cuda:[01] would hold .* GB of weights and has .* GB free; .* give more devices"):
        plan_device_map(model, ["cuda:0", "cuda:1"])
    with pytest.raises(ValueError, match="name at least one"):
        plan_device_map(model, [])
