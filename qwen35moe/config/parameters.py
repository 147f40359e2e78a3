"""Names and shapes of all tensors of a model, from its configuration alone, and parameter counts.

Names and the grouped expert layout are those of the published bf16 checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from . import Config, TextConfig, VisionConfig

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
# Parameters that stay float32 in a model of any dtype, by the end of their names.
FP32_PARAMETERS = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight")
_STORED_FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")  # of these, F32 on disk in Qwen3.5
_WIDTH = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


class TensorShape(NamedTuple):
    """One stored tensor. dtype is written as safetensors writes it: BF16, F32, ..."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _WIDTH[self.dtype]


def tensor_shapes(
    config: Config, *, vision: bool = True, lm_head: bool = True, mtp: bool = False, experts: str = "grouped",
    mtp_experts: str = "grouped", fp32_stored_as: str = "F32",
) -> Iterator[TensorShape]:
    """All tensors of a checkpoint of `config`, in the order of the modules. See Config.tensor_shapes."""
    for layout in (experts, mtp_experts):
        if layout not in ("grouped", "per_expert"):
            raise ValueError(f'experts={layout!r} must be "grouped" or "per_expert"')
    if fp32_stored_as not in ("F32", "BF16"):
        raise ValueError(f'fp32_stored_as={fp32_stored_as!r} must be "F32" or "BF16"')
    stored = _STORED[config.text_config.dtype or "bfloat16"]
    prefix = "model." if config.is_flat else "model.language_model."
    for name, shape in text_tensors(config.text_config, experts):
        yield TensorShape(prefix + name, shape, fp32_stored_as if name.endswith(_STORED_FP32) else stored)
    if vision and config.vision_config is not None:
        for name, shape in vision_tensors(config.vision_config):
            yield TensorShape("model.visual." + name, shape, stored)
    if lm_head and not config.tie_word_embeddings:
        yield TensorShape("lm_head.weight", (config.text_config.vocab_size, config.text_config.hidden_size), stored)
    if mtp:
        for name, shape in mtp_tensors(config.text_config, mtp_experts):
            yield TensorShape("mtp." + name, shape, stored)


def num_parameters(
    config: Config, *, vision: bool = True, lm_head: bool = True, mtp: bool = False, active: bool = False
) -> int:
    """The number of parameters, or of those that one token uses: k of every E routed experts and all others."""
    text = config.text_config
    total = 0
    for name, shape, _ in tensor_shapes(config, vision=vision, lm_head=lm_head, mtp=mtp):
        count = prod(shape)
        if active and ".mlp.experts." in name:
            count = count // text.num_experts * text.num_experts_per_tok
        total += count
    return total


def text_tensors(text: TextConfig, experts: str = "grouped") -> Shapes:
    """The text model without its head; names start at `embed_tokens`."""
    yield "embed_tokens.weight", (text.vocab_size, text.hidden_size)
    for index, kind in enumerate(text.layer_types):
        yield from decoder_layer(text, f"layers.{index}.", kind, experts)
    yield "norm.weight", (text.hidden_size,)


def decoder_layer(text: TextConfig, prefix: str, kind: str, experts: str) -> Shapes:
    """One layer: attention or Gated DeltaNet, a mixture of experts or a dense MLP, and the norms before both."""
    mixer = delta_net(text) if kind == "linear_attention" else attention(text)
    yield from ((prefix + name, shape) for name, shape in mixer)
    block = sparse_mlp(text, experts) if text.is_moe else mlp("mlp.", text.hidden_size, text.intermediate_size)
    yield from ((prefix + name, shape) for name, shape in block)
    yield prefix + "input_layernorm.weight", (text.hidden_size,)
    yield prefix + "post_attention_layernorm.weight", (text.hidden_size,)


