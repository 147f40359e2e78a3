"""A small checkpoint in any published layout, with random weights at which every part of the model is heard.

For tests of other programs. At the usual initialisation a tiny model is close to a table of bigrams: norms are the
identity, the delta rule forgets at once, routers are even, and a part that is left out changes nothing that a test would
see. Here no tensor has its identity value:

    RMSNorm (1 + w)              |w| in 0.1 ... 0.5, both signs
    LayerNorm w, GDN norm w      1 +- 0.1 ... 0.5
    biases                       +- 0.1 ... 0.5
    A = exp(A_log)               1.3 ... 16
    softplus(dt_bias)            log-uniform 1e-3 ... 0.1: the memory of the delta rule lasts
    router                       all logits of all tokens are negative, about -8 with a spread of 1
    matrices                     of unit gain; what layers write to the residual stream, together, about as large as it

The router's logits: channel 0 of the residual stream is large and positive throughout (embedding 3, all who write to it
small there), and the routers' weights on it are about -2.5. A softmax does not mind; code that fills up with zeros does.

Values are a function of the seed and the tensor's name alone, so that layouts agree: the FP8 checkpoint is the bf16 one of
the same seed, quantised.
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
from .blocks import SCALE
from .published import QWEN35, Layout, quantization_config, tensors
from .quantise import quantise
from .write import Entry, bytes_of, json_bytes, write_checkpoint

_TORCH = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
_BUNDLED = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer.json"
_CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
            "<|video_pad|>")  # fmt: skip
_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LEVEL = 3.0  # of channel 0 of the residual stream, beside 1 in the others

# Odd but legal sizes, so that few matrices are square and a swapped axis cannot pass.
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
    """Write a checkpoint of `config` into the folder `path`; returns its size in bytes of tensors.

    Beside the weights: config.json (with quantization_config in FP8), generation_config.json, and the tokenizer of the
    bundled checkpoint with the control tokens of the published ones behind it.
    """
    limit = bytes_of(max_shard_size)
    if layout.fp8:
        config = config.replace(quantization_config=quantization_config(config, layout))
    drawn = functools.lru_cache(maxsize=2)(Drawing(config, seed))  # experts are cut out of one drawing
    entries = [
        Entry(tensor.name, tensor.shape, _TORCH[tensor.dtype], _values(tensor.name, tensor.dtype, drawn))
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
    """A small configuration of the published form: nested with vision, flat for text alone.

    Three layers of Gated DeltaNet and one of attention, as published. changes: keys of text_config, for other sizes.
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
    """The numbers of one tensor; FP8 weights and their scales are quantised from the bfloat16 ones."""

    def pieces() -> list[Tensor]:
        name = names.canonical(published.removesuffix(SCALE))
        assert name is not None
        if single := names.expert_of(name):
            module, expert, projection = single
            weight, parts = next((w, p) for w, p in names.EXPERT_WEIGHTS.items() if projection in p)
            value = drawn(f"{module}.{weight}")[expert].chunk(len(parts))[parts.index(projection)]
        else:
            value = drawn(name)
        if dtype == "F8_E4M3":
            return [quantise(value.bfloat16())[0]]
        return [quantise(value.bfloat16())[1]] if published.endswith(SCALE) else [value]

    return pieces


# ------------------------------------------------------------------------------------------------------------ drawing


class Drawing:
    """drawing(name): the float32 values of the tensor of this canonical name, experts grouped."""

    def __init__(self, config: Config, seed: int) -> None:
        self.text, self.seed = config.text_config, seed
        found = config.tensor_shapes(mtp=True, mtp_experts="grouped")
        self.shapes = {names.canonical(tensor.name): tensor.shape for tensor in found}

    def __call__(self, name: str) -> Tensor:
        seed = zlib.crc32(f"{self.seed}/{name}".encode())  # torch's generator reads 32 bits of a seed
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.shapes[name], generator=generator)
        uniform = torch.rand(self.shapes[name], generator=generator)
        return self._matrix(name, noise) if noise.dim() > 1 else self._vector(name, noise, uniform)

    def _vector(self, name: str, noise: Tensor, uniform: Tensor) -> Tensor:
        """Norms, biases and gates."""
        away = (0.1 + 0.4 * uniform) * noise.sign()  # 0.1 ... 0.5 from zero, on both sides
        if name.endswith(("A_log", "dt_bias")):
            spread = (noise.argsort() + uniform) / len(noise)  # over the whole range, however few heads there are
            if name.endswith("A_log"):
                return torch.log(1.3 + 14.7 * spread)
            return torch.log(torch.expm1(torch.exp(math.log(1e-3) + spread * math.log(100.0))))
        if name.endswith("linear_attn.norm.weight") or (name.startswith("visual.") and name.endswith(".weight")):
            return 1 + away
        if name == "visual.merger.linear_fc2.bias":
            away[0] = _LEVEL
        elif name.endswith(".weight"):
            away[0] = away[0].abs()  # channel 0 keeps its level
        return away

    def _matrix(self, name: str, noise: Tensor) -> Tensor:
        """[..., R, C] of unit gain, and what channel 0 of the residual stream asks of those that touch it."""
        if name == "embed_tokens.weight":
            noise[:, 0] = _LEVEL + 0.2 * noise[:, 0]
            return noise
        if name.startswith("visual."):
            return 0.5 * noise if name == "visual.pos_embed.weight" else noise * noise[0].numel() ** -0.5
        value = noise * noise.shape[-1] ** -0.5
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            # Keys lean to queries, 0.8: nearly orthogonal ones leave float32 few digits in a row's first tokens.
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


# ------------------------------------------------------------------------------------------------- what stands beside


@functools.lru_cache(maxsize=1)
def _tokenizer() -> dict[str, bytes]:
    """The bundled tokenizer, and behind its vocabulary those control tokens of the published ones that it lacks."""
    tokenizer = json.loads(_BUNDLED.read_text(encoding="utf-8"))
    first, there = len(tokenizer["model"]["vocab"]), {token["content"] for token in tokenizer["added_tokens"]}
    for number, token in enumerate(each for each in (*_CONTROL, *_MARKS) if each not in there):
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
    """As in the published files: the end of a turn and the end of a text both end a generation."""
    ids = _token_ids()
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95, "bos_token_id": ids["<|endoftext|>"],
                "pad_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}  # fmt: skip
    return {"generation_config.json": json_bytes(settings)}
