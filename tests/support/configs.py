"""Small configurations for tests, and published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen35moe.config import Config, ConfigError

FILES = Path(__file__).parents[1] / "data" / "configs"
LINEAR, FULL = "linear_attention", "full_attention"

# Pairwise different, so that mistaking one size for another is detected.
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

# A layer of each kind.
TWO_LAYERS: dict[str, Any] = dict(
    model_type="qwen3_5_moe_text", vocab_size=61, hidden_size=24, num_hidden_layers=2, head_dim=16,
    layer_types=[LINEAR, FULL], num_attention_heads=6, num_key_value_heads=2,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, num_experts=5,
    num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=14,
)


def published(name: str = "Qwen3.5-35B-A3B") -> dict[str, Any]:
    path = FILES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is missing")
    return json.loads(path.read_text())


def nested(text: dict[str, Any] = TINY, **top: Any) -> dict[str, Any]:
    vision = TINY_VISION | {"out_hidden_size": text["hidden_size"]}
    return {"model_type": str(text["model_type"]).removesuffix("_text"), "text_config": dict(text),
            "vision_config": vision} | top  # fmt: skip


def refused(config_dict: Any, *parts: str) -> str:
    """Assert that a configuration is an error whose message contains all parts; return the message."""
    with pytest.raises(ConfigError) as error:
        Config.from_dict(config_dict)
    message = str(error.value)
    assert all(part in message for part in parts), f"{parts} not all in: {message}"
    return message


def peer_config(config: Config) -> Any:
    import transformers

    classes = {
        "qwen3_5_moe": transformers.Qwen3_5MoeConfig,
        "qwen3_5_moe_text": transformers.Qwen3_5MoeTextConfig,
        "qwen3_5": transformers.Qwen3_5Config,
        "qwen3_5_text": transformers.Qwen3_5TextConfig,
    }
    return classes[config.model_type](**config.to_dict())
