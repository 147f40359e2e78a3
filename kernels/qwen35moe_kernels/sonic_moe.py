"""Adapter to sonic-moe (>= 0.1.2, the first that takes our layout): `moe_general_routing_inputs`.

It wants weights as [2F, D, E] and [D, F, E] views whose memory is ours, pairs in the order of their tokens, int32 numbers,
and says with `concat_layout` that the gate's rows come before the others. Its first call of every shape tunes itself.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.bfloat16, torch.float16)
_OLDEST, _HOW = (0, 1, 2), "pip install 'sonic-moe>=0.1.2' (Python 3.12, CUDA 12.9)"
_EXPERTS = 65535  # it sorts by 16 bits of the expert's number
_PAIRS = 64  # per expert: what it publishes is training, and below that the weights' memory decides


def unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None
) -> str | None:
    """Why sonic-moe cannot run this call, or None."""
    if tap is not None:
        return "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"
    if torch.compiler.is_compiling():
        return "a graph is being compiled, which sonic-moe refuses"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "deterministic algorithms are asked for, and sonic-moe chooses its tiles by measuring them"
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down}
    reason = runtime.unsupported_cuda(**tensors, indices=indices, weights=weights)
    reason = reason or runtime.unsupported_dtype(*_FLOATS, **tensors)
    return reason or _of_sizes(hidden, gate_up, down, indices) or _of_device(hidden)


def _of_sizes(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor) -> str | None:
    (experts, width, inner), slots = down.shape, indices.shape[1]
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} {tensor.dtype}, sonic-moe takes one dtype"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous, sonic-moe takes one order of strides"
    if not indices.numel():
        return "indices holds no pair"
    if indices.numel() >= 1 << 31:
        return f"indices has {indices.numel()} pairs, sonic-moe counts to 2^31"
    if experts > _EXPERTS:
        return f"gate_up has {experts} experts, sonic-moe sorts up to {_EXPERTS}"
    if slots > experts:
        return f"indices has {slots} slots for {experts} experts, sonic-moe sums one row of each expert at most"
    for name, size in (("hidden", width), ("down", inner)):
        if size % 8:
            return f"{name} has rows of {size}, sonic-moe takes multiples of 8 (16 bytes)"
    return None


def _of_device(hidden: Tensor) -> str | None:
    found = runtime.capability(hidden)
    if found is None or found[0] == 9:
        return None
    if found[0] == 10:  # closed, and which release of QuACK mended it is not said
        return f"on compute capability {found[0]}.{found[1]} sonic-moe can be silently wrong (its issue 63)"
    return f"sonic-moe is made for compute capability 9.0 and 10.0, {hidden.device} has {found[0]}.{found[1]}"


def slower(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, *_: Tensor, **__: object) -> str | None:
    """Why "auto" leaves a call to the next implementation, or None."""
    pairs, experts = indices.numel(), gate_up.shape[0]
    if pairs >= _PAIRS * experts:
        return None
    return f"{pairs} pairs for {experts} experts: below {_PAIRS} each, reading the weights is what takes the time"


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None) -> Tensor:
    """y [N, D]; the contract of `experts`. The weights are taken in float32, as sonic-moe does itself."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    tokens = torch.arange(len(hidden), device=hidden.device, dtype=torch.int32)
    with runtime.on_device_of(hidden):
        y, _ = moe_general_routing_inputs(
            x=hidden.contiguous(), router_scores=weights.reshape(-1).float(),
            token_indices=tokens.repeat_interleave(indices.shape[1]), expert_indices=indices.reshape(-1).to(torch.int32),
            w1=gate_up.permute(1, 2, 0), b1=None, w2=down.permute(1, 2, 0), b2=None, E=gate_up.shape[0],
            stream_id=torch.cuda.current_stream(hidden.device).cuda_stream, activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not runtime.needs_gradient(hidden, gate_up, down, weights), concat_layout=True,
        )  # fmt: skip
    return y


def _missing() -> str | None:
    if reason := runtime.package_missing("sonicmoe", _HOW):
        return reason
    try:
        version = importlib.metadata.version("sonic-moe")
    except importlib.metadata.PackageNotFoundError:
        return f"sonicmoe is installed without the distribution sonic-moe: {_HOW}"
    numbers = tuple(int(part) for part in version.split(".")[:3])
    return None if numbers >= _OLDEST else f"sonic-moe {version} is installed, 0.1.2 is needed: {_HOW}"


def register(register: Callable[..., None]) -> None:
    """Enter the table in front of all others, for batches as large as those of training."""
    before = "triton" if runtime.place("gathered") else "gathered"
    register("experts", "sonic_moe", experts, unsupported, before=before, missing=_missing(), slower=slower)
