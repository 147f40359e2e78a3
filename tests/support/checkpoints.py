"""Checkpoint folders in every published layout, at small size: exact names, dtypes and block sizes.

`LAYOUTS` has one entry per row of the table in docs/guide/checkpoints.md; `publish` writes a model's weights in one of
them, for FP8 with random codes and scales. `Whole` is a class with the parameters of a vision tower and an MTP head,
without their mathematics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen35moe.config import Config
from qwen35moe.config.parameters import mtp_tensors, vision_tensors
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from tests.support import peer
from tests.support.peer import FULL, LINEAR

Tensors = dict[str, Tensor]
STORED_FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")  # F32 on disk in 3.5
FP32_PARAMETERS = (*STORED_FP32, "linear_attn.dt_bias")  # float32 in a model of any dtype
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj",
             "down_proj")  # fmt: skip

# Two and three blocks of 128, the last ones incomplete; all sizes are pairwise different.
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 61, "hidden_size": 200, "num_hidden_layers": 2,
    "layer_types": [LINEAR, FULL], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 36,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 35, "linear_value_head_dim": 33,
    "linear_conv_kernel_dim": 3, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 136,
    "shared_expert_intermediate_size": 150, "mtp_num_hidden_layers": 1, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 3],
                        "mrope_interleaved": True},
}  # fmt: skip
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
DENSE = {key: value for key, value in TEXT.items() if key not in MOE_KEYS} | {
    "model_type": "qwen3_5_text", "intermediate_size": 136}  # fmt: skip
VISION = {"depth": 2, "hidden_size": 24, "intermediate_size": 37, "num_heads": 2, "num_position_embeddings": 16,
          "patch_size": 4, "out_hidden_size": 200}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How one kind of repository stores a model; docs/guide/checkpoints.md lists the publishers."""

    dense: bool = False
    tied: bool = False
    experts: str = "grouped"
    mtp: str | None = "per_expert"  # None: no MTP head
    vision: bool = True
    fp32_stored_as: torch.dtype = torch.float32
    fp8: bool = False
    prefix: str = "model.language_model."
    head: str = "lm_head.weight"
    visual: str = "model.visual."

    @property
    def flat(self) -> bool:
        return not self.vision

    def config(self) -> dict[str, Any]:
        text = (DENSE if self.dense else TEXT) | {"tie_word_embeddings": self.tied, "dtype": "bfloat16"}
        text["mtp_num_hidden_layers"] = int(self.mtp is not None)
        extra: dict[str, Any] = {}
        if self.fp8:
            extra["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        if self.flat:
            return text | extra
        kind = "qwen3_5" if self.dense else "qwen3_5_moe"
        return {"model_type": kind, "text_config": text, "vision_config": VISION | {"model_type": kind},
                "tie_word_embeddings": self.tied} | extra  # fmt: skip


LAYOUTS: dict[str, Layout] = {
    "3.5 MoE, bf16": Layout(),
    "3.6 MoE, bf16": Layout(mtp="grouped", fp32_stored_as=torch.bfloat16),
    "3.8 text only": Layout(mtp="grouped", vision=False, prefix="model."),
    "3.5 MoE, FP8": Layout(experts="per_expert", fp8=True),
    "3.6 MoE, FP8": Layout(experts="per_expert", fp8=True, fp32_stored_as=torch.bfloat16),
    "FP8, experts grouped": Layout(fp8=True, mtp="grouped"),
    "3.5 dense, untied": Layout(dense=True),
    "3.5 dense, tied": Layout(dense=True, tied=True),
    "3.5 dense, FP8": Layout(dense=True, fp8=True),
    "4.54B community": Layout(tied=True, mtp=None),
    "saved by transformers": Layout(experts="per_expert", mtp=None, fp32_stored_as=torch.bfloat16),
    "saved by transformers, text class": Layout(experts="per_expert", mtp=None, vision=False, fp32_stored_as=torch.bfloat16),
    "fine-tune, model.lm_head": Layout(head="model.lm_head.weight", mtp=None),
    "fine-tune, language_model.model": Layout(prefix="language_model.model.", visual="vision_tower.",
                                              head="language_model.lm_head.weight", experts="per_expert", mtp="grouped"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- a class with all parts


class Named(nn.Module):
    """Parameters of these names and shapes, in modules of these names."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        for name, shape in tensors:
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))


class Whole(Qwen3_5MoeForCausalLM):
    """With the parameters of a vision tower and of an MTP head, if `parts` has them."""

    optional_parts = ("vision", "mtp")

    def __init__(self, config: Config, parts: frozenset[str] | None = None) -> None:
        super().__init__(config)
        _add_parts(self, parts or frozenset())


class WholeDense(Qwen3_5ForCausalLM):
    """The same for the dense family."""

    optional_parts = Whole.optional_parts

    def __init__(self, config: Config, parts: frozenset[str] | None = None) -> None:
        super().__init__(config)
        _add_parts(self, parts or frozenset())


def _add_parts(model: Any, parts: frozenset[str]) -> None:
    if "vision" in parts:
        model.visual = Named(vision_tensors(model.config.vision_config))
    if "mtp" in parts:
        model.mtp = Named(mtp_tensors(model.config.text_config))


def parts_of(layout: Layout) -> set[str]:
    return {"text"} | ({"vision"} if layout.vision else set()) | ({"mtp"} if layout.mtp else set())


# ---------------------------------------------------------------------------------------------------- on disk


def publish(folder: Path, layout: Layout, seed: int = 7, shards: int = 3) -> tuple[Path, Tensors]:
    """Write a checkpoint in this layout; returns the folder and the expected parameters by canonical name, in bfloat16
    (those kept in fp32 in float32)."""
    config = Config.from_dict(layout.config())
    cls = WholeDense if layout.dense else Whole
    model = cls(config, frozenset(parts_of(layout)))
    peer.draw(model, seed)
    rng = peer.generator(seed)
    expected: Tensors = {}
    stored: Tensors = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight" and layout.tied:
            continue
        if name.startswith(("visual.", "mtp.")):
            value = torch.randn(value.shape, generator=rng)
        dtype = layout.fp32_stored_as if name.endswith(STORED_FP32) else torch.bfloat16
        value = value.to(dtype)
        pieces, whole = _split(name, value, layout, rng)
        stored |= {_published(piece, layout): tensor for piece, tensor in pieces.items()}
        expected[name] = whole.float() if name.endswith(FP32_PARAMETERS) else whole
    return write(folder, stored, layout.config(), shards), expected


def _split(name: str, value: Tensor, layout: Layout, rng: torch.Generator) -> tuple[Tensors, Tensor]:
    """The stored tensors of one parameter, and the parameter that they represent."""
    per_expert = layout.mtp == "per_expert" if name.startswith("mtp.") else layout.experts == "per_expert"
    quantise = layout.fp8 and not name.startswith("visual.")
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        leaf = name.split(".")[-2] if "." in name else ""
        return _stored(name, value, rng) if quantise and leaf in QUANTISED else ({name: value}, value)
    if not per_expert:
        return _stored(name, value, rng) if quantise else ({name: value}, value)
    module, _, leaf = name.rpartition(".")
    projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    pieces: Tensors = {}
    whole = torch.empty_like(value)
    for expert in range(value.shape[0]):
        for position, projection in enumerate(projections):
            first, end = (n * value.shape[1] // len(projections) for n in (position, position + 1))
            rows = slice(first, end)
            piece = f"{module}.{expert}.{projection}.weight"
            stored, whole[expert, rows] = _stored(piece, value[expert, rows], rng) if quantise else (
                {piece: value[expert, rows]}, value[expert, rows])  # fmt: skip
            pieces |= stored
    return pieces, whole


def _stored(name: str, like: Tensor, rng: torch.Generator) -> tuple[Tensors, Tensor]:
    """Random block-FP8 of this shape, with a zero and a negative scale, and its numbers."""
    values, scale = random_fp8(tuple(like.shape), rng)
    return {name: values, f"{name}_scale_inv": scale}, block_by_block(values, scale).to(torch.bfloat16)


def random_fp8(shape: tuple[int, ...], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """All codes except the two NaN codes; scales from 1e-4 to 1, one zero, one negative."""
    codes = torch.randint(0, 256, shape, generator=rng).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3A
    blocks = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    scale = torch.pow(10.0, torch.empty(blocks).uniform_(-4, 0, generator=rng)).to(torch.bfloat16)
    scale.view(-1)[0] = 0
    scale.view(-1)[-1] *= -1
    return codes.view(torch.float8_e4m3fn), scale


def block_by_block(values: Tensor, scale: Tensor) -> Tensor:
    """An independent dequantisation in float64, one block at a time."""
    out = values.to(torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in scale.shape)).tolist():
        *batch, row, column = index
        block = (*batch, slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        out[block] *= scale[tuple(index)].double()
    return out


def _published(name: str, layout: Layout) -> str:
    if name.startswith("mtp."):
        return name
    if name.startswith("visual."):
        return layout.visual + name.removeprefix("visual.")
    return layout.head if name == "lm_head.weight" else layout.prefix + name


def write(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    """Write a checkpoint with the safetensors library."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def per_expert(tensors: Tensors, keep: Callable[[str], bool] = lambda name: False) -> Tensors:
    """The same weights with every grouped expert tensor split into single experts, except those with keep(name)."""
    out: Tensors = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".experts") or keep(name):
            out[name] = value
            continue
        for expert, rows in enumerate(value):
            projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            for projection, part in zip(projections, rows.chunk(len(projections)), strict=True):
                out[f"{module}.{expert}.{projection}.weight"] = part
    return out
