"""Gated DeltaNet: a causal mixer whose memory is a matrix, corrected rather than accumulated.

project -> short causal convolution -> gated delta rule -> gated norm -> project
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.cache.rollback import Segment
from qwen35moe.cache.states import DeltaNetState
from qwen35moe.config import TextConfig
from qwen35moe.modules.fp32_parameters import FP32Parameters
from qwen35moe.modules.hooks import is_plain
from qwen35moe.modules.norm import GatedRMSNorm
from qwen35moe.ops.attention import weighted_values
from qwen35moe.ops.attention_map import attention_map
from qwen35moe.ops.decode_step import fused_step_may_run
from qwen35moe.ops.precision import wide_dtype
from qwen35moe.taps import tap, tapped


class ShortConvolution(nn.Module):
    """The causal convolution's weight [C, 1, W], as published, and its call. See `ops.convolution`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))

    def forward(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        options = {"state": state, "lengths": lengths, "cu_seqlens": cu_seqlens}
        return backends.run("short_convolution", x, self.weight.squeeze(1), **options, caller=self)


class GatedDeltaNet(FP32Parameters):
    """Yang et al. 2024. See `ops.delta_rule` for the rule and `ops.convolution` for the convolution.

    A_log [H] and dt_bias [H] stay float32: a decay is multiplied over thousands of tokens, and A_log rounded to
    bfloat16 changes it by up to 0.5 % at each.
    """

    island = ("A_log", "dt_bias")

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.groups, self.heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_width, self.value_width = config.linear_key_head_dim, config.linear_value_head_dim
        width = config.hidden_size
        self.in_proj_qkv = nn.Linear(width, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(width, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(width, self.heads, bias=False)
        self.in_proj_a = nn.Linear(width, self.heads, bias=False)
        self.conv1d = ShortConvolution(config.conv_dim, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.norm = GatedRMSNorm(self.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, width, bias=False)

    def forward(
        self, x: Tensor, layout: TokenLayout, state: DeltaNetState | None = None, record: bool = False,
        with_weights: bool = False,
    ) -> tuple[Tensor, DeltaNetState, Tensor | None]:
        """x [B, T, D]. Returns the output [B, T, D], the state after the last token of each row, and, when asked for,
        the attention map [B, H, T, T] of the new tokens (`ops.attention_map`)."""
        qkv, ahead = tap(self, "qkv", self.in_proj_qkv(x)), None
        with_map = with_weights or tapped(self, ("scores",))
        if not record and not with_map and state is not None and self._may_step(layout):
            ahead = self.in_proj_a(x), self.in_proj_b(x), self.in_proj_z(x)
            if stepped := self._step(qkv, *ahead, state):
                return *stepped, None
        before = None if state is None else state.conv_state
        mixed, inputs = self.conv1d(qkv, before, layout.lengths, layout.cu_seqlens)
        query, key, value = self._heads(tap(self, "conv", mixed))
        decay, beta = self._gates(x, layout, ahead)
        memory = None if state is None else state.recurrent_state
        core, memory = backends.run(
            "gated_delta_rule", query, key, value, decay=decay, beta=beta, state=memory, cu_seqlens=layout.cu_seqlens,
            caller=self,
        )
        memory = tap(self, "state", memory)
        weights = None
        if with_map:
            own = attention_map(query, key, decay=decay, beta=beta, cu_seqlens=layout.cu_seqlens)
            weights = tap(self, "scores", own)
            if weights is not own:  # patched: the rule is linear in the values, so only the difference is missing
                core = core + weighted_values(weights - own, value).to(core.dtype)
        z = ahead[2] if ahead else self.in_proj_z(x)
        gate = tap(self, "gate", z.unflatten(-1, (self.heads, self.value_width)))
        normed = tap(self, "normed", self.norm(tap(self, "core", core), gate))
        out = tap(self, "output", self.out_proj(normed.flatten(2)))
        segment = None
        if record:
            valid = layout.valid
            present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
            segment = Segment(qkv, key, value, decay, beta, present)
        return out, DeltaNetState(inputs, memory, segment), weights if with_weights else None

    def _may_step(self, layout: TokenLayout) -> bool:
        """Whether a fused `delta_net_step` could take over: one token of every row, no gradient, no choice that it would
        go around, and nothing that acts when the convolution or the norm is called."""
        if layout.tokens != 1 or layout.lengths is not None or layout.cu_seqlens is not None:
            return False
        whole = is_plain(self.conv1d, ShortConvolution) and is_plain(self.norm, GatedRMSNorm)
        return whole and fused_step_may_run(self)

    def _step(
        self, qkv: Tensor, a: Tensor, b: Tensor, z: Tensor, state: DeltaNetState
    ) -> tuple[Tensor, DeltaNetState] | None:
        """The output and the state by a fused implementation; None where the definition would run, which the layer is."""
        gate = z.unflatten(-1, (self.heads, self.value_width))
        args = qkv[:, 0], gate[:, 0], a[:, 0], b[:, 0]
        options = {
            "conv_state": state.conv_state, "recurrent_state": state.recurrent_state,
            "conv_weight": self.conv1d.weight.squeeze(1),
            "A_log": self.A_log, "dt_bias": self.dt_bias, "norm_weight": self.norm.weight, "groups": self.groups,
            "eps": self.norm.eps,
        }
        if backends.resolve("delta_net_step", *args, **options, caller=self).name == "torch":
            return None
        args = args[0], tap(self, "gate", gate)[:, 0], *args[2:]
        normed, inputs, memory = backends.run("delta_net_step", *args, **options, caller=self)
        memory, normed = tap(self, "state", memory), tap(self, "normed", normed[:, None])
        return tap(self, "output", self.out_proj(normed.flatten(2))), DeltaNetState(inputs, memory)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] to query, key [B, T, G, K] and value [B, T, H, V]."""
        keys = self.groups * self.key_width
        query, key, value = mixed.split([keys, keys, self.heads * self.value_width], dim=-1)
        query = tap(self, "query", query.unflatten(-1, (self.groups, self.key_width)))
        key = tap(self, "key", key.unflatten(-1, (self.groups, self.key_width)))
        return query, key, tap(self, "value", value.unflatten(-1, (self.heads, self.value_width)))

    def _gates(self, x: Tensor, layout: TokenLayout, ahead: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """decay = -exp(A_log) softplus(W_a x + dt_bias) and beta = sigmoid(W_b x), [B, T, H], float32 at least.

        A 64-step decay summed in bfloat16 is off by 2.5 % (median), in float32 by 2e-7. Padding neither forgets nor
        writes.
        """
        a, b = ahead[:2] if ahead else (self.in_proj_a(x), self.in_proj_b(x))
        dtype = wide_dtype(x, self.A_log)
        decay = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        beta = b.to(dtype).sigmoid()
        valid = layout.valid
        if valid is not None:
            decay, beta = (torch.where(valid[..., None], gate, gate.new_zeros(())) for gate in (decay, beta))
        return tap(self, "decay", decay), tap(self, "beta", beta)
