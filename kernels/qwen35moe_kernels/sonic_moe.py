"""Adapter to sonic-moe (>= 0.1.2, the first that takes our layout): `moe_general_routing_inputs`.

It takes our weights as [2F, D, E] and [D, F, E] views, (token, expert) assignments in the order of tokens, and int32 indices.
`concat_layout` states that the rows of the gate come before those of the up projection. The first call of every shape tunes.

The requirements of 0.1.2.post1 end at torch 2.9.1, below this library's: pip installs it only with --no-deps, which nobody has
tried. Its contract, line by line: docs/reference/adapters.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.bfloat16, torch.float16)
_OLDEST = (0, 1, 2)
_HOW = (
    "its requirements end at torch 2.9.1, so that only pip install --no-deps 'sonic-moe>=0.1.2' is left (untested; it needs "
    "quack-kernels and nvidia-cutlass-dsl 4.4.2, Python 3.12, CUDA 12.9)"
)
_EXPERTS = 65535  # it sorts by 16 bits of the expert's index
_GATHERED = 1 << 32  # its sum over a token's experts computes offsets into [assignments, D] as uint32
_PER_EXPERT = 64  # assignments: its published results are for training; below, reading the weights dominates the time


def unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None
) -> str | None:
    """None, or the reason why sonic-moe cannot run this call."""
    if tap is not None:
        return "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"
    if torch.compiler.is_compiling():
        return "a graph is being compiled, which sonic-moe does not support"
    if runtime.strictly_deterministic():
        return "deterministic algorithms are enabled, and sonic-moe chooses its tiles by timing them"
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down}
    reason = runtime.unsupported_cuda(**tensors, indices=indices, weights=weights)
    reason = reason or runtime.unsupported_dtype(*_FLOATS, **tensors)
    return reason or _unsupported_sizes(hidden, gate_up, down, indices) or _unsupported_device(hidden)


def _unsupported_sizes(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor) -> str | None:
    (experts, width, inner), top_k = down.shape, indices.shape[1]
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} {tensor.dtype}, sonic-moe takes one dtype"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous, as sonic-moe requires"
        if tensor.storage_offset() % 8:
            return f"{name} begins at element {tensor.storage_offset()} of its storage, sonic-moe takes multiples of 8"
    if not indices.numel():
        return "indices is empty"
    if indices.numel() >= 1 << 31:
        return f"indices has {indices.numel()} assignments, sonic-moe takes fewer than 2^31"
    if indices.numel() * width >= _GATHERED:
        return f"{indices.numel()} assignments of {width} numbers, sonic-moe indexes fewer than 2^32"
    if experts > _EXPERTS:
        return f"gate_up has {experts} experts, sonic-moe sorts up to {_EXPERTS}"
    if top_k > experts:
        return f"indices has top_k {top_k} for {experts} experts, sonic-moe is tuned for at most one row of each expert"
    for name, size in (("hidden", width), ("down", inner)):
        if size % 8:
            return f"{name} has rows of {size}, sonic-moe takes multiples of 8 (16 bytes)"
    return None


def _unsupported_device(hidden: Tensor) -> str | None:
    capability = runtime.capability(hidden)
    if torch.version.hip:
        return "sonic-moe supports NVIDIA's GPUs only"
    if capability is None or capability[0] == 9:
        return None
    version = f"{capability[0]}.{capability[1]}"
    if capability[0] == 10:  # closed; the mends are in QuACK (its PRs 131 and 133), of which sonic-moe takes any version
        return f"on compute capability {version} sonic-moe can be silently wrong (its issue 63)"
    return f"sonic-moe supports compute capability 9.0 and 10.0, {hidden.device} has {version}"


def slower(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, *_: Tensor, **__: object) -> str | None:
    """None, or the reason why "auto" takes the next implementation."""
    assignments, experts = indices.numel(), gate_up.shape[0]
    if assignments >= _PER_EXPERT * experts:
        return None
    return f"{assignments} assignments for {experts} experts: below {_PER_EXPERT} each, reading the weights dominates"


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None) -> Tensor:
    """y [N, D], as `experts` defines it. The routing weights are passed in float32, to which sonic-moe converts them anyway."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    tokens = torch.arange(len(hidden), device=hidden.device, dtype=torch.int32)
    with runtime.on_device_of(hidden):
        y, _ = moe_general_routing_inputs(
            x=runtime.aligned(hidden.contiguous()), router_scores=weights.reshape(-1).float(),
            token_indices=tokens.repeat_interleave(indices.shape[1]), expert_indices=indices.reshape(-1).to(torch.int32),
            w1=gate_up.permute(1, 2, 0), b1=None, w2=down.permute(1, 2, 0), b2=None, E=gate_up.shape[0],
            stream_id=torch.cuda.current_stream(hidden.device).cuda_stream, activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not runtime.needs_gradient(hidden, gate_up, down, weights), concat_layout=True,
        )  # fmt: skip
    return runtime.align_gradient(y)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of all others, for batches as large as those of training."""
    missing = runtime.package_missing("sonicmoe", _HOW, distribution="sonic-moe", oldest=_OLDEST)
    before = "triton" if runtime.place("gathered") else "gathered"
    options = {"before": before, "missing": missing, "slower": slower}
    register("experts", "sonic_moe", experts, unsupported, **options, **runtime.FIRST_ORDER)
