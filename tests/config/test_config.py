"""Configurations: what is read, what is refused and how, what may change, and the arithmetic of every published size.

The files in data/configs are the published config.json files (`reconstructed--` and `derived--`: see the facts they
were made from: dimensions of secondary sources, confirmed by published parameter counts).
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest

from qwen35moe.config import Config, ConfigError, RopeParameters, TextConfig, VisionConfig
from qwen35moe.config.keys import FIXED_TEXT, INERT, INERT_TOP, INERT_VISION
from qwen35moe.config.reading import MAX_FILE_BYTES

FILES = Path(__file__).parents[1] / "data" / "configs"
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
LINEAR, FULL = "linear_attention", "full_attention"

# Pairwise different, so that no size can stand in for another.
TINY: dict[str, Any] = dict(
    model_type="qwen3_5_moe_text", vocab_size=61, hidden_size=24, num_hidden_layers=5, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=3, linear_num_value_heads=9, linear_key_head_dim=10,
    linear_value_head_dim=14, linear_conv_kernel_dim=4, num_experts=7, num_experts_per_tok=2, moe_intermediate_size=11,
    shared_expert_intermediate_size=13,
)  # fmt: skip
TINY_DENSE = {key: value for key, value in TINY.items() if "expert" not in key and "moe_" not in key}
TINY_DENSE |= dict(model_type="qwen3_5_text", intermediate_size=29)
TINY_VISION: dict[str, Any] = dict(
    depth=2, hidden_size=32, intermediate_size=20, num_heads=4, patch_size=4, num_position_embeddings=9
)


def published(name: str = "Qwen3.5-35B-A3B") -> dict[str, Any]:
    path = FILES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    return json.loads(path.read_text())


def nested(text: dict[str, Any] = TINY, **top: Any) -> dict[str, Any]:
    vision = TINY_VISION | {"out_hidden_size": text["hidden_size"]}
    return {"model_type": str(text["model_type"]).removesuffix("_text"), "text_config": dict(text),
            "vision_config": vision} | top  # fmt: skip


def refused(given: Any, *parts: str) -> str:
    """The message with which a configuration is refused; it must contain all the parts."""
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(given)
    message = str(caught.value)
    assert all(part in message for part in parts), f"{parts} not all in: {message}"
    return message


# ---------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_published_file_is_read_and_is_its_preset(name: str) -> None:
    file = published(name)
    before = copy.deepcopy(file)
    config = Config.from_pretrained(FILES / f"{name}.json")
    assert config == Config.from_dict(file) == Config.preset(PRESET_OF[name])
    assert file == before, "reading must not change what it was given"


@pytest.mark.parametrize("name", PRESET_OF)
def test_every_key_of_a_published_file_is_written_again(name: str) -> None:
    """But for notes, keys that allow one value or none, and the tower's old model_type."""
    file, written = published(name), Config.from_dict(published(name)).to_dict()
    left_out = {"transformers_version", "_note", "mlp_only_layers", "partial_rotary_factor"}
    for part in ("text_config", "vision_config", None):
        old, new = (file[part], written[part]) if part else (file, written)
        changed = {key for key in old if key not in new or old[key] != new[key]} - left_out
        changed -= {"text_config", "vision_config"} if part is None else set()
        assert changed <= ({"model_type"} if part == "vision_config" else set()), changed
    assert written["vision_config"]["model_type"] == file["model_type"] + "_vision"


def test_the_fp8_file_keeps_its_quantization_config_as_it_is() -> None:
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
    for each in (config, config.text_only()):
        assert Config.from_dict(each.to_dict()) == each
        assert Config.from_dict(json.loads(each.to_json_string())) == each
    assert TextConfig.from_dict(config.text_config.to_dict()) == config.text_config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_presets_are_found_by_their_published_names() -> None:
    assert Config.preset("Qwen/Qwen3.5-35B-A3B") == Config.preset("35B-A3B") == Config.preset("35b-a3b")
    assert Config.preset("Qwen3.8-2.4T-A95B").is_flat
    with pytest.raises(ConfigError, match="close are 35b-a3b"):
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
def test_parameter_counts_are_the_published_ones(preset: str) -> None:
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
        ("3.6-35b-a3b", 1045, 71_903_645_408, dict(islands="BF16")),
        ("9b", 775, 19_306_216_416, {}),
        ("3.8-2.4t-a95b", 1609, 4_892_365_451_008, dict(islands="BF16")),
    ],
)
def test_tensors_and_bytes_are_those_of_the_published_repositories(
    preset: str, tensors: int, size: int, how: dict[str, Any]
) -> None:
    found = list(Config.preset(preset).tensor_shapes(mtp=True, **how))
    assert len({t.name for t in found}) == len(found) == tensors
    assert sum(prod(t.shape) * {"BF16": 2, "F32": 4}[t.dtype] for t in found) == size


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
    for wrong in (dict(experts="packed"), dict(mtp_experts="packed"), dict(islands="packed")):
        with pytest.raises(ValueError, match="packed"):
            list(Config.preset("4b").tensor_shapes(**wrong))


