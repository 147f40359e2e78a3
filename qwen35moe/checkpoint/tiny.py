"""A small test checkpoint in any published layout, in which dropping any text tensor changes the output.

For tests of other programs. With the usual initialisation a tiny model is close to a table of bigrams: norms are the
identity, the delta rule forgets at once, routers are uniform, and omitting a part changes nothing that a test would
detect. Here no tensor has its identity value:

    RMSNorm (1 + w)              |w| in 0.1 ... 0.5, both signs
    LayerNorm w, GDN norm w      1 +- 0.1 ... 0.5
    biases                       +- 0.1 ... 0.5
    A = exp(A_log)               1.3 ... 16
    softplus(dt_bias)            log-uniform 1e-3 ... 0.1: the recurrent state decays slowly
    router                       all logits of all tokens are negative, about -8 with a spread of 1
    matrices                     of unit gain; the sum of all layers' outputs is about as large as the residual stream

The router's logits: channel 0 of the residual stream is large and positive in every layer (3 in the embedding, with small
updates), and the routers' weights on it are about -2.5. This shifts all logits, which changes no softmax, but errors in
code that pads logits with zeros.

Values depend only on the seed and the tensor's name, so that layouts agree: the FP8 checkpoint is the bf16 one of the same
seed, quantised.
"""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35moe.config import Config, ConfigError, VisionConfig

from . import names
from .blocks import FP8, SCALE
from .dtypes import TORCH_DTYPES
from .published import QWEN35, Layout, quantization_config, tensors
from .quantise import quantise
from .write import Entry, bytes_of, json_bytes, write_checkpoint

_BUNDLED = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer.json"
_CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
            "<|video_pad|>")  # fmt: skip
_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LEVEL = 3.0  # of channel 0 of the residual stream; the other channels have 1

# Unusual but legal sizes, so that few matrices are square and swapped axes are detected.
_TEXT: dict[str, Any] = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=40, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=28, max_position_embeddings=4096,
    vocab_size=2112, eos_token_id=0, dtype="bfloat16",
    rope_parameters={"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
                     "mrope_section": [2, 2, 1], "mrope_interleaved": True},
)  # fmt: skip
_VISION: dict[str, Any] = dict(depth=2, hidden_size=40, intermediate_size=72, num_heads=2, num_position_embeddings=64)


def write_tiny(
    path: str | os.PathLike[str],
    config: Config,
    layout: Layout = QWEN35,
    *,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
) -> int:
    """Write a checkpoint of `config` to the folder `path`; returns the number of its tensor bytes.

    It also writes config.json (with quantization_config for FP8), generation_config.json, and the tokenizer of the bundled
    checkpoint, extended by the control tokens of the published ones.
    """
    limit = bytes_of(max_shard_size)
    if layout.fp8:
        config = config.replace(quantization_config=quantization_config(config, layout))
    drawn = functools.lru_cache(maxsize=2)(Drawing(config, seed))  # experts are slices of one drawing
    entries = [
        Entry(tensor.name, tensor.shape, TORCH_DTYPES[tensor.dtype], _values(tensor.name, tensor.dtype, drawn))
        for tensor in tensors(config, layout)
    ]
    if (count := 1 + max(_token_ids().values())) > config.text_config.vocab_size:
        raise ConfigError(f"vocab_size = {config.text_config.vocab_size} is less than the {count} tokens of the tokenizer")
    write_checkpoint(path, json_bytes(config.to_dict()), entries, limit, _tokenizer() | _generation())
    return sum(entry.nbytes for entry in entries)


