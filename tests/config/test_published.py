"""Published configurations: files, presets, parameter counts, and agreement with transformers.

The files in data/configs are the published config.json files; `reconstructed--` and `derived--` files have dimensions from
secondary sources, confirmed by published parameter counts.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from math import prod
from typing import Any

import pytest

from qwen35moe.config import Config, ConfigError, TextConfig
from tests.support.configs import (
    FILES,
    FULL,
    LINEAR,
    TINY,
    TINY_DENSE,
    nested,
    peer_config,
    published,
)

PRESET_OF = {
    "Qwen3.5-0.8B": "0.8b",
    "reconstructed--Qwen3.5-2B": "2b",
    "Qwen3.5-4B": "4b",
    "reconstructed--Qwen3.5-9B": "9b",
    "Qwen3.5-27B": "27b",
    "Qwen3.5-35B-A3B": "35b-a3b",
    "Qwen3.5-122B-A10B": "122b-a10b",
    "Qwen3.5-397B-A17B": "397b-a17b",
    "Qwen3.6-35B-A3B": "3.6-35b-a3b",
    "derived--Qwen3.5-MoE-4.54B-from-Qwen3.5-4B": "moe-4.54b",
}


# ---------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_published_file_equals_its_preset(name: str) -> None:
    file = published(name)
    before = copy.deepcopy(file)
    config = Config.from_pretrained(FILES / f"{name}.json")
    assert config == Config.from_dict(file) == Config.preset(PRESET_OF[name])
    assert file == before, "reading must not change its argument"


@pytest.mark.parametrize("name", PRESET_OF)
def test_every_key_of_a_published_file_is_written_back(name: str) -> None:
    """Except notes, keys with one allowed value, and the tower's old model_type."""
    file, written = published(name), Config.from_dict(published(name)).to_dict()
    left_out = {"transformers_version", "_note", "mlp_only_layers", "partial_rotary_factor"}
    for part in ("text_config", "vision_config", None):
        old, new = (file[part], written[part]) if part else (file, written)
        changed = {key for key in old if key not in new or old[key] != new[key]} - left_out
        changed -= {"text_config", "vision_config"} if part is None else set()
        assert changed <= ({"model_type"} if part == "vision_config" else set()), changed
    assert written["vision_config"]["model_type"] == file["model_type"] + "_vision"


def test_the_fp8_file_keeps_its_quantization_config() -> None:
    file = published("reconstructed--Qwen3.5-35B-A3B-FP8")
    config = Config.from_dict(file)
    assert config.quantization_config == file["quantization_config"]
    assert config.quantization_config is not file["quantization_config"]
    assert config.to_dict()["quantization_config"] == file["quantization_config"]
    assert config.replace(quantization_config=None) == Config.preset("35b-a3b")
    lifted = copy.deepcopy(file)
    lifted["text_config"]["quantization_config"] = lifted.pop("quantization_config")
    assert Config.from_dict(lifted) == config


@pytest.mark.parametrize("preset", Config.presets())
def test_to_dict_round_trips(preset: str) -> None:
    config = Config.preset(preset)
    for form in (config, config.text_only()):
        assert Config.from_dict(form.to_dict()) == form
        assert Config.from_dict(json.loads(form.to_json_string())) == form
    assert TextConfig.from_dict(config.text_config.to_dict()) == config.text_config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_presets_are_found_by_their_published_names() -> None:
    assert Config.preset("Qwen/Qwen3.5-35B-A3B") == Config.preset("35B-A3B") == Config.preset("35b-a3b")
    assert Config.preset("Qwen3.8-2.4T-A95B").is_flat
    with pytest.raises(ConfigError, match="similar are 35b-a3b"):
        Config.preset("35b")


# ---------------------------------------------------------------------------------------------------- parameters