@pytest.mark.parametrize(
    ("preset", "islands", "tensors", "scales", "size"),
    [
        ("397b-a17b", "F32", 189_042, 94_078, 406_125_181_280),
        ("3.6-35b-a3b", "BF16", 64_196, 31_745, 37_454_789_472),
    ],
)
def test_the_fp8_repositories_follow_from_the_same_description(
    preset: str, islands: str, tensors: int, scales: int, size: int
) -> None:
    """A quantised weight takes one byte per number, and a BF16 scale per 128 x 128 block beside it."""
    count = total = scale_count = 0
    for name, shape, dtype in Config.preset(preset).tensor_shapes(
        mtp=True, experts="per_expert", mtp_experts="per_expert", islands=islands
    ):
        kept = ("in_proj_a", "in_proj_b", "conv1d", "norm", "gate.weight", "shared_expert_gate", "A_log", "dt_bias")
        quantised = ".layers." in name and not any(part in name.split("mlp.experts")[0] for part in kept)
        count, total = count + 1, total + prod(shape) * (1 if quantised else {"BF16": 2, "F32": 4}[dtype])
        if quantised:
            scale_count, total = scale_count + 1, total + 2 * prod(-(-side // 128) for side in shape)
    assert (count + scale_count, scale_count, total) == (tensors, scales, size)


# ---------------------------------------------------------------------------------------------------- transformers


def peer_config(config: Config) -> Any:
    import transformers

    classes = {
        "qwen3_5_moe": transformers.Qwen3_5MoeConfig,
        "qwen3_5_moe_text": transformers.Qwen3_5MoeTextConfig,
        "qwen3_5": transformers.Qwen3_5Config,
        "qwen3_5_text": transformers.Qwen3_5TextConfig,
    }
    return classes[config.model_type](**config.to_dict())


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
def test_tensors_are_those_of_transformers_classes(text: dict[str, Any], changes: dict[str, Any], form: str) -> None:
    import torch
    import transformers

    given = text if form == "flat" else nested(text)
    config = Config.from_dict(given).replace(**changes)
    name = config.architectures[0]
    assert name.endswith("ForCausalLM" if form == "flat" else "ForConditionalGeneration")
    with torch.device("meta"):
        model = getattr(transformers, name)(peer_config(config))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert {t.name: t.shape for t in config.tensor_shapes()} == theirs
    assert config.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "qwen3_5_text"])
