"""Multimodal checkpoints: every layout, selections, tiny checkpoints, several devices, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
from qwen35moe.checkpoint import names, read_headers
from qwen35moe.checkpoint.published import QWEN35, QWEN36, Layout
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from tests.support.checkpoints import LAYOUTS, Tensors, publish

MODEL = Qwen3_5MoeForConditionalGeneration
WITH_VISION = [name for name, layout in LAYOUTS.items() if layout.vision]
FP8 = "3.5 MoE, FP8"
CPU, META = torch.device("cpu"), torch.device("meta")
pytestmark = pytest.mark.usefixtures("quick_disk")


def held(model: torch.nn.Module) -> Tensors:
    """The parameters by canonical name, a tied head once."""
    tensors = {names.canonical(name) or name: value for name, value in model.state_dict().items()}
    config: Any = model.config
    return {name: value for name, value in tensors.items() if name != "lm_head.weight" or not config.tie_word_embeddings}


def assert_held(model: torch.nn.Module, expected: Tensors) -> None:
    actual = held(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def without_mtp(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith("mtp.")}


@pytest.mark.parametrize("row", WITH_VISION)
def test_every_layout_with_a_vision_tower_is_read(row: str, tmp_path: Path) -> None:
    layout = LAYOUTS[row]
    folder, expected = publish(tmp_path, layout)
    cls = Qwen3_5ForConditionalGeneration if layout.dense else MODEL
    model = cls.from_pretrained(folder)
    assert_held(model, without_mtp(expected))
    assert set(model.loading_report.left_out) == ({"mtp.*"} if layout.mtp else set())
    assert model.lm_head.weight is model.get_input_embeddings().weight or not layout.tied
    assert model.config.vision_config is not None and model.config.quantization_config is None


@pytest.mark.parametrize("row", [FP8, "3.5 MoE, bf16", "saved by transformers"])
def test_a_selection(row: str, tmp_path: Path) -> None:
    """One layer with three of its experts, and the whole vision tower."""
    folder, expected = publish(tmp_path, LAYOUTS[row])
    model = MODEL.from_pretrained(folder, layers=[1], experts=[4, 0, 2], parts={"text", "vision"})
    actual = held(model)
    assert model.config.text_config.num_hidden_layers == 1 and model.config.text_config.num_experts == 3
    for name, value in without_mtp(expected).items():
        if name.startswith("layers.0."):
            continue
        selected = actual.pop(name.replace("layers.1.", "layers.0."))
        routed = ".mlp.experts." in name or name.endswith(".mlp.gate.weight")
        assert torch.equal(selected, value[[4, 0, 2]] if routed else value), name
    assert not actual and model.model.language_model.source_layers == (1,)


@pytest.mark.parametrize(
    "parts, message", [({"text"}, "parts= leaves out vision, which .* always has"), ({"vision"}, "leaves out text"),
                       ({"text", "vision", "mtp"}, "parts= names mtp, for which .* has no module")])  # fmt: skip
def test_required_parts_cannot_be_left_out(parts: set[str], message: str, tmp_path: Path) -> None:
    folder, _ = publish(tmp_path, LAYOUTS["3.5 MoE, bf16"])
    with pytest.raises(ValueError, match=message):
        MODEL.from_pretrained(folder, parts=parts)


@pytest.mark.parametrize("layout", [QWEN35, QWEN36, QWEN35.quantised(), QWEN36.quantised()])
def test_tiny_checkpoints(layout: Layout, tmp_path: Path) -> None:
    """Both classes read them, with the same text weights and the same logits for a text."""
    config = tiny_config(vision=True, mtp=True)
    write_tiny(tmp_path, config, layout)
    model, text = MODEL.from_pretrained(tmp_path), Qwen3_5MoeForCausalLM.from_pretrained(tmp_path)
    dequantised = model.loading_report.dequantised
    assert dequantised == text.loading_report.dequantised and bool(dequantised) == layout.fp8
    stored = read_headers(tmp_path).tensors
    seen = {name for name in held(model) if name.startswith("visual.")}
    assert seen == {names.canonical(name) for name in stored if ".visual." in name} and len(seen) > 10
    both = held(text)
    assert_held(text, {name: value for name, value in held(model).items() if name not in seen})
    assert both.keys() | seen == held(model).keys()
    ids = torch.arange(12)[None] + 20
    with torch.no_grad():
        assert torch.equal(model(ids).logits, text(ids).logits)


def test_the_vision_tower_is_on_the_device_of_the_first_layer(tmp_path: Path) -> None:
    folder, expected = publish(tmp_path, LAYOUTS[FP8])
    model = MODEL.from_pretrained(folder, device=["cpu", "meta"])
    device_of = {names.canonical(name) or name: parameter.device for name, parameter in model.named_parameters()}
    first = {name for name in device_of if name.startswith(("visual.", "embed_tokens.", "layers.0."))}
    assert {device_of[name] for name in first} == {CPU} and {device_of[name] for name in device_of.keys() - first} == {META}
    actual = held(model)
    assert all(torch.equal(actual[name], expected[name]) for name in first)
    assert model.device_map is not None and model.model.language_model.device_map == model.device_map


@pytest.mark.parametrize("experts", ["grouped", "per_expert"])
def test_saved_and_loaded_equals_the_original(experts: str, tmp_path: Path) -> None:
    """Loaded from FP8, saved with published names, loaded again: the same weights."""
    (tmp_path / "old").mkdir()
    folder, expected = publish(tmp_path / "old", LAYOUTS[FP8])
    model = MODEL.from_pretrained(folder)
    model.save_pretrained(tmp_path / "new", layout=experts)
    stored = read_headers(tmp_path / "new").tensors
    assert all(name.startswith(("model.language_model.", "model.visual.", "lm_head.")) for name in stored)
    assert any(".experts.4.up_proj" in name for name in stored) is (experts == "per_expert")
    assert_held(MODEL.from_pretrained(tmp_path / "new"), without_mtp(expected))
