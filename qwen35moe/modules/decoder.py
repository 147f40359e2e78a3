"""One decoder layer: a mixer over time, then a feed-forward over width, each on the residual stream.

    h' = h + mixer(norm(h))          mixer: Gated DeltaNet or Gated Attention, as layer_types says
    y  = h' + mlp(norm(h'))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.cache.states import DeltaNetState, KVCache, LayerState
from qwen35moe.config import TextConfig
from qwen35moe.modules.attention import GatedAttention
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.modules.moe import DenseMLP, SparseMoeBlock
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.routing import ForcedRouting, RouterOutput
from qwen35moe.taps import tap


@dataclass(frozen=True)
class LayerContext:
    """What all layers of one forward share: the layout, cos and sin, and what is asked for."""

    layout: TokenLayout
    rotation: tuple[Tensor, Tensor]
    replay: ForcedRouting | None = None
    record: bool = False
    attentions: bool = False

    def to(self, device: torch.device) -> LayerContext:
        """The same on another device; a replay brings its rows along layer by layer."""
        cos, sin = self.rotation
        return replace(self, layout=self.layout.to(device), rotation=(cos.to(device), sin.to(device)))


@dataclass
class LayerOutput:
    """What a layer leaves beside its output."""

    state: LayerState | None = None
    choice: RouterOutput | None = None
    attention: Tensor | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> LayerOutput:
        """With what is shown to the caller on another device; the memory stays beside its layer."""
        choice, attention = self.choice, self.attention
        if choice is not None:
            choice = RouterOutput(*(getattr(choice, name).to(device) for name in ("logits", "indices", "weights")))
        return LayerOutput(self.state, choice, None if attention is None else attention.to(device))


class DecoderLayer(nn.Module):
    """Layer `index`; `linear_attn` or `self_attn` mixes, `mlp` is sparse or dense, by configuration."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.kind = config.layer_types[index]
        if self.kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoeBlock(config, index) if config.is_moe else DenseMLP(config.hidden_size, _dense_width(config))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, step: LayerContext, memory: LayerState | None = None) -> tuple[Tensor, LayerOutput]:
        """hidden [B, T, D]; returns [B, T, D] and what the layer leaves beside it."""
        run = _recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else _plain
        hidden = tap(self, "input", hidden)
        hidden, passed = run(self._mix, hidden, step, memory)
        normed = run(self.post_attention_layernorm, hidden)
        if isinstance(self.mlp, SparseMoeBlock):
            # Outside the part that is computed again, so that a recomputation cannot choose other experts.
            passed.choice = self.mlp.route(normed.flatten(0, 1), step.replay)
            hidden = hidden + run(self.mlp, normed, passed.choice)
        else:
            hidden = hidden + run(self.mlp, normed)
        return tap(self, "output", hidden), passed

    def _mix(self, hidden: Tensor, step: LayerContext, memory: LayerState | None) -> tuple[Tensor, LayerOutput]:
        normed = self.input_layernorm(hidden)
        if self.kind == "linear_attention":
            assert memory is None or isinstance(memory, DeltaNetState)
            mixed, after, weights = self.linear_attn(normed, step.layout, memory, step.record, step.attentions)
            return hidden + mixed, LayerOutput(after, None, weights)
        assert memory is None or isinstance(memory, KVCache)
        mixed, after, weights = self.self_attn(normed, step.layout, step.rotation, memory, step.attentions)
        return hidden + mixed, LayerOutput(after, None, weights)


def _dense_width(config: TextConfig) -> int:
    assert config.intermediate_size is not None  # the configuration has checked it for a dense model
    return config.intermediate_size


def _plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    return backends.checkpoint(function, *args)