def tiny_config(
    *, layers: int = 4, experts: int = 8, top_k: int = 2, vision: bool = False, mtp: bool = False, dense: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """A small configuration of the published form: nested with vision, flat for text only.

    Three Gated DeltaNet layers per attention layer, as published. changes: keys of text_config, for other sizes.
    """
    text = _TEXT | {"num_hidden_layers": layers, "mtp_num_hidden_layers": int(mtp)}
    if dense:
        text |= {"model_type": "qwen3_5_text", "intermediate_size": 104}
    else:
        text |= {"model_type": "qwen3_5_moe_text", "num_experts": experts, "num_experts_per_tok": top_k,
                 "moe_intermediate_size": 48, "shared_expert_intermediate_size": 56}  # fmt: skip
    config = Config.from_dict(text).replace(**dict(changes or {}))
    if not vision:
        return config
    ids = _token_ids()
    return Config(
        text_config=config.text_config,
        vision_config=VisionConfig(**_VISION, out_hidden_size=config.text_config.hidden_size),
        tie_word_embeddings=config.tie_word_embeddings,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _values(published: str, dtype: str, drawn: Callable[[str], Tensor]) -> Callable[[], list[Tensor]]:
    """A function that returns the numbers of one tensor; FP8 weights and scales come from quantising the bfloat16 ones."""

    def pieces() -> list[Tensor]:
        name = names.canonical(published.removesuffix(SCALE))
        assert name is not None
        if single := names.expert_of(name):
            module, expert, projection = single
            weight, group = names.group_of(projection)
            value = drawn(f"{module}.{weight}")[expert].chunk(len(group))[group.index(projection)]
        else:
            value = drawn(name)
        if dtype == FP8:
            return [quantise(value.bfloat16())[0]]
        return [quantise(value.bfloat16())[1]] if published.endswith(SCALE) else [value]

    return pieces


# ------------------------------------------------------------------------------------------------------------ drawing


class Drawing:
    """drawing(name): the float32 values of the tensor of this canonical name, experts grouped."""

    def __init__(self, config: Config, seed: int) -> None:
        self.text, self.seed = config.text_config, seed
        tensors = config.tensor_shapes(mtp=True, mtp_experts="grouped")
        self.shapes = {names.canonical(tensor.name): tensor.shape for tensor in tensors}

    def __call__(self, name: str) -> Tensor:
        seed = zlib.crc32(f"{self.seed}/{name}".encode())  # torch's generator reads 32 bits of a seed
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(self.shapes[name], generator=generator, dtype=torch.float32, device="cpu")
        uniform = torch.rand(self.shapes[name], generator=generator, dtype=torch.float32, device="cpu")
        return self._matrix(name, noise) if noise.dim() > 1 else self._vector(name, noise, uniform)

    def _vector(self, name: str, noise: Tensor, uniform: Tensor) -> Tensor:
        """Norms, biases and gates."""
        away = (0.1 + 0.4 * uniform) * noise.sign()  # 0.1 ... 0.5 with either sign
        if name.endswith(("A_log", "dt_bias")):
            spread = (noise.argsort() + uniform) / len(noise)  # covers the whole range even with few heads
            if name.endswith("A_log"):
                return torch.log(1.3 + 14.7 * spread)
            return torch.log(torch.expm1(torch.exp(math.log(1e-3) + spread * math.log(100.0))))
        if name.endswith("linear_attn.norm.weight") or (name.startswith("visual.") and name.endswith(".weight")):
            return 1 + away
        if name == "visual.merger.linear_fc2.bias":
            away[0] = _LEVEL
        elif name.endswith(".weight"):
            away[0] = away[0].abs()  # keeps the sign of channel 0
        return away

    def _matrix(self, name: str, noise: Tensor) -> Tensor:
        """[..., rows, columns] of unit gain, adjusted for channel 0 of the residual stream."""
        if name == "embed_tokens.weight":
            noise[:, 0] = _LEVEL + 0.2 * noise[:, 0]
            return noise
        if name.startswith("visual."):
            return 0.5 * noise if name == "visual.pos_embed.weight" else noise * noise[0].numel() ** -0.5
        value = noise * noise.shape[-1] ** -0.5
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            # Keys correlate with queries (0.8): nearly orthogonal ones cost float32 digits in the first tokens of a row.
            query, key = value[: self.text.key_dim], value[self.text.key_dim : 2 * self.text.key_dim]
            key.copy_(0.8 * query + 0.6 * key)
        elif name.endswith("mlp.gate.weight"):
            value[:, 0] = -2.5 - 0.1 * noise[:, 0]
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
            value /= math.sqrt(2 * self.text.num_hidden_layers)
            value[..., 0, :] /= 4
        elif name == "mtp.fc.weight":
            value[0] /= 4
            value[0, 0] = value[0, noise.shape[0]] = 0.5
        return value


# ---------------------------------------------------------------------------------------------------------- other files


@functools.lru_cache(maxsize=1)
def _tokenizer() -> dict[str, bytes]:
    """The bundled tokenizer, extended by the control tokens of the published ones that it lacks."""
    tokenizer = json.loads(_BUNDLED.read_text(encoding="utf-8"))
    first, present = len(tokenizer["model"]["vocab"]), {token["content"] for token in tokenizer["added_tokens"]}
    for number, token in enumerate(token for token in (*_CONTROL, *_MARKS) if token not in present):
        tokenizer["added_tokens"].append(
            {"id": first + number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": token in _CONTROL}  # fmt: skip
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "model_max_length": _TEXT["max_position_embeddings"], "clean_up_tokenization_spaces": False}  # fmt: skip
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(), "tokenizer_config.json": json_bytes(settings)}


def _token_ids() -> dict[str, int]:
    added = json.loads(_tokenizer()["tokenizer.json"])["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _generation() -> dict[str, bytes]:
    """As in the published files: the end-of-turn and the end-of-text token both end a generation."""
    ids = _token_ids()
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95, "bos_token_id": ids["<|endoftext|>"],
                "pad_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}  # fmt: skip
    return {"generation_config.json": json_bytes(settings)}