# total, vision, active, active without vision, MTP, total with MTP. None: not a mixture of experts.
COUNTS = {
    "35b-a3b": (35107181936, 446571248, 3901560176, 3454988928, 844640768, 35951822704),
    "3.6-35b-a3b": (35107181936, 446571248, 3901560176, 3454988928, 844640768, 35951822704),
    "122b-a10b": (122562817776, 451290864, 10222579440, 9771288576, 2523679232, 125086497008),
    "397b-a17b": (396802360816, 456010480, 17805051376, 17349040896, 6595568128, 403397928944),
    "0.8b": (852985920, 100592896, None, 752393024, 20452864, 873438784),
    "2b": (2213241664, 331416576, None, 1881825088, 60828160, 2274069824),
    "4b": (4539265536, 333514240, None, 4205751296, 120599552, 4659865088),
    "9b": (9409813744, 456010480, None, 8953803264, 243290624, 9653104368),
    "27b": (27356728560, 460730096, None, 26895998464, 424699392, 27781427952),
    "3.6-27b": (27356728560, 460730096, None, 26895998464, 424699392, 27781427952),
    "3.8-27b": (27356728560, 460730096, None, 26895998464, 424699392, 27781427952),
    "3.8-2.4t-a95b": (2446182725504 - 26378027520, 0, None, None, 26378027520, 2446182725504),
    "moe-4.54b": (4540002816, 333514240, 3030053376, 3030053376 - 333514240, 4660625408 - 4540002816, 4660625408),
}


def test_the_table_of_counts_names_every_preset() -> None:
    assert set(COUNTS) == set(Config.presets())


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_equal_the_published_ones(preset: str) -> None:
    total, vision, active, active_text, mtp, with_mtp = COUNTS[preset]
    config = Config.preset(preset)
    assert config.num_parameters() == total
    assert config.num_parameters() - config.num_parameters(vision=False) == vision
    assert config.num_parameters(mtp=True) == with_mtp
    assert config.num_parameters(mtp=True) - config.num_parameters() == mtp
    if active is not None:
        assert config.num_parameters(active=True) == active
    if active_text is not None:
        assert config.num_parameters(vision=False, active=True) == active_text
    if not config.text_config.is_moe:
        assert config.num_parameters(active=True) == total
    head = config.text_config.vocab_size * config.text_config.hidden_size
    assert total - config.num_parameters(lm_head=False) == (0 if config.tie_word_embeddings else head)


@pytest.mark.parametrize(
    ("preset", "tensors", "size", "how"),
    [
        ("35b-a3b", 1811, 71_903_655_008, dict(mtp_experts="per_expert")),
        ("3.6-35b-a3b", 1045, 71_903_645_408, dict(fp32_stored_as="BF16")),
        ("9b", 775, 19_306_216_416, {}),
        ("3.8-2.4t-a95b", 1609, 4_892_365_451_008, dict(fp32_stored_as="BF16")),
    ],
)
def test_tensors_and_bytes_equal_the_published_ones(
    preset: str, tensors: int, size: int, how: dict[str, Any]
) -> None:
    actual = list(Config.preset(preset).tensor_shapes(mtp=True, **how))
    assert len({t.name for t in actual}) == len(actual) == tensors
    assert sum(prod(t.shape) * {"BF16": 2, "F32": 4}[t.dtype] for t in actual) == size


@pytest.mark.parametrize(
    ("preset", "tensors"),
    [("35b-a3b", 1026), ("122b-a10b", 1164), ("397b-a17b", 1371), ("27b", 1184), ("moe-4.54b", 851)],
)
def test_the_number_of_named_parameters(preset: str, tensors: int) -> None:
    assert len(list(Config.preset(preset).tensor_shapes())) == tensors


def test_tensors_by_part() -> None:
    def heads(preset: str, **how: Any) -> Counter[str]:
        names = [t.name for t in Config.preset(preset).tensor_shapes(mtp=True, **how)]
        return Counter("visual" if ".visual." in name else name.split(".")[0] for name in names)

    assert [heads(preset)["visual"] for preset in ("35b-a3b", "4b", "0.8b")] == [333, 297, 153]
    assert [heads(preset)["mtp"] for preset in ("4b", "35b-a3b")] == [15, 19]
    assert heads("35b-a3b", mtp_experts="per_expert")["mtp"] == 785
    assert heads("4b")["lm_head"] == 0 and heads("9b")["lm_head"] == 1
    wrong: dict[str, Any]
    for wrong in (dict(experts="packed"), dict(mtp_experts="packed"), dict(fp32_stored_as="packed")):
        with pytest.raises(ValueError, match="packed"):
            list(Config.preset("4b").tensor_shapes(**wrong))


