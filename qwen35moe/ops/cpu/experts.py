"""The experts with a copy of the weights per assignment, and with torch's grouped_mm. Contract in `ops.experts`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.cpu.sorted_experts import sorted_experts
from qwen35moe.ops.experts import NOT_MATERIALISED, Tap, experts, unsupported_tap
from qwen35moe.ops.precision import wide_dtype

# Limits for "auto". CPU: measured on 2 cores of Zen 4 (AVX-512 bf16), docs/reports/moe.md. CUDA: derived from bytes.
_COPIED = 1 << 20  # CPU: up to so many bytes of weights, copies cost less than one product per expert
_FEW = 32  # CUDA, assignments: copies move three times the bytes of distinct experts, but in 3 launches instead of about 15


def _gathering_is_slower(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, *_: Tensor, **__: object
) -> str | None:
    assignments = indices.numel()
    if hidden.device.type != "cpu":
        return None if assignments <= _FEW else f"{assignments} assignments, above {_FEW} copies of their weights are slow"
    copied = assignments * (gate_up[0].numel() + down[0].numel()) * hidden.element_size()
    return None if copied <= _COPIED else f"it would copy {copied} bytes of weights, the limit is {_COPIED}"


PACKED = "the experts are packed"


def _packed(gate_up: Tensor, down: Tensor) -> bool:
    """An adapter on one of the two makes it plain, as a sum."""
    return gate_up.is_mkldnn or down.is_mkldnn


def _unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> str | None:
    """The reason why a form that reads the experts as one plain tensor, without a tap, cannot run."""
    return PACKED if _packed(gate_up, down) else unsupported_tap(tap)


def _cannot_sort(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> str | None:
    if _packed(gate_up, down):
        if torch.is_autocast_enabled("cpu"):
            return f"{PACKED}, and autocast is enabled"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, gate_up, down, weights)):
            return f"{PACKED}, which has no backward, and an input requires a gradient"
    return unsupported_tap(tap)


@experts.implementation("gathered", _unsupported, before="tapped", slower=_gathering_is_slower)
def gathered_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """A copy of its expert's weights for every assignment, [N k, 2F, D] and [N k, D, F], and no sorting."""
    dtype, flat = wide_dtype(hidden), indices.reshape(-1)
    if torch.is_grad_enabled():  # the gradient of indexing sums over tokens in the dtype of what is indexed
        gathered_gate_up, gathered_down = (w.to(dtype)[flat].to(w.dtype) for w in (gate_up, down))
    else:
        gathered_gate_up, gathered_down = gate_up[flat], down[flat]
    rows = hidden.repeat_interleave(indices.shape[1], dim=0)[..., None]
    gate, up = torch.bmm(gathered_gate_up, rows).chunk(2, dim=1)
    out = torch.bmm(gathered_down, F.silu(gate) * up).view(*indices.shape, hidden.shape[1])
    return (out.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(hidden.dtype)


def _cannot_group(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> str | None:
    if tap is not None:
        return NOT_MATERIALISED
    if _packed(gate_up, down):
        return PACKED
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"grouped_mm supports float32 and bfloat16, hidden is {hidden.dtype}"
    if torch.compiler.is_compiling() and hidden.dtype != torch.bfloat16:
        return f"under torch.compile grouped_mm supports bfloat16 only, hidden is {hidden.dtype}"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0"
    widths = hidden.shape[-1], down.shape[-1]
    if any(width * hidden.element_size() % 16 for width in widths):
        return f"grouped_mm needs rows of a multiple of 16 bytes, the widths are {widths[0]} and {widths[1]} of {hidden.dtype}"
    return None


def _grouping_is_slower(hidden: Tensor, *_: Tensor, **__: object) -> str | None:
    if hidden.device.type == "cpu":
        return "on a CPU it allocates memory for every assignment: half the speed of sorted at 2048 tokens of 35b-a3b"
    return None


@experts.implementation("grouped", _cannot_group, before="tapped", slower=_grouping_is_slower, transforms=("grad",))
def grouped_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """torch's grouped_mm, without synchronisation with the host, so that it compiles without a graph break."""
    dtype, num_experts, top_k = wide_dtype(hidden), gate_up.shape[0], indices.shape[1]
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=flat.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(hidden[order // top_k], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    by_choice = out[order.argsort()].view(*indices.shape, hidden.shape[1])  # a gather and a sum, not a scatter: no atomics
    return (by_choice.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(hidden.dtype)


experts.implementation("sorted", _cannot_sort, before="tapped", transforms=(), double_backward=False)(sorted_experts)
