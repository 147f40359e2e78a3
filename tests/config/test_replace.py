"""Changed copies of a configuration, and assignments that are refused."""

from __future__ import annotations

import copy
import json

import pytest

from qwen35moe.config import Config, ConfigError, TextConfig, VisionConfig
from tests.support.configs import (
    FULL,
    LINEAR,
    TINY,
    TINY_DENSE,
    nested,
)

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


def test_a_period_is_detected_without_its_key() -> None:
    every_third = TINY | {"num_hidden_layers": 6, "layer_types": [LINEAR, LINEAR, FULL] * 2}
    config = Config.from_dict(every_third)
    assert config.text_config.full_attention_interval == 3
    assert config.replace(num_hidden_layers=9).text_config.layer_types == (LINEAR, LINEAR, FULL) * 3
    # full_attention_interval is ignored if layer_types do not follow it
    assert Config.from_dict(every_third | {"full_attention_interval": 4}) == config


def test_an_aperiodic_pattern_is_truncated_and_never_extended() -> None:
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
    text_only = config.replace(vision_config=None)
    assert text_only.vision_config is None and text_only.architectures == ["Qwen3_5MoeForCausalLM"]
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


def test_replace_converts_between_dense_and_moe() -> None:
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


def test_a_checked_configuration_is_fixed_and_errors_name_replace() -> None:
    config = Config.from_dict(nested())
    text, vision = config.text_config, config.vision_config
    for part, name in (
        (text, "tie_word_embeddings"), (text, "num_experts"), (config, "num_experts"), (vision, "depth"),
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
    # a text-only copy has its own run-time keys
    config.text_only().use_cache = True  # type: ignore[misc]
    assert not config.use_cache


def test_derived_sizes() -> None:
    text = TextConfig(**TINY)
    assert (text.key_dim, text.value_dim, text.conv_dim, text.rotary_dim) == (30, 126, 186, 4)
    assert text.is_moe and text.layer_types == (LINEAR, LINEAR, LINEAR, FULL, LINEAR)
    assert VisionConfig().head_dim == 72
    dense = TextConfig(**TINY_DENSE, output_router_logits=True)
    assert TextConfig.from_dict(json.loads(dense.to_json_string())) == dense
