"""All published sizes, in order of publication.

Sources: the config.json of each repository under huggingface.co/Qwen, except 3.8-2.4t-a95b (dimensions from the tests of
another loader, confirmed by its published byte count) and moe-4.54b (kshitijthakkar's mixture grown from Qwen3.5-4B:
dimensions derived from its two published parameter counts).
"""

from __future__ import annotations

from typing import Any

# Values of all members that differ from the defaults of TextConfig.
_ROPE = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
         "mrope_section": [11, 11, 10], "mrope_interleaved": True}
_TEXT: dict[str, Any] = dict(rope_parameters=_ROPE, mtp_num_hidden_layers=1, eos_token_id=248044, dtype="bfloat16")

_VISION_S: dict[str, Any] = dict(depth=12, hidden_size=768, intermediate_size=3072, num_heads=12)
_VISION_M: dict[str, Any] = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16)
_VISION_L: dict[str, Any] = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16)


def _dense(
    hidden: int, layers: int, heads: tuple[int, int], value_heads: int, width: int, **more: Any
) -> dict[str, Any]:
    return _text("qwen3_5_text", hidden, layers, heads, value_heads, intermediate_size=width, **more)


def _moe(
    hidden: int, layers: int, heads: tuple[int, int], value_heads: int, experts: tuple[int, int], width: int,
    **more: Any,
) -> dict[str, Any]:
    total, active = experts
    return _text("qwen3_5_moe_text", hidden, layers, heads, value_heads, num_experts=total, num_experts_per_tok=active,
                 moe_intermediate_size=width, shared_expert_intermediate_size=width, **more)


def _text(
    model_type: str, hidden: int, layers: int, heads: tuple[int, int], value_heads: int, **more: Any
) -> dict[str, Any]:
    """heads: query and key/value heads of attention; value_heads: of the delta rule (its key heads are always 16)."""
    query, key_value = heads
    sizes = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=query, num_key_value_heads=key_value,
                 linear_num_value_heads=value_heads)
    return {"model_type": model_type, **_TEXT, **sizes, **more}


def _with_vision(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """The nested form. The top-level tie_word_embeddings decides; the inner one repeats it for the text-only class."""
    tied = text.get("tie_word_embeddings", False)
    return {"model_type": text["model_type"].removesuffix("_text"), "text_config": text,
            "vision_config": {**vision, "out_hidden_size": text["hidden_size"]}, "tie_word_embeddings": tied}


_QWEN36 = dict(bos_token_id=248044)
PRESETS: dict[str, dict[str, Any]] = {
    # Qwen3.5, dense                 D     L     heads        H    width
    "0.8b": _with_vision(_dense(1024, 24, (8, 2), 16, 3584, tie_word_embeddings=True), _VISION_S),
    "2b": _with_vision(_dense(2048, 24, (8, 2), 16, 6144, tie_word_embeddings=True), _VISION_M),
    "4b": _with_vision(_dense(2560, 32, (16, 4), 32, 9216, tie_word_embeddings=True), _VISION_M),
    "9b": _with_vision(_dense(4096, 32, (16, 4), 32, 12288), _VISION_L),
    "27b": _with_vision(_dense(5120, 64, (24, 4), 48, 17408), _VISION_L),
    # Qwen3.5, mixture of experts          D     L     heads       H    (E, k)     F
    "35b-a3b": _with_vision(_moe(2048, 40, (16, 2), 32, (256, 8), 512), _VISION_L),
    "122b-a10b": _with_vision(_moe(3072, 48, (32, 2), 64, (256, 8), 1024), _VISION_L),
    "397b-a17b": _with_vision(_moe(4096, 60, (32, 2), 64, (512, 10), 1024), _VISION_L),
    # Qwen3.6 and 3.8
    "3.6-27b": _with_vision(_dense(5120, 64, (24, 4), 48, 17408, **_QWEN36), _VISION_L),
    "3.6-35b-a3b": _with_vision(_moe(2048, 40, (16, 2), 32, (256, 8), 512, **_QWEN36), _VISION_L),
    "3.8-27b": _with_vision(_dense(5120, 64, (24, 4), 48, 17408, **_QWEN36), _VISION_L),
    "3.8-2.4t-a95b": _moe(8192, 92, (64, 4), 128, (512, 10), 2048, **_QWEN36),
    # community
    "moe-4.54b": _with_vision(_moe(2560, 32, (16, 4), 32, (8, 2), 1024, tie_word_embeddings=True), _VISION_M),
}


def canonical(name: str) -> str:
    """The short form: "Qwen/Qwen3.5-35B-A3B" is "35b-a3b", "Qwen3.6-27B" is "3.6-27b"."""
    short = name.lower().rsplit("/", 1)[-1].removeprefix("qwen").lstrip("-_")
    return short.removeprefix("3.5-")
