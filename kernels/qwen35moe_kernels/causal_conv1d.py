"""Adapter to causal_conv1d (>= 1.4): `causal_conv1d_fn` with seq_idx, and `causal_conv1d_update` for one cached token.

Its channel-last layout [B, C, T] is a transposed view of our [B, T, C]. It supports 2 to 4 taps, channels in multiples of 8,
and either packed documents (seq_idx) or an initial state (initial_states), not both: since 1.7 it accepts both, but applies
the state to the first document only. The new conv_state is sliced in PyTorch, because its own final states support neither
padding nor documents. Its contract, line by line: docs/reference/adapters.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST, _DETERMINISTIC = (1, 4), (1, 6)
_INDEXED = 1 << 32  # its kernels compute offsets into x as uint32
_READ_BEHIND = 256  # before 1.7 its forward can read past seq_idx to the end of a chunk, of 64 in 1.5.3 (its PR 117)


@cache
def _sums_atomically() -> bool:
    """Whether the backward adds the parts of weight's gradient in any order, even with deterministic algorithms."""
    try:
        version = importlib.metadata.version("causal-conv1d")
    except importlib.metadata.PackageNotFoundError:
        return False
    return runtime.version_numbers(version) < _DETERMINISTIC


def unsupported(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None, or the reason why causal_conv1d cannot run this call."""
    taps, channels = weight.shape[-1], x.shape[-1]
    if not 2 <= taps <= 4:
        return f"weight has {taps} taps, causal_conv1d takes 2 to 4"
    if channels % 8:
        return f"x has {channels} channels, causal_conv1d takes multiples of 8"
    if cu_seqlens is not None and state is not None:
        return "state: causal_conv1d takes no initial state for packed documents (cu_seqlens)"
    if not x.numel():
        return f"x {list(x.shape)} is empty"
    if x.numel() >= _INDEXED:
        return f"x has {x.numel()} elements, causal_conv1d indexes fewer than 2^32"
    if torch.compiler.is_compiling():
        return "a graph is being compiled, and causal_conv1d_fn is not a torch.library operator"
    if runtime.strictly_deterministic() and runtime.needs_gradient(x, weight, state) and _sums_atomically():
        return "deterministic algorithms are enabled, and causal_conv1d before 1.6 sums the gradient of weight atomically"
    return runtime.unsupported_cuda(x=x, weight=weight, state=state, lengths=lengths) or runtime.unsupported_dtype(
        *_FLOATS, x=x, weight=weight
    )


def short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, T, C] and conv_state [B or documents, C, W-1], as `short_convolution` defines them."""
    causal_conv1d: Any = importlib.import_module("causal_conv1d")
    past = weight.shape[-1] - 1
    one_token = x.shape[1] == 1 and lengths is None and cu_seqlens is None
    if one_token and not runtime.needs_gradient(x, weight, state):
        after = x.new_zeros(x.shape[0], x.shape[-1], past) if state is None else state.to(x.dtype, copy=True)
        after = after.contiguous()  # causal_conv1d_update writes to it
        y = causal_conv1d.causal_conv1d_update(x[:, 0].contiguous(), after, weight.contiguous(), activation="silu")
        return y[:, None], after
    x = runtime.aligned(x.contiguous())
    before = None if state is None else runtime.aligned(state.to(x.dtype).mT.contiguous())  # [B, W-1, C]
    y = causal_conv1d.causal_conv1d_fn(
        x.mT, weight.contiguous(), seq_idx=None if cu_seqlens is None else _documents(cu_seqlens, x.shape[1], x.device),
        initial_states=None if before is None else before.mT,
        activation="silu",
    )  # fmt: skip
    return runtime.align_gradient(y.mT), _conv_state(x, past, before, lengths, cu_seqlens)


@runtime.same_result
def _documents(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """seq_idx: the document of every token, int32 [1, T], a slice of a longer tensor (see _READ_BEHIND). Made once for all
    layers of a call."""
    positions = torch.arange(tokens + _READ_BEHIND, device=device, dtype=cu_seqlens.dtype)
    documents = torch.bucketize(positions, runtime.send(cu_seqlens[1:], device), right=True, out_int32=True)
    return documents[None, :tokens]


def _conv_state(x: Tensor, past: int, before: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B or documents, C, W-1]: the last inputs of each; a shorter one keeps inputs of `before`, or zeros."""
    back = torch.arange(-past, 0, device=x.device)
    if cu_seqlens is not None:
        bounds = runtime.send(cu_seqlens, x.device)
        positions = bounds[1:, None] + back
        inside = positions >= bounds[:-1, None]
        last = x[0, torch.where(inside, positions, 0)]
        return torch.where(inside[..., None], last, last.new_zeros(())).mT
    inputs = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat([before, x], dim=1)
    if lengths is None:
        return inputs[:, inputs.shape[1] - past :].mT
    positions = lengths[:, None] + past + back
    return inputs.gather(1, positions[..., None].expand(-1, -1, x.shape[-1])).mT


def register(register: Callable[..., None]) -> None:
    """Registers ahead of all others: an installed package was built for this machine."""
    how = "pip install causal-conv1d"
    missing = runtime.package_missing("causal_conv1d", how, distribution="causal-conv1d", oldest=_OLDEST)
    before = "triton" if runtime.place("cpu") else "cpu"
    options = {"before": before, "missing": missing, **runtime.FIRST_ORDER}
    register("short_convolution", "causal_conv1d", short_convolution, unsupported, **options)
