"""Write a checkpoint of full size with random weights: the 4.54B model, tensor by tensor.

    python -m benchmarks synthetic OUT [--gates ordinary|transformers] [--layout grouped|per_expert] [--align 8|64]

About 9 GB on disk with the vision tensors (8.4 GB without, `--no-vision`), published names, bfloat16 with `A_log` and the
Gated DeltaNet norm in float32, several shards and an index, no tokenizer. Every value is a function of the seed and the
tensor's name alone, so that two runs, or two layouts, agree. Memory stays below 1 GB: a tensor is drawn in slices and
written as it is drawn. The folder belongs outside the repository.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

SLICE = 1 << 24  # values drawn at once: 64 MB in float32
# The sum that all layers add to the residual stream is then about as large as the embedding. With 0.02 here too, each layer
# dominates the sum before it, and bfloat16's roundings grow with depth to a fifth of the logits.
WRITER = 1 / 256
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}

# "Qwen3.5 MoE 4.54B": the dimensions of Qwen3.5-4B with 8 experts, top-2, width 1024 (4,540,002,816 parameters).
TEXT = {
    "model_type": "qwen3_5_moe_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "shared_expert_intermediate_size": 1024,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 248320,
}
VISION = {
    "model_type": "qwen3_5_moe_vision",
    "deepstack_visual_indexes": [],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIG = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5_moe",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "video_token_id": 248057,
    "vision_config": VISION,
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}


@dataclass(frozen=True)
class Spec:
    """One tensor: its name and shape on disk, the kind of its values, and their place (`source`, values `start`..)."""

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"
    dtype: str = "BF16"
    source: str = ""  # the tensor whose values it repeats (an expert of a grouped tensor); empty: itself
    start: int = 0  # first value within the source

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


def text_specs(text: dict, layout: str) -> Iterator[Spec]:
    """The tensors of the text model in the order of the layers. `layout`: "grouped" or "per_expert"."""
    width = text["hidden_size"]
    root = "model.language_model."
    yield Spec(root + "embed_tokens.weight", (text["vocab_size"], width))
    for n, kind in enumerate(text["layer_types"]):
        layer = f"{root}layers.{n}."
        yield Spec(layer + "input_layernorm.weight", (width,), "shift")
        yield from delta_specs(text, layer) if kind == "linear_attention" else attention_specs(text, layer)
        yield Spec(layer + "post_attention_layernorm.weight", (width,), "shift")
        yield from moe_specs(text, layer, layout)
    yield Spec(root + "norm.weight", (width,), "shift")
    if not text["tie_word_embeddings"]:
        yield Spec("lm_head.weight", (text["vocab_size"], width))


def delta_specs(text: dict, layer: str) -> Iterator[Spec]:
    width, heads = text["hidden_size"], text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    channels = 2 * keys + values
    yield Spec(layer + "linear_attn.in_proj_qkv.weight", (channels, width))
    yield Spec(layer + "linear_attn.in_proj_z.weight", (values, width))
    yield Spec(layer + "linear_attn.in_proj_a.weight", (heads, width))
    yield Spec(layer + "linear_attn.in_proj_b.weight", (heads, width))
    yield Spec(layer + "linear_attn.conv1d.weight", (channels, 1, text["linear_conv_kernel_dim"]), "conv")
    yield Spec(layer + "linear_attn.A_log", (heads,), "A_log", "F32")
    yield Spec(layer + "linear_attn.dt_bias", (heads,), "dt_bias")
    yield Spec(layer + "linear_attn.norm.weight", (text["linear_value_head_dim"],), "scale", "F32")
    yield Spec(layer + "linear_attn.out_proj.weight", (width, values), "writer")


def attention_specs(text: dict, layer: str) -> Iterator[Spec]:
    width, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    yield Spec(layer + "self_attn.q_proj.weight", (2 * queries, width))
    yield Spec(layer + "self_attn.k_proj.weight", (keys, width))
    yield Spec(layer + "self_attn.v_proj.weight", (keys, width))
    yield Spec(layer + "self_attn.o_proj.weight", (width, queries), "writer")
    yield Spec(layer + "self_attn.q_norm.weight", (head,), "shift")
    yield Spec(layer + "self_attn.k_norm.weight", (head,), "shift")


def moe_specs(text: dict, layer: str, layout: str) -> Iterator[Spec]:
    width, experts, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    shared = text["shared_expert_intermediate_size"]
    gate_up, down = layer + "mlp.experts.gate_up_proj", layer + "mlp.experts.down_proj"
    yield Spec(layer + "mlp.gate.weight", (experts, width))
    if layout == "grouped":
        yield Spec(gate_up, (experts, 2 * inner, width))
        yield Spec(down, (experts, width, inner), "writer")
    else:
        for e in range(experts):  # the same values as the grouped tensors, cut
            expert, size = f"{layer}mlp.experts.{e}.", inner * width
            yield Spec(expert + "gate_proj.weight", (inner, width), source=gate_up, start=2 * e * size)
            yield Spec(expert + "up_proj.weight", (inner, width), source=gate_up, start=(2 * e + 1) * size)
            yield Spec(expert + "down_proj.weight", (width, inner), "writer", source=down, start=e * size)
    yield Spec(layer + "mlp.shared_expert.gate_proj.weight", (shared, width))
    yield Spec(layer + "mlp.shared_expert.up_proj.weight", (shared, width))
    yield Spec(layer + "mlp.shared_expert.down_proj.weight", (width, shared), "writer")
    yield Spec(layer + "mlp.shared_expert_gate.weight", (1, width))


def vision_specs(vision: dict) -> Iterator[Spec]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    visual = "model.visual."

    def linear(name: str, rows: int, columns: int) -> Iterator[Spec]:
        yield Spec(f"{visual}{name}.weight", (rows, columns))
        yield Spec(f"{visual}{name}.bias", (rows,))

    def norm(name: str) -> Iterator[Spec]:
        yield Spec(f"{visual}{name}.weight", (width,), "scale")
        yield Spec(f"{visual}{name}.bias", (width,))

    patch_shape = (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    yield Spec(visual + "patch_embed.proj.weight", patch_shape)
    yield Spec(visual + "patch_embed.proj.bias", (width,))
    yield Spec(visual + "pos_embed.weight", (vision["num_position_embeddings"], width))
    for n in range(vision["depth"]):
        yield from norm(f"blocks.{n}.norm1")
        yield from norm(f"blocks.{n}.norm2")
        yield from linear(f"blocks.{n}.attn.qkv", 3 * width, width)
        yield from linear(f"blocks.{n}.attn.proj", width, width)
        yield from linear(f"blocks.{n}.mlp.linear_fc1", inner, width)
        yield from linear(f"blocks.{n}.mlp.linear_fc2", width, inner)
    yield from norm("merger.norm")
    yield from linear("merger.linear_fc1", merged, merged)
    yield from linear("merger.linear_fc2", vision["out_hidden_size"], merged)


def draw(spec: Spec, gates: str, seed: int) -> Iterator[torch.Tensor]:
    """The values of one tensor, flat, in slices of at most SLICE.

    Slice s of a source tensor is drawn from its own generator (seed, name, s), so that a part can be drawn alone.
    """
    first, last = spec.start // SLICE, (spec.start + spec.count - 1) // SLICE
    for s in range(first, last + 1):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.source or spec.name} {s}".encode()))
        begin, end = s * SLICE, (s + 1) * SLICE
        # the last slice of a source is drawn in full length too: its first values do not depend on what follows
        count = SLICE if spec.source else min(SLICE, spec.count - begin)
        values = fill(spec.kind, count, gates, generator).to(DTYPES[spec.dtype])
        yield values[max(spec.start - begin, 0) : min(spec.start + spec.count, end) - begin]


def fill(kind: str, count: int, gates: str, generator: torch.Generator) -> torch.Tensor:
    """`count` float32 values. Ordinary gates keep 90 to 99.9 % of the recurrent state per token and unit of A;
    transformers' own initialisation (A in 0.01..16, dt_bias 1) keeps e^-10 of it at each token."""
    if kind == "A_log":
        low = 1.0 if gates == "ordinary" else 0.01
        return torch.empty(count).uniform_(low, 16.0, generator=generator).log()
    if kind == "dt_bias":
        if gates == "transformers":
            return torch.ones(count)
        step = torch.empty(count).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    values = torch.empty(count).normal_(0.0, 0.02, generator=generator)
    if kind == "conv":
        return values.mul_(15.0)  # taps of 0.3: the output is as large as the input
    if kind == "writer":
        return values.mul_(WRITER)
    return values.add_(1.0) if kind == "scale" else values