def test_defaults_are_transformers_but_for_the_context_length(kind: str) -> None:
    import transformers

    ours = TextConfig(model_type=kind)
    theirs = transformers.Qwen3_5MoeTextConfig() if ours.is_moe else transformers.Qwen3_5TextConfig()
    assert theirs.layer_types and theirs.rope_parameters
    theirs_says = theirs.to_dict() | {"layer_types": tuple(theirs.layer_types)}
    differing = {name for name, value in theirs_says.items() if getattr(ours, name, value) != value}
    assert differing == {"max_position_embeddings", "rope_parameters"}  # the latter only says more, see below
    assert ours.rope_parameters == theirs.rope_parameters | {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    assert ours.max_position_embeddings == 262144
    assert Config.from_dict({"model_type": kind}).text_config == ours


@pytest.mark.parametrize("inner", [None, True, False])
@pytest.mark.parametrize("outer", [None, True, False])
def test_tying_is_decided_where_transformers_decides_it(outer: bool | None, inner: bool | None) -> None:
    import torch
    import transformers

    given = nested()
    if outer is not None:
        given["tie_word_embeddings"] = outer
    if inner is not None:
        given["text_config"]["tie_word_embeddings"] = inner
    config = Config.from_dict(given)
    with torch.device("meta"):
        whole = transformers.Qwen3_5MoeForConditionalGeneration(transformers.Qwen3_5MoeConfig(**copy.deepcopy(given)))
    assert whole.config.tie_word_embeddings == config.tie_word_embeddings == (outer is True)
    assert config.text_only().tie_word_embeddings == (inner is True)
    has_head = "lm_head.weight" in {t.name for t in config.tensor_shapes()}
    assert has_head == ("lm_head.weight" in dict(whole.named_parameters()))


# ---------------------------------------------------------------------------------------------------- forms of a file


def test_a_flat_file_is_a_text_model() -> None:
    config = Config.from_dict(TINY | {"architectures": ["Qwen3_5MoeForCausalLM"], "quantization_config": {"a": 1}})
    assert config.vision_config is None and config.is_flat and config.quantization_config == {"a": 1}
    assert config.text_config == TextConfig.from_dict(TINY) == TextConfig(**TINY)
    assert config == Config(text_config=TextConfig(**TINY), quantization_config={"a": 1})
    old_name = Config.from_dict(TINY | {"model_type": "qwen3_5_moe", "quantization_config": {"a": 1}})
    assert old_name == config


def test_a_nested_file_without_vision_stays_nested() -> None:
    given = nested()
    del given["vision_config"]
    config = Config.from_dict(given)
    assert config.vision_config is None and config.model_type == "qwen3_5_moe" and not config.is_flat
    assert "vision_config" not in config.to_dict() and Config.from_dict(config.to_dict()) == config
    assert next(config.tensor_shapes()).name == "model.language_model.embed_tokens.weight"


def test_dense_and_moe_are_told_apart() -> None:
    dense = Config.from_dict(TINY_DENSE)
    assert not dense.text_config.is_moe and dense.text_config.num_experts == 0
    assert "num_experts" not in dense.to_dict()
    assert TextConfig(num_experts=0, intermediate_size=8).model_type == "qwen3_5_text"
    without_name = {key: value for key, value in TINY_DENSE.items() if key != "model_type"}
    assert Config.from_dict(without_name) == dense
    assert Config.from_dict({key: value for key, value in TINY.items() if key != "model_type"}).text_config.is_moe
    refused({"hidden_size": 24}, "model_type is missing")
    refused(TINY_DENSE | {"num_experts": 4}, "num_experts", "4", "dense")
    refused(TINY | {"num_experts": 0}, "num_experts", "qwen3_5_moe_text")
    refused(nested(model_type="qwen3_5"), "qwen3_5", "qwen3_5_moe_text")
    refused(TINY | {"model_type": "qwen4_exp"}, "qwen4_exp", "qwen3_5_moe")


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_5_moe_vision", "qwen3_5", "qwen3_5_vision"])
def test_the_tower_goes_by_all_its_names(name: str) -> None:
    given = nested()
    given["vision_config"]["model_type"] = name
    assert Config.from_dict(given) == Config.from_dict(nested())
    given["vision_config"]["model_type"] = "qwen3_vl"
    refused(given, "qwen3_vl")


def test_the_keys_that_later_members_add() -> None:
    """Qwen3.6-27B and 3.8-27B: their file is the preset's with keys that change nothing."""
    given = Config.preset("3.6-27b").to_dict() | {"language_model_only": False, "transformers_version": "4.57.1"}
    given["text_config"] |= {"output_gate_type": "swish", "partial_rotary_factor": 0.25, "pad_token_id": None}
    assert Config.from_dict(given) == Config.preset("3.6-27b")


def test_copies_of_text_keys_beside_text_config() -> None:
    """Scripts look for num_experts at the top level; a copy is fine while it says the same."""
    text = Config.from_dict(nested(num_experts=7, hidden_size=24, norm_topk_prob=True, eos_token_id=3)).text_config
    assert text == Config.from_dict(nested()).text_config
    refused(nested(num_experts=8), "num_experts = 8", "7")
    refused(nested(output_router_logits=True), "output_router_logits", "False")
    refused(nested(norm_topk_prob=False), "norm_topk_prob")
    refused(nested(rope_theta=1e6), "rope_theta", "1000000", "10000.0")
    refused(TINY | {"vision_config": TINY_VISION}, "vision_config", "text_config")


def test_dtype_under_both_names_and_at_both_places() -> None:
    import torch

    assert Config.from_dict(TINY | {"torch_dtype": "float16"}).dtype == "float16"
    assert Config.from_dict(TINY | {"torch_dtype": "float16", "dtype": "float32"}).dtype == "float32"
    assert Config.from_dict(nested(TINY | {"dtype": "bfloat16"}, dtype="float32")).dtype == "float32"
    assert TextConfig.from_dict({"dtype": torch.bfloat16}).dtype == "bfloat16"
    assert {t.dtype for t in Config.from_dict(TINY | {"dtype": "float32"}).tensor_shapes()} == {"F32"}
    refused(TINY | {"dtype": "int3"}, "int3", "bfloat16")


# ---------------------------------------------------------------------------------------------------- rotary parameters

YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144, "mrope_interleaved": True,
    "mrope_section": [11, 11, 10], "rope_theta": 10000000, "partial_rotary_factor": 0.25,
}  # fmt: skip


