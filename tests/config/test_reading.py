"""Reading a configuration: nested and flat files, rotary parameters, unknown and unsupported keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from qwen35moe.config import Config, ConfigError, GenerationConfig, RopeParameters, TextConfig
from qwen35moe.config.keys import FIXED_TEXT, INERT, INERT_TOP, INERT_VISION
from tests.support.configs import (
    TINY,
    TINY_DENSE,
    TINY_VISION,
    nested,
    peer_config,
    published,
    refused,
)

# ---------------------------------------------------------------------------------------------------- forms of a file


def test_a_flat_file_is_a_text_model() -> None:
    config = Config.from_dict(TINY | {"architectures": ["Qwen3_5MoeForCausalLM"], "quantization_config": {"a": 1}})
    assert config.vision_config is None and config.is_flat and config.quantization_config == {"a": 1}
    assert config.text_config == TextConfig.from_dict(TINY) == TextConfig(**TINY)
    assert config == Config(text_config=TextConfig(**TINY), quantization_config={"a": 1})
    old_name = Config.from_dict(TINY | {"model_type": "qwen3_5_moe", "quantization_config": {"a": 1}})
    assert old_name == config


def test_a_nested_file_without_vision_stays_nested() -> None:
    values = nested()
    del values["vision_config"]
    config = Config.from_dict(values)
    assert config.vision_config is None and config.model_type == "qwen3_5_moe" and not config.is_flat
    assert "vision_config" not in config.to_dict() and Config.from_dict(config.to_dict()) == config
    assert next(config.tensor_shapes()).name == "model.language_model.embed_tokens.weight"


def test_dense_and_moe_are_distinguished() -> None:
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
def test_the_tower_accepts_all_its_model_types(name: str) -> None:
    values = nested()
    values["vision_config"]["model_type"] = name
    assert Config.from_dict(values) == Config.from_dict(nested())
    values["vision_config"]["model_type"] = "qwen3_vl"
    refused(values, "qwen3_vl")


def test_keys_of_later_releases_are_accepted() -> None:
    """The files of Qwen3.6-27B and 3.8-27B are the preset's with additional keys that have no effect."""
    values = Config.preset("3.6-27b").to_dict() | {"language_model_only": False, "transformers_version": "4.57.1"}
    values["text_config"] |= {"output_gate_type": "swish", "partial_rotary_factor": 0.25, "pad_token_id": None}
    assert Config.from_dict(values) == Config.preset("3.6-27b")


def test_copies_of_text_keys_beside_text_config() -> None:
    """Scripts read num_experts at the top level; a copy with the same value is accepted."""
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
def test_unsupported_rotary_parameters_are_refused(rope: Any, parts: tuple[str, ...]) -> None:
    refused(TINY | {"rope_parameters": rope}, *parts)


@pytest.mark.parametrize("sections", [[11, 11, 10], [1, 0, 0], [40, 50, 60], [0, 0, 0]])
def test_any_sum_of_sections_is_accepted_as_in_transformers(sections: list[int]) -> None:
    config = Config.from_dict(TINY | {"rope_parameters": {"rope_type": "default", "mrope_section": sections}})
    assert config.text_config.rope.mrope_section == tuple(sections)
    assert Config.from_dict(peer_config(config).to_dict()) == config


def test_replacing_rotary_parameters_keeps_the_others() -> None:
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


def test_unknown_keys_are_refused_with_similar_names() -> None:
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


def test_every_key_with_one_supported_value_is_tested() -> None:
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
def test_unsupported_values_of_the_tower_are_refused(key: str, value: Any) -> None:
    values = nested()
    values["vision_config"][key] = value
    refused(values, key)


def test_supported_spellings_are_accepted() -> None:
    values = dict(output_gate_type="swish", mlp_only_layers=[], norm_topk_prob=True, decoder_sparse_step=1,
                  attn_output_gate=True, mamba_ssm_dtype="float32", sliding_window=None)  # fmt: skip
    assert Config.from_dict(TINY | values) == Config.from_dict(TINY)
    refused(TINY | {"decoder_sparse_step": True}, "decoder_sparse_step", "True")  # true is not 1
    refused(TINY | {"norm_topk_prob": 1}, "norm_topk_prob", "1")


def test_a_config_json_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    """Of another program, another family, a pipe; a link out of the folder is not read either."""
    config = Config.preset("35b-a3b")
    for content in ('{"port": 80}', '{"model_type": "bert"}', "not JSON", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match="config.json is not replaced"):
            config.save_pretrained(tmp_path)
        assert (tmp_path / "config.json").read_text() == content
    (tmp_path / "config.json").unlink()
    config.save_pretrained(tmp_path)
    config.replace(num_experts=32).save_pretrained(tmp_path)
    assert Config.from_pretrained(tmp_path).text_config.num_experts == 32
    (tmp_path / "config.json").rename(tmp_path / "outside")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="outside the folder: it is a link to"):
        Config.from_pretrained(tmp_path / "folder")
    assert Config.from_pretrained(tmp_path / "folder" / "config.json").text_config.num_experts == 32  # named by the user


@pytest.mark.parametrize("text", ['{"temperature": NaN}', '{"top_k": 1, "top_k": 2}', "[1]", "[" * 900, '{"top_p": 1e999}'])
def test_generation_settings_are_read_by_the_same_rule(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config.json is not a (readable|JSON)"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is not a readable generation_config.json: it is a link to"):
        GenerationConfig.from_pretrained(tmp_path)
    for path in ("", None):
        with pytest.raises(ValueError, match="path"):
            GenerationConfig().save_pretrained(path)  # type: ignore[arg-type]
