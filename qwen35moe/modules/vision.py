"""The vision tower: a transformer over the patches of each frame, and one token per square of m x m patches.

patches -> embed + learned positions -> blocks: attention within the frame, MLP -> merge m x m patches -> tokens of width D

Bai et al. 2025, "Qwen3-VL Technical Report". No deepstack: its list of layers is empty in every published Qwen3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import backends, ops
from qwen35moe.config import VisionConfig
from qwen35moe.modules.hooks import device_of, is_plain, project
from qwen35moe.modules.initialise import Draws, Initialised, initialise, leave_inference_mode
from qwen35moe.ops.precision import wide_dtype, widen
from qwen35moe.ops.vision_grid import Grids, as_grids, coordinates, frame_bounds, interpolated, rotation, tokens_of
from qwen35moe.taps import tap

EPS = 1e-6


@dataclass
class VisionOutput:
    """last_hidden_state [N, width] before the merger; pooler_output: the tokens [tokens, D] of each image or video."""

    last_hidden_state: Tensor
    pooler_output: tuple[Tensor, ...]


class PatchEmbed(Initialised):
    """A linear map of each flattened patch. The weight [width, channels, frames, p, p] is published as that of a convolution
    whose kernel covers exactly one patch; torch's Conv3d takes ten times as long."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = _Projection(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, channels * frames * p * p]; returns [N, width]."""
        return self.proj(pixels)


class _Projection(Initialised):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        shape = config.hidden_size, config.in_channels, config.temporal_patch_size, size, size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        initialise(self, config.initializer_range)

    def draw(self, draws: Draws, std: float) -> None:
        """normal(0, std), and a bias of zero."""
        draws.normal(self.weight, std)
        self.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        return ops.linear(pixels.to(self.weight.dtype), self.weight.flatten(1), self.bias, caller=self)

    def extra_repr(self) -> str:
        width, channels, frames, rows, columns = self.weight.shape
        return f"channels={channels}, patch={frames}x{rows}x{columns}, width={width}"


class VisionNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) w + b over the width, computed in float32 at least; returns the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]; returns [..., width]."""
        dtype, (weight, bias) = self.weight.dtype, widen(self.weight, self.bias)
        return F.layer_norm(x.to(weight.dtype), self.normalized_shape, weight, bias, self.eps).to(dtype)


class VisionAttention(Initialised):
    """W_o softmax(q k^T / sqrt(K)) v within each frame, q and k rotated by their row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        initialise(self, config.initializer_range)

    def forward(self, x: Tensor, cu_seqlens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, width], cu_seqlens [frames + 1], rotation: cos and sin [1, N, K/2]; returns [N, width]."""
        query, key, value = project(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        query, key = ops.rotary(query[None], key[None], *rotation, caller=self)
        query, key, value = tap(self, "query", query[0]), tap(self, "key", key[0]), tap(self, "value", value)
        out = ops.vision_attention(query, key, value, cu_seqlens=cu_seqlens, scale=self.scale, caller=self)
        return tap(self, "output", project(self.proj, out.flatten(1)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class VisionMLP(Initialised):
    """W_2 gelu(W_1 x), gelu in its tanh form."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        initialise(self, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, width]; returns [N, width]."""
        return tap(self, "output", project(self.linear_fc2, _gelu(self, x, "tanh")))


def _gelu(caller: VisionMLP | PatchMerger, x: Tensor, approximate: str) -> Tensor:
    """gelu(W_1 x), as one operation unless W_1 has hooks or has been replaced."""
    linear = caller.linear_fc1
    weight = linear.weight
    # A wrapper of a tensor (quantised, sharded) may implement only the call of the module.
    if is_plain(linear, nn.Linear) and weight.dtype is x.dtype and not hasattr(type(weight), "__tensor_flatten__"):
        return ops.gelu_linear(x, weight, linear.bias, approximate=approximate, caller=caller)
    return F.gelu(project(linear, x), approximate=approximate)


class VisionBlock(Initialised):
    """x' = x + attention(norm(x));  y = x' + mlp(norm(x')). The residual stream x is float32 at least: rounding it to bfloat16
    after each of 54 sums would cause half of a bf16 tower's error."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = VisionNorm(config.hidden_size, eps=EPS)
        self.norm2 = VisionNorm(config.hidden_size, eps=EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, cu_seqlens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, width]; returns [N, width]."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return backends.checkpoint(self._forward, x, cu_seqlens, rotation)
        return self._forward(x, cu_seqlens, rotation)

    def _forward(self, x: Tensor, cu_seqlens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), cu_seqlens, rotation)
        return tap(self, "output", x + self.mlp(self.norm2(x)))


class PatchMerger(Initialised):
    """One token from m x m patches: W_2 gelu(W_1 [norm(x_1), ..., norm(x_mm)])."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = VisionNorm(config.hidden_size, eps=EPS)
        self.linear_fc1 = nn.Linear(self.merged, self.merged)
        self.linear_fc2 = nn.Linear(self.merged, config.out_hidden_size)
        initialise(self, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, width]; returns [tokens, D]."""
        return project(self.linear_fc2, _gelu(self, self.norm(x).view(-1, self.merged), "none"))


class Qwen3_5MoeVisionModel(Initialised):
    """The vision tower, the same for mixture-of-experts and dense models."""

    def __init__(self, config: Any) -> None:
        """config: a VisionConfig, the whole model's, a dict with the contents of either, or those of transformers."""
        super().__init__()
        self.config = vision = VisionConfig.of(config)
        self.patch_embed = PatchEmbed(vision)
        self.pos_embed = nn.Embedding(vision.num_position_embeddings, vision.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(vision) for _ in range(vision.depth))
        self.merger = PatchMerger(vision)
        initialise(self, vision.initializer_range)
        leave_inference_mode(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.merger.linear_fc2.weight.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.merger.linear_fc2)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | Grids) -> VisionOutput:
        """pixel_values [N, channels * frames * p * p] in the processor's order; grid_thw [items, 3]: frames, rows and columns
        of patches of each image or video, on the CPU or as triples: the host waits for a tensor on a GPU. Attention stays
        within a frame, so that items do not affect one another."""
        config, merge = self.config, self.config.spatial_merge_size
        grids = as_grids(grid_thw, merge)
        self._check(pixel_values, grids)
        x = self.patch_embed(pixel_values)
        cos_sin = rotation(coordinates(grids, merge, pixel_values.device), config.head_dim, wide_dtype(x))
        bounds = frame_bounds(grids)  # on the host, which sets the sizes of the launches of every block
        x = tap(self, "embed", x + self._positions(grids))  # float32 at least, the dtype of the positions
        for block in self.blocks:
            x = block(x, bounds, cos_sin)
        tokens = tap(self, "output", self.merger(x))
        return VisionOutput(x.to(tokens.dtype), tokens.split(tokens_of(grids, merge)))

    def _positions(self, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        # The table comes from the embedding's forward, so that its hooks, adapters and offloading work.
        table = self.pos_embed(torch.arange(self.config.num_position_embeddings, device=device_of(self.pos_embed)))
        return interpolated(table, grids, self.config.spatial_merge_size)

    def _check(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> None:
        config, patches = self.config, sum(t * h * w for t, h, w in grids)
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        if pixels.dim() != 2 or pixels.shape[1] != width or not pixels.is_floating_point():
            raise ValueError(f"pixel values must be floats [patches, {width}], got {list(pixels.shape)} {pixels.dtype}")
        if pixels.shape[0] != patches:
            raise ValueError(f"pixel values have {pixels.shape[0]} patches, the grids {grids[:4]} ... have {patches}")
