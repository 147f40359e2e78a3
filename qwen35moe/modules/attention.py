"""Gated Attention: softmax attention with normalised queries and keys, and an output gate for every query head.

project -> normalise query and key -> rotate -> attend -> gate -> project
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.cache import KVCache, LayerState
from qwen35moe.config import TextConfig
from qwen35moe.modules.context import LayerContext
from qwen35moe.modules.hooks import fused_projections, project, weight_of
from qwen35moe.modules.initialise import Initialised, initialise
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.ops.attention import attention_weights, weighted_values
from qwen35moe.taps import tap, tapped


class GatedAttention(Initialised):
    """output = W_o (attention(rotary(norm(W_q x)), rotary(norm(W_k x)), W_v x) * sigmoid(gate)).

    q_proj gives, per query head, `head_dim` query rows and then `head_dim` gate rows.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale, self.dropout = config.head_dim**-0.5, float(config.attention_dropout)
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, 2 * self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        initialise(self, config.initializer_range)

    def forward(
        self, x: Tensor, context: LayerContext, state: LayerState | None = None
    ) -> tuple[Tensor, KVCache | None, Tensor | None]:
        """x [B, T, D]. Returns the output [B, T, D], the keys and values including those of the new tokens, and the attention
        weights [B, H, T, P] if `context.attentions`."""
        assert state is None or isinstance(state, KVCache)
        products = None if x.is_cpu and ops.projections.is_ordinary(self) else fused_projections(
            self, x, self.q_proj, self.k_proj, self.v_proj
        )
        query, key, value = products or (project(self.q_proj, x), project(self.k_proj, x), project(self.v_proj, x))
        query, gate = query.unflatten(-1, (self.heads, 2, self.head_dim)).unbind(-2)
        key, value = key.unflatten(-1, (self.groups, self.head_dim)), value.unflatten(-1, (self.groups, self.head_dim))
        query, key = self._normed_and_rotated(query, key, context)
        query, key = tap(self, "query", query), tap(self, "key", key)
        value, gate = tap(self, "value", value), tap(self, "gate", gate)
        if state is not None:
            state = state.append(key, value, context.layout)
            key, value = state.read()
        if not query.dtype is key.dtype is value.dtype:  # a projection in another dtype, or a cache that keeps its own
            dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        core, weights = self._attend(query, key, value, context)
        composed = core.is_cpu and ops.sigmoid_gate.is_ordinary(self) or torch.is_grad_enabled()
        gated = None if composed else ops.sigmoid_gate.fused(core, gate, caller=self)
        if gated is None:
            gated = core * gate.sigmoid()
        out = project(self.o_proj, gated.flatten(2))
        return tap(self, "output", out), state, weights

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_value_heads={self.groups}, head_dim={self.head_dim}"

    def _normed_and_rotated(self, query: Tensor, key: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """rotary(q_norm(query), k_norm(key)), by a fused implementation of `ops.norm_rotary` where one supports the call."""
        if not (query.is_cpu and ops.norm_rotary.is_ordinary(self) or torch.is_grad_enabled()):
            weights, eps = [weight_of(norm, RMSNorm) for norm in (self.q_norm, self.k_norm)], self.q_norm.eps
            if weights[0] is not None and weights[1] is not None and self.k_norm.eps == eps:
                heads = ops.norm_rotary.fused(query, key, *context.rotation, weights[0], weights[1], eps=eps, caller=self)
                if heads is not None:
                    return heads
        return ops.rotary(self.q_norm(query), self.k_norm(key), *context.rotation, caller=self)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None]:
        """softmax(scale * query key^T) value, and the weights if they are returned."""
        mask = {"starts": context.layout.starts, "cu_seqlens": context.layout.cu_seqlens}
        if context.attentions or tapped(self, ("scores",)):
            weights = tap(self, "scores", attention_weights(query, key, scale=self.scale, **mask))
            dropped = nn.functional.dropout(weights, self.dropout, self.training)
            return weighted_values(dropped, value).to(query.dtype), weights if context.attentions else None
        dropout = self.dropout if self.training else 0.0
        return ops.attention(query, key, value, scale=self.scale, dropout=dropout, **mask, caller=self), None