def test_rope_scaling_is_another_name_for_rope_parameters() -> None:
    plain = published()
    by_new, by_old, beside = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    by_new["text_config"]["rope_parameters"] = YARN
    del by_old["text_config"]["rope_parameters"]
    by_old["text_config"]["rope_scaling"] = YARN
    beside["text_config"]["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    config = Config.from_dict(by_new)
    assert config == Config.from_dict(by_old) == Config.from_dict(beside)
    assert config == Config.preset("35b-a3b").replace(rope_scaling=YARN)
    assert config.text_config.rope == RopeParameters(
        rope_type="yarn", rope_theta=1e7, factor=4.0, original_max_position_embeddings=262144
    )
    assert peer_config(config).text_config.rope_parameters["factor"] == 4.0
    assert Config.from_dict(peer_config(config).to_dict()) == config


def test_flat_rotary_keys_are_read_and_must_agree() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    beside = TINY | {"rope_parameters": rope, "rope_theta": 500000, "partial_rotary_factor": 0.5}
    assert Config.from_dict(beside) == Config.from_dict(TINY | {"rope_parameters": rope})
    assert Config.from_dict(TINY | {"rope_theta": 5e5, "partial_rotary_factor": 0.5}) == Config.from_dict(beside)
    refused(beside | {"rope_theta": 1e6}, "rope_theta", "1000000", "500000")
    refused(beside | {"partial_rotary_factor": 0.25}, "partial_rotary_factor", "0.25", "0.5")
    refused(TINY | {"rope_parameters": rope, "rope_scaling": {"rope_theta": 1e6}}, "rope_theta", "1000000", "500000")
    refused(TINY | {"rope_parameters": {"type": "default", "rope_type": "yarn"}}, "type", "default", "yarn")


@pytest.mark.parametrize(
    ("rope", "parts"),
    [
        ({"rope_type": "linear", "factor": 2.0}, ("rope_type", "linear", "default", "yarn")),
        ({"rope_type": "mrope"}, ("rope_type", "mrope")),
        ({"mrope_interleaved": False}, ("mrope_interleaved", "False", "True")),
        ({"factor": 2.0}, ("factor", "no effect", "yarn")),
        ({"rope_type": "yarn"}, ("factor",)),
        ({"rope_type": "yarn", "factor": 0.5}, ("factor", "0.5")),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, ("rope_theta", "1.0")),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, ("beta_fast", "1.0", "2.0")),
        ({"rope_theta": 0}, ("rope_theta", "0")),
        ({"rope_theta": float("nan")}, ("rope_theta", "nan")),
        ({"rope_theta": 10**400}, ("rope_theta",)),
        ({"partial_rotary_factor": 1.5}, ("partial_rotary_factor", "1.5")),
        ({"mrope_section": [4, 4]}, ("mrope_section", "2", "3")),
        ({"mrope_section": [4, -1, 4]}, ("mrope_section[1]", "-1")),
        ({"mrope_section": 8}, ("mrope_section", "8")),
        ({"rope_thetta": 1e7}, ("rope_thetta", "rope_theta")),
        ([1e7], ("rope_parameters", "list")),
    ],
)
def test_rotary_parameters_that_cannot_be_honoured(rope: Any, parts: tuple[str, ...]) -> None:
    refused(TINY | {"rope_parameters": rope}, *parts)


@pytest.mark.parametrize("sections", [[11, 11, 10], [1, 0, 0], [40, 50, 60], [0, 0, 0]])
def test_any_sum_of_sections_is_accepted_as_in_transformers(sections: list[int]) -> None:
    config = Config.from_dict(TINY | {"rope_parameters": {"rope_type": "default", "mrope_section": sections}})
    assert config.text_config.rope.mrope_section == tuple(sections)
    assert Config.from_dict(peer_config(config).to_dict()) == config


def test_replacing_rotary_parameters_keeps_what_is_not_named() -> None:
    plain = Config.preset("35b-a3b")
    long = plain.replace(rope_parameters={"rope_type": "yarn", "factor": 2})
    assert long.text_config.rope.rope_theta == 1e7 and long.text_config.rope.original_max_position_embeddings == 262144
    assert long.replace(rope_parameters={"rope_type": "default"}) == plain
    assert long.replace(rope_parameters=None) == long
    with pytest.raises(ConfigError, match="rope_scaling"):
        plain.replace(rope_parameters=YARN, rope_scaling=YARN)
    assert plain.replace(rope_theta=1e6).text_config.rope == RopeParameters(rope_theta=1e6)
    assert plain.text_config.rotary_dim == 64


# ---------------------------------------------------------------------------------------------------- keys


