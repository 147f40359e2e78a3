"""Gated Attention: softmax attention with normalised queries and keys, whose output each query head gates itself.

project -> normalise query and key -> rotate -> attend -> gate -> project
"""

from __future__ import annotations

from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.cache.states import KVCache
from qwen35moe.config import TextConfig
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.ops.attention import Visibility, attention_weights, weighted_values
from qwen35moe.taps import tap, tapped


class GatedAttention(nn.Module):
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

    def forward(
        self, x: Tensor, layout: TokenLayout, rotation: tuple[Tensor, Tensor], memory: KVCache | None = None,
        with_weights: bool = False,
    ) -> tuple[Tensor, KVCache | None, Tensor | None]:
        """x [B, T, D], rotation: cos and sin [B, T, R/2]. Returns the output [B, T, D], the memory with the new tokens,
        and the attention weights [B, H, T, slots] when asked for."""
        query, gate = self.q_proj(x).unflatten(-1, (self.heads, 2, self.head_dim)).unbind(-2)
        key = self.k_norm(self.k_proj(x).unflatten(-1, (self.groups, self.head_dim)))
        value = self.v_proj(x).unflatten(-1, (self.groups, self.head_dim))
        query, key = backends.run("rotary", self.q_norm(query), key, *rotation, caller=self)
        query, key = tap(self, "query", query), tap(self, "key", key)
        value, gate = tap(self, "value", value), tap(self, "gate", gate)
        if memory is not None:
            memory = memory.append(key, value, layout)
            key, value = memory.key, memory.value
        visible = Visibility(layout.starts, layout.cu_seqlens)
        weights = None
        if with_weights or tapped(self, ("scores",)):
            weights = tap(self, "scores", attention_weights(query, key, scale=self.scale, visible=visible))
            dropped = nn.functional.dropout(weights, self.dropout, self.training)
            out = weighted_values(dropped, value).to(x.dtype)
        else:
            dropout = self.dropout if self.training else 0.0
            options = {"scale": self.scale, "visible": visible, "dropout": dropout}
            out = backends.run("attention", query, key, value, **options, caller=self)
        out = self.o_proj((out * gate.sigmoid()).flatten(2))
        return tap(self, "output", out), memory, weights if with_weights else None
