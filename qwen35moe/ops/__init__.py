"""The mathematics: one operation per file, as a short definition that supports float64 and gradients.

    from qwen35moe import ops
    output, state = ops.gated_delta_rule(query, key, value, decay=decay, beta=beta)

A call runs the first implementation that supports its arguments (`qwen35moe.backends`); `ops.gated_delta_rule.definition`
is the definition. Fast forms in plain PyTorch are in `ops.cpu`, Triton kernels in the package qwen35moe_kernels.
"""

from __future__ import annotations

from . import cpu, delta_chunked
from .arguments import check_direct_calls
from .attention import attention, sigmoid_gate
from .convolution import short_convolution
from .decode_step import delta_net_step
from .delta_rule import gated_delta_rule
from .experts import experts, router
from .gated_mlp import add_shared_expert, swiglu
from .gelu_linear import gelu_linear
from .linear import linear, projections
from .losses import linear_cross_entropy
from .norm import add_rms_norm, gated_rms_norm, rms_norm
from .rope import norm_rotary, rotary
from .vision_attention import vision_attention

__all__ = [
    "add_rms_norm",
    "add_shared_expert",
    "attention",
    "cpu",
    "delta_chunked",
    "delta_net_step",
    "experts",
    "gated_delta_rule",
    "gated_rms_norm",
    "gelu_linear",
    "linear",
    "linear_cross_entropy",
    "norm_rotary",
    "projections",
    "rms_norm",
    "rotary",
    "router",
    "short_convolution",
    "sigmoid_gate",
    "swiglu",
    "vision_attention",
]

check_direct_calls()