@pytest.mark.parametrize(
    ("preset", "fp32_stored_as", "tensors", "scales", "size"),
    [
        ("397b-a17b", "F32", 189_042, 94_078, 406_125_181_280),
        ("3.6-35b-a3b", "BF16", 64_196, 31_745, 37_454_789_472),
    ],
)
def test_fp8_repositories_follow_from_the_same_shapes(
    preset: str, fp32_stored_as: str, tensors: int, scales: int, size: int
) -> None:
    """A quantised weight has one byte per number, and a BF16 scale per 128 x 128 block."""
    count = total = scale_count = 0
    for name, shape, dtype in Config.preset(preset).tensor_shapes(
        mtp=True, experts="per_expert", mtp_experts="per_expert", fp32_stored_as=fp32_stored_as
    ):
        kept = ("in_proj_a", "in_proj_b", "conv1d", "norm", "gate.weight", "shared_expert_gate", "A_log", "dt_bias")
        quantised = ".layers." in name and not any(part in name.split("mlp.experts")[0] for part in kept)
        count, total = count + 1, total + prod(shape) * (1 if quantised else {"BF16": 2, "F32": 4}[dtype])
        if quantised:
            scale_count, total = scale_count + 1, total + 2 * prod(-(-side // 128) for side in shape)
    assert (count + scale_count, scale_count, total) == (tensors, scales, size)


# ---------------------------------------------------------------------------------------------------- transformers


def same_fields(ours: Any, theirs: Any) -> None:
    for name, value in ours.to_dict().items():
        if name in ("text_config", "vision_config"):
            same_fields(getattr(ours, name), getattr(theirs, name))
        elif name == "dtype":
            assert str(theirs.dtype).removeprefix("torch.") == value
        elif name != "quantization_config":
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize("preset", Config.presets())
@pytest.mark.parametrize("part", ["whole", "text"])
def test_transformers_reads_what_is_written_and_we_read_it_back(preset: str, part: str) -> None:
    config = Config.preset(preset) if part == "whole" else Config.preset(preset).text_only()
    theirs = peer_config(config)
    same_fields(config, theirs)
    assert Config.from_dict(theirs.to_dict()) == config
    assert Config.from_dict(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize("text", [TINY, TINY_DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(attention_bias=True, linear_conv_kernel_dim=2, layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR]),
        dict(tie_word_embeddings=True, num_hidden_layers=2, full_attention_interval=2),
    ],
    ids=["plain", "bias", "tied"],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_tensors_equal_those_of_transformers_classes(text: dict[str, Any], changes: dict[str, Any], form: str) -> None:
    import torch
    import transformers

    values = text if form == "flat" else nested(text)
    config = Config.from_dict(values).replace(**changes)
    name = config.architectures[0]
    assert name.endswith("ForCausalLM" if form == "flat" else "ForConditionalGeneration")
    with torch.device("meta"):
        model = getattr(transformers, name)(peer_config(config))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert {t.name: t.shape for t in config.tensor_shapes()} == theirs
    assert config.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "qwen3_5_text"])
def test_defaults_equal_transformers_except_the_context_length(kind: str) -> None:
    import transformers

    ours = TextConfig(model_type=kind)
    theirs = transformers.Qwen3_5MoeTextConfig() if ours.is_moe else transformers.Qwen3_5TextConfig()
    assert theirs.layer_types and theirs.rope_parameters
    their_values = theirs.to_dict() | {"layer_types": tuple(theirs.layer_types)}
    differing = {name for name, value in their_values.items() if getattr(ours, name, value) != value}
    assert differing == {"max_position_embeddings", "rope_parameters"}  # ours has more keys, see below
    assert ours.rope_parameters == theirs.rope_parameters | {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    assert ours.max_position_embeddings == 262144
    assert Config.from_dict({"model_type": kind}).text_config == ours


@pytest.mark.parametrize("inner", [None, True, False])
@pytest.mark.parametrize("outer", [None, True, False])
def test_tying_follows_the_same_keys_as_in_transformers(outer: bool | None, inner: bool | None) -> None:
    import torch
    import transformers

    values = nested()
    if outer is not None:
        values["tie_word_embeddings"] = outer
    if inner is not None:
        values["text_config"]["tie_word_embeddings"] = inner
    config = Config.from_dict(values)
    with torch.device("meta"):
        whole = transformers.Qwen3_5MoeForConditionalGeneration(transformers.Qwen3_5MoeConfig(**copy.deepcopy(values)))
    assert whole.config.tie_word_embeddings == config.tie_word_embeddings == (outer is True)
    assert config.text_only().tie_word_embeddings == (inner is True)
    has_head = "lm_head.weight" in {t.name for t in config.tensor_shapes()}
    assert has_head == ("lm_head.weight" in dict(whole.named_parameters()))