def delta_net(text: TextConfig) -> Shapes:
    """Gated DeltaNet. The convolution's channels and in_proj_qkv's rows are queries, keys, values, in this order."""
    width, heads = text.hidden_size, text.linear_num_value_heads
    yield "linear_attn.dt_bias", (heads,)
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.conv1d.weight", (text.conv_dim, 1, text.linear_conv_kernel_dim)
    yield "linear_attn.norm.weight", (text.linear_value_head_dim,)
    yield "linear_attn.out_proj.weight", (width, text.value_dim)
    yield "linear_attn.in_proj_qkv.weight", (text.conv_dim, width)
    yield "linear_attn.in_proj_z.weight", (text.value_dim, width)
    yield "linear_attn.in_proj_b.weight", (heads, width)
    yield "linear_attn.in_proj_a.weight", (heads, width)


def attention(text: TextConfig) -> Shapes:
    """Gated attention; q_proj contains, per head, the query's rows and then the gate's."""
    width, head = text.hidden_size, text.head_dim
    query, key_value = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = {"q_proj": (2 * query, width), "k_proj": (key_value, width), "v_proj": (key_value, width),
                   "o_proj": (width, query)}
    for name, shape in projections.items():
        yield f"self_attn.{name}.weight", shape
        if text.attention_bias:
            yield f"self_attn.{name}.bias", shape[:1]
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.k_norm.weight", (head,)


def sparse_mlp(text: TextConfig, layout: str) -> Shapes:
    """Router, routed experts in either layout, and the shared expert with its gate."""
    width, experts, inner = text.hidden_size, text.num_experts, text.moe_intermediate_size
    yield "mlp.gate.weight", (experts, width)
    if layout == "grouped":
        yield "mlp.experts.gate_up_proj", (experts, 2 * inner, width)
        yield "mlp.experts.down_proj", (experts, width, inner)
    else:
        for expert in range(experts):
            yield from mlp(f"mlp.experts.{expert}.", width, inner)
    yield from mlp("mlp.shared_expert.", width, text.shared_expert_intermediate_size)
    yield "mlp.shared_expert_gate.weight", (1, width)


def mlp(prefix: str, width: int, inner: int) -> Shapes:
    """down(silu(gate x) * up x)."""
    yield prefix + "gate_proj.weight", (inner, width)
    yield prefix + "up_proj.weight", (inner, width)
    yield prefix + "down_proj.weight", (width, inner)


def mtp_tensors(text: TextConfig, experts: str = "grouped") -> Shapes:
    """The multi-token-prediction head: one projection of (embedding, hidden), then full-attention layers."""
    if text.mtp_num_hidden_layers == 0:
        return
    width = text.hidden_size
    yield "fc.weight", (width, 2 * width)
    yield "pre_fc_norm_embedding.weight", (width,)
    yield "pre_fc_norm_hidden.weight", (width,)
    for index in range(text.mtp_num_hidden_layers):
        yield from decoder_layer(text, f"layers.{index}.", "full_attention", experts)
    yield "norm.weight", (width,)


def vision_tensors(vision: VisionConfig) -> Shapes:
    """Patch embedding, positions, blocks and merger; all linear layers and norms have biases."""
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    merged = width * vision.spatial_merge_size**2

    def linear(name: str, rows: int, columns: int) -> Shapes:
        yield name + ".weight", (rows, columns)
        yield name + ".bias", (rows,)

    def layer_norm(name: str) -> Shapes:
        yield name + ".weight", (width,)
        yield name + ".bias", (width,)

    yield "patch_embed.proj.weight", (width, *patch)
    yield "patch_embed.proj.bias", (width,)
    yield "pos_embed.weight", (vision.num_position_embeddings, width)
    for index in range(vision.depth):
        block = f"blocks.{index}."
        yield from layer_norm(block + "norm1")
        yield from layer_norm(block + "norm2")
        yield from linear(block + "attn.qkv", 3 * width, width)
        yield from linear(block + "attn.proj", width, width)
        yield from linear(block + "mlp.linear_fc1", inner, width)
        yield from linear(block + "mlp.linear_fc2", width, inner)
    yield from layer_norm("merger.norm")
    yield from linear("merger.linear_fc1", merged, merged)
    yield from linear("merger.linear_fc2", vision.out_hidden_size, merged)