def shards(specs: list[Spec], limit: int) -> list[list[Spec]]:
    """The tensors in order, cut wherever the next one would take a file past `limit` bytes."""
    files: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return files


def write_shard(file: BinaryIO, specs: list[Spec], gates: str, seed: int, align: int) -> None:
    """One safetensors file: length, JSON header padded so that data starts at a multiple of `align`, tensors."""
    specs = sorted(specs, key=lambda spec: (spec.dtype != "F32", spec.name))  # as the safetensors library orders them
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    file.write(struct.pack("<Q", len(text)) + text)
    for spec in specs:
        for values in draw(spec, gates, seed):
            file.write(values.view(torch.uint8).numpy().data)


def write_checkpoint(
    folder: Path,
    *,
    gates: str = "ordinary",
    layout: str = "grouped",
    vision: bool = True,
    align: int = 8,
    shard_size: int = 2_500_000_000,
    seed: int = 0,
    config: dict = CONFIG,
) -> int:
    """Write the checkpoint into `folder` (made if absent) and return its size in bytes. The index comes last: a folder
    without it is an unfinished one."""
    specs = list(text_specs(config["text_config"], layout))
    if vision:
        specs += vision_specs(config["vision_config"])
    files = shards(specs, shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, members in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map.update({spec.name: name for spec in members})
        with open(folder / name, "wb") as file:
            write_shard(file, members, gates, seed, align)
        print(f"{name}: {len(members)} tensors, {sum(spec.nbytes for spec in members) / 1e9:.2f} GB", flush=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--gates", choices=("ordinary", "transformers"), default="ordinary")
    parser.add_argument("--layout", choices=("grouped", "per_expert"), default="grouped")
    parser.add_argument("--no-vision", dest="vision", action="store_false")
    parser.add_argument("--align", type=int, choices=(8, 64), default=8, help="8: as the safetensors library writes")
    parser.add_argument("--shard-size", type=int, default=2_500_000_000, help="bytes per file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(None if argv is None else list(argv))
    if any(args.out.glob("*.safetensors")):
        parser.error(f"{args.out} already holds a checkpoint")
    options = {key: value for key, value in vars(args).items() if key != "out"}
    total = write_checkpoint(args.out, **options)
    print(f"{args.out}: {total:,} bytes of tensors, gates {args.gates}")
    return 0
