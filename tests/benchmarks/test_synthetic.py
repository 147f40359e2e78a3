"""The synthetic checkpoint: published sizes, values that depend on the name alone, layouts that agree, gates as chosen."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.text_4b import text_bytes
from benchmarks.tools import synthetic
from benchmarks.tools.memory import cached, evict, warm, weight_files
from qwen35moe import Qwen3_5MoeForCausalLM


@pytest.fixture
def config() -> dict:
    small = copy.deepcopy(synthetic.CONFIG)
    sizes = {"hidden_size": 48, "vocab_size": 300, "num_hidden_layers": 4, "head_dim": 32, "num_attention_heads": 4}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
    small["text_config"] |= sizes
    small["text_config"]["layer_types"] = small["text_config"]["layer_types"][:4]
    small["text_config"]["rope_parameters"]["mrope_section"] = [2, 1, 1]
    small["vision_config"] |= {"depth": 1, "hidden_size": 16, "intermediate_size": 12, "out_hidden_size": 48, "num_heads": 2}
    return small


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    values = {}
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(folder / file, "pt") as stored:
            values[name] = stored.get_tensor(name)
    return values


def test_the_full_size_is_the_published_one() -> None:
    specs = [*synthetic.text_specs(synthetic.TEXT, "grouped"), *synthetic.vision_specs(synthetic.VISION)]
    assert sum(spec.count for spec in specs) == 4_540_002_816
    assert len(specs) == 851
    per_expert = synthetic.text_specs(synthetic.TEXT, "per_expert")
    assert sum(spec.count for spec in per_expert) == 4_540_002_816 - 333_514_240


# One slice, and experts that cross the borders of slices.
@pytest.mark.parametrize("slice_size", [pytest.param(1 << 24, marks=pytest.mark.slow), 1 << 8])
def test_layouts_and_runs_agree(tmp_path: Path, config: dict, slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SLICE", slice_size)
    for name, layout in (("one", "grouped"), ("two", "grouped"), ("three", "per_expert")):
        synthetic.write_checkpoint(tmp_path / name, layout=layout, config=config, shard_size=60_000)
    one, two, per_expert = (tensors(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    gate_up = one["model.language_model.layers.2.mlp.experts.gate_up_proj"]
    for e in range(8):
        expert = f"model.language_model.layers.2.mlp.experts.{e}."
        both = torch.cat([per_expert[expert + "gate_proj.weight"], per_expert[expert + "up_proj.weight"]])
        assert torch.equal(gate_up[e], both)
        down = one["model.language_model.layers.2.mlp.experts.down_proj"][e]
        assert torch.equal(down, per_expert[expert + "down_proj.weight"])
    assert len(weight_files(tmp_path / "one")) > 2
    assert text_bytes(tmp_path / "one") == text_bytes(tmp_path / "three")


def test_our_model_loads_it_with_the_chosen_gates(tmp_path: Path, config: dict) -> None:
    for gates, low, high in (("ordinary", 9e-4, 0.11), ("transformers", 1.3, 1.32)):
        synthetic.write_checkpoint(tmp_path / gates, gates=gates, config=config, align=64)
        model = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / gates)
        layer = model.model.layers[0].linear_attn
        step = torch.nn.functional.softplus(layer.dt_bias.float())
        assert low <= step.min() and step.max() <= high
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_page_cache_is_filled_and_emptied(tmp_path: Path, config: dict) -> None:
    synthetic.write_checkpoint(tmp_path / "one", config=config)
    files = weight_files(tmp_path / "one")
    assert warm(files) == 1.0
    assert 0.0 <= evict(files) <= 1.0  # a filesystem in memory keeps its pages
    with pytest.raises(ValueError, match=r"python -m benchmarks synthetic"):
        weight_files(tmp_path)
    assert 0.0 <= cached(files) <= 1.0
