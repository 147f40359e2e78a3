"""Gated DeltaNet: a causal mixer whose state is a matrix, corrected rather than accumulated.

project -> short causal convolution -> gated delta rule -> gated norm -> project
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qwen35moe import backends, ops
from qwen35moe.cache import DeltaNetState, DeltaNetUpdate, LayerState
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.cache.rollback import Segment
from qwen35moe.config import TextConfig
from qwen35moe.modules.context import LayerContext
from qwen35moe.modules.fp32_parameters import FP32Parameters, new_fp32
from qwen35moe.modules.hooks import fused_projections, fusible, is_plain, keeps, project
from qwen35moe.modules.initialise import Draws, Initialised, initialise
from qwen35moe.modules.norm import GatedRMSNorm
from qwen35moe.ops.attention import weighted_values
from qwen35moe.ops.attention_map import attention_map
from qwen35moe.ops.delta_rule import decay_and_beta
from qwen35moe.taps import patched, tap, tapped

# The methods that a fused decode step replaces.
_FUSED = ("_heads", "gates", "_gates", "delta_rule")
_INNER = ("conv", "query", "key", "value", "decay", "beta", "core", "state", "scores")  # tapped values, one of each per forward
_BLOCK = 1 << 22  # numbers of the convolution's output that are computed at once: 16 MB in float32
_ALIGNED = 32  # tokens: a block starts where a chunk of the delta rule does


@fusible
class ShortConvolution(Initialised):
    """The causal convolution, with its weight [C, 1, W] as published. See `ops.convolution`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        initialise(self, self.initializer_range)

    def draw(self, draws: Draws, std: float) -> None:
        """uniform(-W^-0.5, W^-0.5)."""
        bound = self.weight.shape[-1] ** -0.5
        self.weight.copy_(draws.uniform(self.weight, -bound, bound))

    def forward(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight = self.weight.squeeze(1)
        return ops.short_convolution(x, weight, state=state, lengths=lengths, cu_seqlens=cu_seqlens, caller=self)

    def extra_repr(self) -> str:
        channels, _, taps = self.weight.shape
        return f"channels={channels}, taps={taps}"


@fusible
class GatedDeltaNet(FP32Parameters):
    """Yang et al. 2024. See `ops.delta_rule` for the rule and `ops.convolution` for the convolution.

    A_log [H] and dt_bias [H] stay float32: decays are multiplied over thousands of tokens, and rounding A_log to bfloat16
    changes each of them by up to 0.5 %.
    """

    fp32_parameters = ("A_log", "dt_bias")

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
        self.A_log = new_fp32(self.heads)
        self.dt_bias = new_fp32(self.heads)
        self.norm = GatedRMSNorm(self.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, width, bias=False)
        initialise(self, config.initializer_range)

    def draw(self, draws: Draws, std: float) -> None:
        """A = exp(A_log) and the step softplus(dt_bias), see `qwen35moe.modules.initialise`."""
        self.A_log.copy_(draws.uniform(self.A_log, 1.0 if draws.gates == "ordinary" else 0.01, 16).log())
        if draws.gates == "transformers":
            self.dt_bias.fill_(1)
            return
        step = draws.uniform(self.dt_bias, math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is `step`

    def forward(
        self, x: Tensor, context: LayerContext, state: LayerState | None = None
    ) -> tuple[Tensor, DeltaNetUpdate, Tensor | None]:
        """x [B, T, D]. Returns the output [B, T, D], the state after the last token of each row, and, if `context.attentions`,
        the attention map [B, H, T, T] of the new tokens (`ops.attention_map`)."""
        assert state is None or isinstance(state, DeltaNetState)
        products = None if x.is_cpu and ops.projections.is_ordinary(self) else fused_projections(
            self, x, self.in_proj_qkv, self.in_proj_z, self.in_proj_a, self.in_proj_b
        )
        if products is None:
            qkv, z = project(self.in_proj_qkv, x), project(self.in_proj_z, x)
            a, b = project(self.in_proj_a, x), project(self.in_proj_b, x)
        else:
            qkv, z, a, b = products
        qkv, gate = tap(self, "qkv", qkv), tap(self, "gate", z.reshape(*x.shape[:-1], self.heads, self.value_width))
        weights = None
        step = self.decode_step(qkv, gate, a, b, context, state) or self._in_blocks(qkv, gate, a, b, context, state)
        if step is not None:
            normed, after = step
        else:
            layout = context.layout
            conv_state, recurrent_state = (None, None) if state is None else state.read()
            mixed, conv_state = self.conv1d(qkv, conv_state, layout.lengths, layout.cu_seqlens)
            query, key, value = self._heads(tap(self, "conv", mixed))
            decay, beta = self._gates(a, b, layout)
            if layout.lengths is not None and not keeps(self, GatedDeltaNet, ("_gates",)):
                decay, beta = _without_padding(decay, layout), _without_padding(beta, layout)
            core, recurrent_state = self.delta_rule(query, key, value, decay, beta, recurrent_state, layout.cu_seqlens)
            recurrent_state = self._tapped_state(recurrent_state)
            if context.attentions or tapped(self, ("scores",)):
                core, weights = self._attention_map(core, query, key, value, decay, beta, layout)
            normed = self.norm(tap(self, "core", core), gate)
            recorded = None
            if context.record and self._is_recordable(decay):
                recorded = _segment(qkv, key, value, decay, beta, layout)
            after = DeltaNetUpdate(conv_state, recurrent_state, recorded)
        out = project(self.out_proj, tap(self, "normed", normed).flatten(2))
        return tap(self, "output", out), after, weights if context.attentions else None

    def extra_repr(self) -> str:
        return f"key_heads={self.groups} of {self.key_width}, value_heads={self.heads} of {self.value_width}"

    def decode_step(
        self, qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, context: LayerContext, state: DeltaNetState | None
    ) -> tuple[Tensor, DeltaNetUpdate] | None:
        """The normed output [B, 1, H, V] and the state of one cached token per row by a fused implementation of
        `ops.delta_net_step`; None where `forward` composes the operations.

        A fused implementation reads the weights of conv1d and norm without calling the modules and replaces the methods in
        `_FUSED`, so it is not used if one of them has hooks or has been replaced.
        """
        layout = context.layout
        active = None if layout.step is None else layout.step.active
        if state is None or layout.tokens != 1 or layout.cu_seqlens is not None:
            return None
        if layout.lengths is not None and qkv.is_cpu:
            return None  # rows without a new token: there the composed operations handle the padding
        if torch.is_grad_enabled() or context.record or context.attentions or tapped(self, ("scores",)):
            return None
        if not is_plain(self.conv1d, ShortConvolution) or not is_plain(self.norm, GatedRMSNorm):
            return None
        if not keeps(self, GatedDeltaNet, _FUSED):
            return None
        conv_state, valid = state.conv_state, layout.valid
        if valid is not None:
            padding = ~valid
            a, b = _keeping_state(a, padding), _keeping_state(b, padding)
        result = ops.delta_net_step.fused(
            qkv[:, 0], gate[:, 0], a[:, 0], b[:, 0], conv_state=conv_state, recurrent_state=state.recurrent_state,
            conv_weight=self.conv1d.weight.squeeze(1), A_log=self.A_log, dt_bias=self.dt_bias,
            norm_weight=self.norm.weight, groups=self.groups, eps=self.norm.eps, caller=self,
            **({} if active is None or patched(self, "state") else {"active": active}),
        )
        if result is None:
            return None
        normed, after, recurrent_state = result
        if valid is not None:
            after = torch.where(valid[..., None], after, conv_state.to(after.dtype))
        return normed[:, None], DeltaNetUpdate(after, self._tapped_state(recurrent_state))

    def _in_blocks(
        self, qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, context: LayerContext, state: DeltaNetState | None
    ) -> tuple[Tensor, DeltaNetUpdate] | None:
        """The normed output [B, T, H, V] and the state after many tokens on a CPU, a block of tokens at a time from the
        convolution to the norm, each from the state after the one before; None where `forward` computes all tokens at once.

        The values in between then lie in memory that is used again. For more than 32 MB the allocator maps new pages at every
        call, whose first use costs as much as the convolution.
        """
        layout = context.layout
        size = max(_ALIGNED, _BLOCK // (layout.rows * qkv.shape[-1]) // _ALIGNED * _ALIGNED)
        if layout.tokens <= size or not qkv.is_cpu or layout.lengths is not None or layout.cu_seqlens is not None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or context.record or context.attentions:
            return None
        if tapped(self, _INNER) or not keeps(self, GatedDeltaNet, _FUSED):
            return None
        if not is_plain(self.conv1d, ShortConvolution) or not is_plain(self.norm, GatedRMSNorm):
            return None
        if not backends.is_builtin("short_convolution", "gated_delta_rule", "gated_rms_norm", caller=self):
            return None  # an implementation of others may take no state, or counts its calls
        decay, beta = self.gates(a, b)
        conv_state, recurrent_state = (None, None) if state is None else state.read()
        normed = qkv.new_empty(gate.shape)
        for start in range(0, layout.tokens, size):
            block = slice(start, start + size)
            mixed, conv_state = self.conv1d(qkv[:, block], conv_state, None, None)
            core, recurrent_state = self.delta_rule(
                *self._heads(mixed), decay[:, block], beta[:, block], recurrent_state, None
            )
            normed[:, block] = self.norm(core, gate[:, block])
        assert conv_state is not None and recurrent_state is not None
        return normed, DeltaNetUpdate(conv_state, recurrent_state)

    def delta_rule(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The output [B, T, H, V] and the state after the last token [B, H, K, V]: `ops.gated_delta_rule`.

        A subclass may compute another rule here, with gates of other shapes from its `gates`: every form of the layer then
        runs it. Its tokens cannot be rolled back, and it has no attention map.
        """
        return ops.gated_delta_rule(
            query, key, value, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens, caller=self
        )

    def _tapped_state(self, state: Tensor) -> Tensor:
        """The state after the tap `state`; a copy of a patched one, which the cache is to own."""
        return tap(self, "state", state).clone() if patched(self, "state") else tap(self, "state", state)

    def _is_recordable(self, decay: Tensor) -> bool:
        """Whether a rollback can run these tokens again: it runs the built-in convolution and rule, and no patch."""
        built_in = keeps(self, GatedDeltaNet, ("delta_rule",)) and is_plain(self.conv1d, ShortConvolution)
        return built_in and decay.dim() == 3 and not patched(self, "state")

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] to query, key [B, T, G, K] and value [B, T, H, V]."""
        keys = self.groups * self.key_width
        query, key, value = mixed.split([keys, keys, self.heads * self.value_width], dim=-1)
        query = tap(self, "query", query.unflatten(-1, (self.groups, self.key_width)))
        key = tap(self, "key", key.unflatten(-1, (self.groups, self.key_width)))
        return query, key, tap(self, "value", value.unflatten(-1, (self.heads, self.value_width)))

    def gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """decay and beta [B, T, H] from the projections a and b: `ops.delta_rule.decay_and_beta`. A subclass may compute
        others, of other shapes where its `delta_rule` takes them; the layer handles padding."""
        return decay_and_beta(a, b, self.A_log, self.dt_bias)

    def _gates(self, a: Tensor, b: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """decay and beta; zero at padding, which keeps the state and writes nothing."""
        decay, beta = self.gates(a, b)
        if layout.lengths is not None:
            decay, beta = _without_padding(decay, layout), _without_padding(beta, layout)
        return tap(self, "decay", decay), tap(self, "beta", beta)

    def _attention_map(
        self, core: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """The output of the rule, corrected if a tap has replaced the attention map, and the map [B, H, T, T]."""
        if not keeps(self, GatedDeltaNet, ("delta_rule",)) or decay.dim() != 3:
            raise ValueError(
                f"{type(self).__name__} computes a rule of its own: the attention map of the gated delta rule does not "
                "describe it. Leave out output_attentions and the tap `scores`"
            )
        computed = attention_map(query, key, decay=decay, beta=beta, cu_seqlens=layout.cu_seqlens)
        before = computed.clone() if patched(self, "scores") else None  # a patch may write into the tensor that it gets
        weights = tap(self, "scores", computed)
        if before is not None:  # the rule is linear in the values: add the difference
            core = core + weighted_values(weights - before, value).to(core.dtype)
        return core, weights


def _keeping_state(projection: Tensor, padding: Tensor) -> Tensor:
    """The projection a or b [B, 1, H] of a gate, -inf in rows without a new token: softplus and sigmoid of it are zero, so that
    the state neither decays nor is written."""
    return projection.masked_fill(padding[..., None], float("-inf"))


def _without_padding(gate: Tensor, layout: TokenLayout) -> Tensor:
    """A gate [B, T, H, ...], zero at padding."""
    valid = layout.valid
    assert valid is not None
    return torch.where(valid.view(*valid.shape, *[1] * (gate.dim() - 2)), gate, gate.new_zeros(()))


def _segment(qkv: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, layout: TokenLayout) -> Segment:
    """The values of these tokens that a rollback needs."""
    valid = layout.valid
    if valid is None:
        valid, least = torch.ones(qkv.shape[:2], dtype=torch.bool, device=qkv.device), layout.tokens
    else:
        least = 0 if layout.host_lengths is None else min(layout.host_lengths)
    return Segment(qkv, key, value, decay, beta, valid, least)