def test_unknown_keys_are_refused_together_with_close_names() -> None:
    message = refused(TINY | {"num_expert": 4, "moe_intermediate_siz": 8}, "num_expert = 4", "moe_intermediate_siz = 8")
    assert "num_experts" in message and "moe_intermediate_size" in message
    refused(nested(TINY | {"quik": 1}), "text_config", "quik")
    refused(nested(image_tokn_id=1), "image_tokn_id", "image_token_id")
    vision = nested()
    vision["vision_config"]["window_size"] = 8
    refused(vision, "vision_config", "window_size")
    refused({**TINY, **{f"k{i}": 1 for i in range(50)}}, "and 30 more")


def test_inert_keys_are_listed_with_a_reason_and_change_nothing() -> None:
    plain = Config.from_dict(nested())
    noted: dict[str, Any] = nested() | {"_private_note": [1], "unknown_but_null": None}
    noted |= dict.fromkeys(INERT_TOP, "anything")
    noted["text_config"] |= dict.fromkeys(INERT, "anything")
    noted["vision_config"] |= dict.fromkeys(INERT_VISION, "anything")
    assert Config.from_dict(noted) == plain
    assert all(len(reason) > 10 for reason in (INERT | INERT_TOP | INERT_VISION).values())
    fields = set(TextConfig(**TINY).to_dict()) | {"intermediate_size"}
    assert not fields & set(INERT)


UNSUPPORTED = {
    "hidden_act": "gelu",
    "attn_output_gate": False,
    "output_gate_type": "sigmoid",
    "mamba_ssm_dtype": "bfloat16",
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
    "moe_layer_freq": 2,
    "norm_topk_prob": False,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "mtp_use_dedicated_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "is_causal": False,
    "per_layer_config": {"0": {}},
}


def test_every_key_with_one_supported_value_is_tried() -> None:
    assert set(UNSUPPORTED) == set(FIXED_TEXT) | {"hidden_act"}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_values_that_would_change_the_mathematics_are_refused(key: str) -> None:
    value = UNSUPPORTED[key]
    refused(TINY | {key: value}, key, repr(value), "implements")
    refused(nested(TINY | {key: value}), key, repr(value))
    with pytest.raises(ConfigError, match=key):
        Config.from_dict(nested()).replace(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "silu"),
        ("deepstack_visual_indexes", [8, 16]),
        ("rope_parameters", {"rope_type": "axial", "rope_theta": 20000.0}),
        ("rope_parameters", {"rope_type": "axial", "factor": 2.0}),
    ],
)
def test_unsupported_values_of_the_tower(key: str, value: Any) -> None:
    given = nested()
    given["vision_config"][key] = value
    refused(given, key)


def test_supported_spellings_are_accepted() -> None:
    given = dict(output_gate_type="swish", mlp_only_layers=[], norm_topk_prob=True, decoder_sparse_step=1,
                 attn_output_gate=True, mamba_ssm_dtype="float32", sliding_window=None)  # fmt: skip
    assert Config.from_dict(TINY | given) == Config.from_dict(TINY)
    refused(TINY | {"decoder_sparse_step": True}, "decoder_sparse_step", "True")  # true is not 1
    refused(TINY | {"norm_topk_prob": 1}, "norm_topk_prob", "1")


# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "changes",
    [
        dict(linear_conv_kernel_dim=2),
        dict(linear_conv_kernel_dim=1),
        dict(linear_key_head_dim=7, linear_value_head_dim=5),
        dict(layer_types=[FULL, LINEAR, FULL, FULL, LINEAR]),
        dict(layer_types=[FULL] * 5),
        dict(layer_types=[LINEAR] * 5),
        dict(full_attention_interval=9),
        dict(num_attention_heads=15, num_key_value_heads=5),
        dict(linear_num_key_heads=1, linear_num_value_heads=11),
        dict(num_key_value_heads=1),
        dict(num_experts=2, num_experts_per_tok=2),
        dict(num_experts=1, num_experts_per_tok=1),
        dict(head_dim=40, partial_rotary_factor=1.0),
        dict(num_hidden_layers=1),
        dict(attention_bias=True, attention_dropout=0.5),
        dict(mtp_num_hidden_layers=3),
        dict(eos_token_id=[3, 5], pad_token_id=0, bos_token_id=999),
        dict(intermediate_size=77),
    ],
)
def test_sizes_that_transformers_accepts_are_accepted(changes: dict[str, Any]) -> None:
    config = Config.from_dict(TINY | changes)
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(peer_config(config).to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(num_attention_heads=5), ("num_attention_heads = 5", "num_key_value_heads = 2")),
        (dict(linear_num_value_heads=10), ("linear_num_value_heads = 10", "linear_num_key_heads = 3")),
        (dict(num_experts_per_tok=8), ("num_experts_per_tok = 8", "num_experts = 7")),
        (dict(layer_types=[FULL, LINEAR]), ("layer_types has 2", "num_hidden_layers = 5")),
        (dict(layer_types=["sliding_attention"] * 5), ("layer_types", "sliding_attention", LINEAR)),
        (dict(layer_types=[LINEAR, 1, LINEAR, FULL, LINEAR]), ("layer_types[1]", "1")),
        (dict(layer_types="full"), ("layer_types", "list")),
        (dict(head_dim=20), ("head_dim = 20", "0.25", "5")),
        (dict(head_dim=3), ("head_dim = 3", "0.25", "0")),
        (dict(hidden_size=0), ("hidden_size = 0",)),
        (dict(hidden_size=-4), ("hidden_size = -4",)),
        (dict(hidden_size=True), ("hidden_size", "boolean")),
        (dict(hidden_size=24.0), ("hidden_size", "24.0", "number")),
        (dict(hidden_size="24"), ("hidden_size", "'24'", "string")),
        (dict(hidden_size=None), ("hidden_size", "null")),
        (dict(hidden_size=[24]), ("hidden_size", "list")),
        (dict(hidden_size=10**5000), ("hidden_size", "bits")),
        (dict(num_hidden_layers=10**9), ("num_hidden_layers", "10000")),
        (dict(num_hidden_layers=0), ("num_hidden_layers = 0",)),
        (dict(vocab_size=2**31 - 1, hidden_size=2**31 - 1), ("parameters", "1e+14")),
        (dict(num_experts=2**31 - 1, moe_intermediate_size=10**6), ("parameters", "1e+14")),
        (dict(linear_num_value_heads=3 * 10**8, linear_value_head_dim=10**8), ("parameters",)),
        (dict(mtp_num_hidden_layers=5000, num_experts=10**9), ("parameters",)),
        (dict(linear_conv_kernel_dim=0), ("linear_conv_kernel_dim = 0",)),
        (dict(shared_expert_intermediate_size=0), ("shared_expert_intermediate_size = 0",)),
        (dict(full_attention_interval=0), ("full_attention_interval = 0",)),
        (dict(rms_norm_eps=0), ("rms_norm_eps",)),
        (dict(rms_norm_eps=float("nan")), ("rms_norm_eps", "nan")),
        (dict(rms_norm_eps=float("inf")), ("rms_norm_eps", "inf")),
        (dict(rms_norm_eps=True), ("rms_norm_eps", "boolean")),
        (dict(attention_dropout=1.5), ("attention_dropout = 1.5",)),
        (dict(attention_bias=1), ("attention_bias", "1")),
        (dict(router_aux_loss_coef="0.1"), ("router_aux_loss_coef", "string")),
        (dict(eos_token_id="</s>"), ("eos_token_id", "</s>")),
        (dict(eos_token_id=[1, 2.5]), ("eos_token_id[1]", "2.5")),
        (dict(quantization_config=["fp8"]), ("quantization_config", "fp8")),
        (dict(architectures="Qwen"), ("architectures", "Qwen")),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_with_both_values(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(TINY | changes, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(num_heads=5), ("vision_config.hidden_size = 32", "num_heads = 5")),
        (dict(hidden_size=24), ("hidden_size = 24", "num_heads = 4", "6", "multiple of 4")),
        (dict(out_hidden_size=25), ("out_hidden_size = 25", "hidden_size = 24")),
        (dict(depth=0), ("vision_config.depth = 0",)),
        (dict(patch_size=[16, 16]), ("vision_config.patch_size", "list")),
        (dict(intermediate_size=2**31 - 1, hidden_size=2**20), ("parameters",)),
    ],
)
def test_impossible_towers_are_refused(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    given = nested()
    given["vision_config"] |= changes
    refused(given, *parts)


def test_the_tower_ends_at_the_width_of_the_text() -> None:
    given = nested()
    del given["vision_config"]["out_hidden_size"]
    assert Config.from_dict(given) == Config.from_dict(nested())
    assert Config(text_config=TextConfig(), vision_config=VisionConfig()).num_parameters() == 35_107_181_936


# ---------------------------------------------------------------------------------------------------- untrusted files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1, 2]", "not an object"),
        ("null", "not an object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' * 300 + "1" + "}" * 300, "nested"),
        ('{"model_type": "qwen3_5_text", "vocab_size": 3, "vocab_size": 4}', "stands twice"),
        ('{"model_type": "qwen3_5_text", "rms_norm_eps": NaN}', "rms_norm_eps"),
        ('{"model_type": "qwen3_5_text", "rms_norm_eps": 1e999}', "rms_norm_eps"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, content: str | bytes, part: str) -> None:
    write(tmp_path / "config.json", content)
    with pytest.raises(ConfigError, match=part):
        Config.from_pretrained(tmp_path)


def test_what_is_not_a_file_of_reasonable_size_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at .*preset"):
        Config.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no configuration"):
        Config.from_pretrained("a\0b")
    big = tmp_path / "config.json"
    with big.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    with pytest.raises(ConfigError, match=str(MAX_FILE_BYTES)):
        Config.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(ConfigError, match="regular file"):
        Config.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("given", [None, [], "x", 3, {1: 2}, {"text_config": 3}, {"text_config": {"a": 1, 2: 3}}, {}])
def test_what_is_not_an_object_is_refused(given: Any) -> None:
    refused(given)


def test_no_mutation_of_a_file_raises_anything_but_config_error() -> None:
    """Values of wrong types, sizes and places: either the configuration is usable or the error is a ConfigError."""
    rng = random.Random(0)
    junk: list[Any] = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**400, -(10**30), 0.5, float("nan"), float("inf")]
    junk += ["", "x", "silu", "qwen3_5", [], [1], [LINEAR], ["x"] * 40, [[[]]], {}, {"a": {"b": []}}, {"factor": 2}]
    junk += [{"rope_type": "yarn"}]
    keys = [*TINY, *FIXED_TEXT, *TINY_VISION, "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "dtype"]
    keys += ["text_config", "vision_config", "tie_word_embeddings", "quantization_config", "architectures", "use_cache"]
    keys += ["image_token_id", "eos_token_id", "mtp_num_hidden_layers", "attention_dropout", "torch_dtype"]
    usable = 0
    for _ in range(1500):
        given = nested(rng.choice([TINY, TINY_DENSE])) if rng.random() < 0.7 else dict(TINY)
        for _ in range(rng.choice([1, 1, 2])):
            part = rng.choice([given, given.get("text_config"), given.get("vision_config")])
            if isinstance(part, dict):
                part[rng.choice(keys)] = rng.choice(junk)
        try:
            config = Config.from_dict(given)
        except ConfigError as error:
            assert 10 < len(str(error)) < 2000
        else:
            usable += 1
            assert Config.from_dict(config.to_dict()) == config and config.num_parameters() > 0
    assert 100 < usable < 1200


# ---------------------------------------------------------------------------------------------------- replace


def test_layer_types_follow_the_number_of_layers() -> None:
    config = Config.preset("35b-a3b")
    short = config.replace(num_hidden_layers=8, num_experts=32)
    assert short.text_config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert short.text_config.num_experts == 32 and config.text_config.num_experts == 256
    assert short.replace(num_hidden_layers=40, num_experts=256) == config
    assert config.replace(num_hidden_layers=44).text_config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 11
    by_two = config.replace(num_hidden_layers=6, full_attention_interval=2)
    assert by_two.text_config.layer_types == (LINEAR, FULL) * 3
    assert by_two.replace(num_hidden_layers=4).text_config.layer_types == (LINEAR, FULL) * 2


def test_a_period_is_recognised_without_its_key() -> None:
    every_third = TINY | {"num_hidden_layers": 6, "layer_types": [LINEAR, LINEAR, FULL] * 2}
    config = Config.from_dict(every_third)
    assert config.text_config.full_attention_interval == 3
    assert config.replace(num_hidden_layers=9).text_config.layer_types == (LINEAR, LINEAR, FULL) * 3
    # a key left over from the file that layer_types no longer follow says nothing
    assert Config.from_dict(every_third | {"full_attention_interval": 4}) == config


def test_an_aperiodic_pattern_is_truncated_and_never_invented() -> None:
    config = Config.from_dict(TINY | {"layer_types": [FULL, LINEAR, LINEAR, FULL, LINEAR]})
    assert config.text_config.full_attention_interval is None
    assert "full_attention_interval" not in config.to_dict()
    assert config.replace(num_hidden_layers=3).text_config.layer_types == (FULL, LINEAR, LINEAR)
    with pytest.raises(ConfigError, match=r"num_hidden_layers = 6 is more than the 5.*layer_types"):
        config.replace(num_hidden_layers=6)
    assert config.replace(layer_types=[FULL, LINEAR]).text_config.num_hidden_layers == 2
    assert config.replace(full_attention_interval=4) == Config.from_dict(TINY)


def test_replace_reaches_every_level() -> None:
    config = Config.from_dict(nested())
    wider = config.replace(hidden_size=40, vision_config={"depth": 3}, image_token_id=5, use_cache=False)
    assert wider.vision_config is not None and wider.text_config.hidden_size == 40
    assert (wider.vision_config.out_hidden_size, wider.vision_config.depth) == (40, 3)
    assert wider.image_token_id == 5 and not wider.use_cache
    assert config.replace() == config and config.replace().text_config is not config.text_config
    tied = config.replace(tie_word_embeddings=True)
    assert tied.tie_word_embeddings and tied.text_config.tie_word_embeddings and tied.text_only().tie_word_embeddings
    blind = config.replace(vision_config=None)
    assert blind.vision_config is None and blind.architectures == ["Qwen3_5MoeForCausalLM"]
    assert config.replace(torch_dtype="float32").dtype == "float32"
    assert config.replace(text_config=TextConfig(**TINY_DENSE)).model_type == "qwen3_5"
    flat = Config.from_dict(TINY)
    assert flat.replace(text_config={"tie_word_embeddings": True}).tie_word_embeddings
    with pytest.raises(ConfigError, match="num_expert = 3.*num_experts"):
        config.replace(num_expert=3)
    with pytest.raises(ConfigError, match="layer_types = 3 must be a list"):
        config.replace(layer_types=3)
    with pytest.raises(ConfigError, match="num_experts_per_tok = 2 is more than num_experts = 1"):
        config.replace(num_experts=1)
    with pytest.raises(ConfigError, match="model_type"):
        flat.replace(vision_config=VisionConfig(out_hidden_size=24))


def test_a_dense_model_becomes_a_mixture_and_back() -> None:
    dense = Config.preset("4b")
    sparse = dense.replace(model_type="qwen3_5_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024,
                           shared_expert_intermediate_size=1024)  # fmt: skip
    assert sparse == Config.preset("moe-4.54b")
    assert sparse.replace(model_type="qwen3_5", intermediate_size=9216) == dense
    with pytest.raises(ConfigError, match="intermediate_size"):
        sparse.replace(model_type="qwen3_5")
    with pytest.raises(ConfigError, match="num_experts"):
        dense.replace(model_type="qwen3_5_moe")


def test_text_only() -> None:
    config = Config.preset("35b-a3b").text_only()
    assert config.is_flat and config.vision_config is None and config.model_type == "qwen3_5_moe_text"
    assert config.architectures == ["Qwen3_5MoeForCausalLM"] and config.text_only() == config
    assert config.num_parameters(active=True) == 3_454_988_928
    assert next(config.tensor_shapes()).name == "model.embed_tokens.weight"


# ---------------------------------------------------------------------------------------------------- fixed


def test_a_checked_configuration_is_fixed_and_says_the_way_out() -> None:
    config = Config.from_dict(nested())
    text, vision = config.text_config, config.vision_config
    for part, name in (
        (config, "tie_word_embeddings"), (text, "num_experts"), (config, "num_experts"), (vision, "depth"),
        (config, "text_config"), (text, "rope"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{name} cannot be assigned.*config\.replace\({name}="):
            setattr(part, name, 3)
    with pytest.raises(ConfigError, match="replace"):
        config.text_config.rope_parameters["rope_theta"] = 1.0
    with pytest.raises(ConfigError, match="deleted"):
        del config.text_config
    with pytest.raises(ConfigError, match="return_dict"):
        config.return_dict = False
    with pytest.raises(ConfigError, match="use_cache"):
        config.use_cache = "no"  # type: ignore[misc]
    config.text_config.num_experts = 7  # the value it has
    assert config == Config.from_dict(nested())


def test_run_time_keys_may_be_assigned_and_reach_the_text_model() -> None:
    config = Config.from_dict(nested())
    config.use_cache = False  # type: ignore[misc]
    config.output_router_logits = True  # type: ignore[misc]
    config.pad_token_id = 0  # type: ignore[misc]
    config.return_dict = True
    config._attn_implementation = "sdpa"  # type: ignore[assignment]
    config._name_or_path = "somewhere"
    text = config.text_config
    assert (text.use_cache, text.output_router_logits, text.pad_token_id) == (False, True, 0)
    assert config.get_text_config(decoder=True) is text and text.get_text_config() is text
    assert json.loads(config.to_json_string())["text_config"]["use_cache"] is False
    assert copy.deepcopy(config)._name_or_path == "somewhere"
    # a text-only copy has run-time keys of its own
    config.text_only().use_cache = True  # type: ignore[misc]
    assert not config.use_cache


def test_derived_sizes() -> None:
    text = TextConfig(**TINY)
    assert (text.key_dim, text.value_dim, text.conv_dim, text.rotary_dim) == (30, 126, 186, 4)
    assert text.is_moe and text.layer_types == (LINEAR, LINEAR, LINEAR, FULL, LINEAR)
    assert VisionConfig().head_dim == 72
    dense = TextConfig(**TINY_DENSE, output_router_logits=True)
    assert TextConfig.from_dict(json.loads(dense.to_json_string())) == dense
