"""Checks of a configuration: impossible sizes, and untrusted files."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from qwen35moe.config import Config, ConfigError, TextConfig, VisionConfig
from qwen35moe.config.keys import FIXED_TEXT
from qwen35moe.config.reading import MAX_FILE_BYTES
from tests.support.configs import (
    FULL,
    LINEAR,
    TINY,
    TINY_DENSE,
    TINY_VISION,
    nested,
    peer_config,
    refused,
)

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
    values = nested()
    values["vision_config"] |= changes
    refused(values, *parts)


def test_the_tower_ends_with_the_width_of_the_text() -> None:
    values = nested()
    del values["vision_config"]["out_hidden_size"]
    assert Config.from_dict(values) == Config.from_dict(nested())
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
        ('{"model_type": "qwen3_5_text", "vocab_size": 3, "vocab_size": 4}', "occurs twice"),
        ('{"model_type": "qwen3_5_text", "rms_norm_eps": NaN}', "rms_norm_eps"),
        ('{"model_type": "qwen3_5_text", "rms_norm_eps": 1e999}', "rms_norm_eps"),
    ],
)
def test_a_broken_file_gives_one_clear_error(tmp_path: Path, content: str | bytes, part: str) -> None:
    write(tmp_path / "config.json", content)
    with pytest.raises(ConfigError, match=part):
        Config.from_pretrained(tmp_path)


def test_only_regular_files_of_limited_size_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at .*preset"):
        Config.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no configuration"):
        Config.from_pretrained("a\0b")
    big = tmp_path / "config.json"
    with big.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    with pytest.raises(ConfigError, match=str(MAX_FILE_BYTES)):
        Config.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    with pytest.raises(ConfigError, match="not a regular file"):
        Config.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("values", [None, [], "x", 3, {1: 2}, {"text_config": 3}, {"text_config": {"a": 1, 2: 3}}, {}])
def test_only_objects_are_accepted(values: Any) -> None:
    refused(values)


def test_no_mutation_of_a_file_raises_anything_but_config_error() -> None:
    """Values of wrong types, sizes and positions: the configuration is usable, or the error is a ConfigError."""
    rng = random.Random(0)
    junk: list[Any] = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**400, -(10**30), 0.5, float("nan"), float("inf")]
    junk += ["", "x", "silu", "qwen3_5", [], [1], [LINEAR], ["x"] * 40, [[[]]], {}, {"a": {"b": []}}, {"factor": 2}]
    junk += [{"rope_type": "yarn"}]
    keys = [*TINY, *FIXED_TEXT, *TINY_VISION, "layer_types", "rope_parameters", "rope_scaling", "rope_theta", "dtype"]
    keys += ["text_config", "vision_config", "tie_word_embeddings", "quantization_config", "architectures", "use_cache"]
    keys += ["image_token_id", "eos_token_id", "mtp_num_hidden_layers", "attention_dropout", "torch_dtype"]
    usable = 0
    for _ in range(1500):
        values = nested(rng.choice([TINY, TINY_DENSE])) if rng.random() < 0.7 else dict(TINY)
        for _ in range(rng.choice([1, 1, 2])):
            part = rng.choice([values, values.get("text_config"), values.get("vision_config")])
            if isinstance(part, dict):
                part[rng.choice(keys)] = rng.choice(junk)
        try:
            config = Config.from_dict(values)
        except ConfigError as error:
            assert 10 < len(str(error)) < 2000
        else:
            usable += 1
            assert Config.from_dict(config.to_dict()) == config and config.num_parameters() > 0
    assert 100 < usable < 1200
