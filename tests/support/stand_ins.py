"""Stand-ins for packages that need a GPU or another processor: the documented signatures and checks, with plain PyTorch inside.

A stand-in rejects the dtypes, strides, shapes and combinations of arguments that the package rejects, according to the
package's documentation and checks (causal_conv1d 1.6, flash-attn 2.8, zentorch 2.13), and has no other arguments. It does not
show the package's own arithmetic.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends

HALF = (torch.float16, torch.bfloat16)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# ---------------------------------------------------------------------------------------------------------- causal_conv1d


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """x [B, C, T], weight [C, W]; y [B, C, T]."""
    batch, channels, tokens = x.shape
    taps = weight.shape[1]
    require(activation in (None, "silu", "swish"), "activation must be None, silu, or swish")
    require(2 <= taps <= 4, "causal_conv1d only supports width between 2 and 4")
    require(weight.shape == (channels, taps), "weight must have shape (dim, width)")
    require(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")
    last = x.stride(1) == 1 and x.stride(2) > 1
    if last:
        require(channels % 8 == 0, "only supports channel dimension divisible by 8")
        require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides must be multiples of 8")
    before = x.new_zeros(batch, channels, taps - 1)
    if seq_idx is not None:
        require(initial_states is None, "initial_states must be None if seq_idx is not None")
        require(not return_final_states, "If seq_idx is not None, we don't return final_states_out")
        require(last and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous(), "seq_idx: channel last, int32")
        require(seq_idx.shape == (batch, tokens), "seq_idx must have shape (batch_size, seqlen)")
        behind = seq_idx.untyped_storage().nbytes() // 4 - seq_idx.storage_offset() - seq_idx.numel()
        require(behind >= -tokens % 256, "an illegal memory access was encountered")  # their PR 117
    if initial_states is not None:
        require(last and initial_states.dtype == x.dtype, "initial_states: channel last, x's dtype")
        require(initial_states.shape == before.shape and initial_states.stride(1) == 1, "initial_states.stride(1) == 1")
        before = initial_states
    require(not return_final_states and final_states_out is None and bias is None, "not in this stand-in")
    inputs, wide = torch.cat([before, x], dim=-1).float(), weight.float()
    total = torch.zeros(batch, channels, tokens, device=x.device)
    for w in range(taps):
        back = taps - 1 - w
        term = inputs[..., w : w + tokens] * wide[:, w, None]
        if seq_idx is not None and back:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, :tokens] == seq_idx
            term = torch.where(same[:, None], term, 0.0)
        total = total + term
    y = (F.silu(total) if activation else total).to(x.dtype)
    return y.mT.contiguous().mT if last else y


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, C], conv_state [B, C, >= W-1], written in place."""
    taps = weight.shape[1]
    require(not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad), "it has no backward")
    require(conv_state.dtype == x.dtype, "conv_state.scalar_type() == input_type")
    require(conv_state.shape[:2] == x.shape and conv_state.shape[2] >= taps - 1, "conv_state (batch, dim, state_len)")
    require(2 <= taps <= 4, "causal_conv1d only supports width between 2 and 4")
    require(bias is None and cache_seqlens is None and conv_state_indices is None, "not in this stand-in")
    inputs = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(inputs[..., 1:])
    total = (inputs[..., -taps:].float() * weight.float()).sum(-1)
    return (F.silu(total) if activation else total).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- flash_attn


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, dropout_p: float) -> Tensor:
    """One row: q [T, H, K], k and v [P, G, K]. The causal mask is aligned to the last key."""
    repeats, tokens, positions = q.shape[1] // k.shape[1], q.shape[0], k.shape[0]
    k, v = (x.float().repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        visible = torch.ones(tokens, positions, dtype=torch.bool, device=q.device).tril(positions - tokens)
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.dropout(scores.softmax(-1).nan_to_num(0.0), dropout_p)
    return torch.einsum("hts,shk->thk", weights, v).to(q.dtype)


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, "query and key must have the same dtype")
    require(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head dimension at most 256")
    require(k.shape == v.shape and q.shape[-1] == k.shape[-1], "k and v must have one shape")
    require(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    _check_attention(q, k, v)
    require(q.dim() == 4, "q (batch_size, seqlen, nheads, headdim)")
    return torch.stack([_softmax_attention(*row, softmax_scale, causal, dropout_p) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_attention(q, k, v)
    require(q.dim() == 3, "q (total_q, nheads, headdim)")
    require(cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
    require(isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int), "max_seqlen is an int")
    require(max_seqlen_q == int(cu_seqlens_q.diff().max()), "max_seqlen_q is the longest")
    require(max_seqlen_k == int(cu_seqlens_k.diff().max()), "max_seqlen_k is the longest")
    splits = (cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), cu_seqlens_k.diff().tolist())
    rows = zip(*(x.split(sizes) for x, sizes in zip((q, k, v), splits, strict=True)), strict=True)
    return torch.cat([_softmax_attention(*row, softmax_scale, causal, dropout_p) for row in rows])


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:  # fmt: skip
    _check_attention(q, k_cache, v_cache)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache))
    require(not gradient, "flash_attn_with_kvcache does not support backward pass")
    if isinstance(cache_seqlens, Tensor):
        require(cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1], "seqlens_k int32 (batch_size,)")
        ends = cache_seqlens.tolist()
    else:
        ends = [k_cache.shape[1] if cache_seqlens is None else cache_seqlens] * q.shape[0]
    rows = [
        _softmax_attention(q[i], k_cache[i, :end], v_cache[i, :end], softmax_scale, causal, 0.0) for i, end in enumerate(ends)
    ]
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------------- zentorch


class Zentorch:
    """The operator of zentorch 2.13 and what it does with weights, by ZENDNNL_MATMUL_WEIGHT_CACHE at its first call.

    2 or unset: it overwrites an expert's weights with its own layout, once, and reads that from then on. 1: it keeps a copy in
    that layout, which it finds by the address of the weights and uses even if they have changed. 0: it copies at every call.
    """

    def __init__(self, mode: int | None = None) -> None:
        self.mode = mode  # None: by the environment
        self.reordered: set[int] = set()
        self.copies: dict[int, Tensor] = {}
        self.calls: list[tuple[Tensor, ...]] = []
        self.running = False

    def zentorch_fused_moe(
        self, output: Tensor, input: Tensor, w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None,
        topk_weights: Tensor, topk_id: Tensor, skip_weighted: bool, act: str,
    ) -> None:  # fmt: skip
        """output and input [T, H], w13 [E, 2I, H], w2 [E, H, I], topk_weights and topk_id [T, K]."""
        if self.mode is None:
            self.mode = int(os.environ.get("ZENDNNL_MATMUL_WEIGHT_CACHE", "2"))
        require(not self.running, "one scratch buffer: not for several threads")
        require(w13_bias is None and w2_bias is None and not skip_weighted and act == "silu", "not in this stand-in")
        require(input.dtype in (torch.float32, torch.bfloat16), "input[0] must be float32 or bfloat16")
        require(input.dtype == output.dtype == w13.dtype == w2.dtype, "one dtype")
        require(topk_weights.dtype == torch.float32, "expected scalar type Float")
        require(topk_id.dtype == torch.int32, "expected scalar type Int")
        require(all(x.is_contiguous() for x in (output, input, w13, w2, topk_weights, topk_id)), "wrong silently: strides")
        require(bool((output == 0).all()), "zero-initialized")
        require(0 <= int(topk_id.min()) and int(topk_id.max()) < len(w13), "wrong silently: indices")
        require(len(topk_id.unique()) > 1, "only 1 expert(s) received tokens")
        self.running = True
        self.calls.append((output, input, w13, w2, topk_weights, topk_id))
        experts = len(w13)
        gate_up, down = (torch.stack([self._plain(w[e]) for e in range(experts)]).float() for w in (w13, w2))
        gate, up = torch.einsum("th,eih->tei", input.float(), gate_up).chunk(2, dim=-1)
        rows = torch.einsum("tei,ehi->teh", (F.silu(gate) * up).to(input.dtype).float(), down).to(input.dtype).float()
        mixed = rows.new_zeros(len(input), experts).scatter_add(1, topk_id.long(), topk_weights)
        output.add_(torch.einsum("te,teh->th", mixed, rows).to(output.dtype))
        self.running = False

    def _plain(self, weight: Tensor) -> Tensor:
        address = weight.data_ptr()
        if self.mode == 0:
            return weight
        if self.mode == 1:
            return self.copies.setdefault(address, weight.clone())
        if address not in self.reordered:
            self.reordered.add(address)
            weight.copy_(weight.clone().T.reshape(weight.shape))
        return weight.reshape(weight.shape[::-1]).T


@contextmanager
def zentorch_installed(folder: Path, stand_in: Zentorch, version: str = "2.13.0.2", name: str = "zentorch") -> Iterator[None]:
    """The stand-in as an installed package in an empty folder, and the adapter as after the start of Python."""
    from qwen35moe.backends.operation import TABLE
    from qwen35moe_kernels import zentorch as adapter

    (folder / "zentorch.py").touch()
    known, before = importlib.metadata.version, backends.implementations("experts")

    def installed_version(query: str) -> str:
        if query not in ("zentorch", "zentorch-weekly"):
            return known(query)
        if query != name:
            raise importlib.metadata.PackageNotFoundError(query)
        return version

    with ExitStack() as stack:
        for owner, attribute, value in (
            (importlib.metadata, "version", installed_version), (torch.ops, "zentorch", stand_in),
            (torch, "__version__", "2.13.1+cpu"), (adapter, "_package", None), (adapter, "_read", {}), (adapter, "_tried", {}),
            (adapter, "_compared", set()), (adapter, "_AVX512", True),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.dict(sys.modules))
        importlib.invalidate_caches()
        stack.callback(TABLE["experts"].assign, before)
        _register_again(adapter, "zentorch", ("experts",))
        yield


# -------------------------------------------------------------------------------------------------------------- installing

PACKAGES: dict[str, tuple[str, tuple[Callable[..., Any], ...]]] = {
    "causal_conv1d": ("1.6.0", (causal_conv1d_fn, causal_conv1d_update)),
    "flash_attn": ("2.8.3", (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)),
}


@contextmanager
def installed(package: str, operations: tuple[str, ...]) -> Iterator[ModuleType]:
    """Installs the stand-in and registers its adapter again, as on a machine with a GPU; the adapter takes CPU tensors."""
    from qwen35moe_kernels import runtime

    version, functions = PACKAGES[package]
    module = ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    for function in functions:
        setattr(module, function.__name__, function)
    adapter = importlib.import_module(f"qwen35moe_kernels.{package}")
    known = importlib.metadata.version
    name = package.replace("_", "-")
    patches = [
        mock.patch.dict(sys.modules, {package: module}),
        mock.patch.object(importlib.metadata, "version", lambda query: version if query in (package, name) else known(query)),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(runtime, "unsupported_cuda", lambda **tensors: None),
    ]
    before = {operation: backends.implementations(operation) for operation in operations}
    with patches[0], patches[1]:
        with patches[2]:
            _register_again(adapter, package, operations)
        try:
            with patches[3]:
                yield module
        finally:
            from qwen35moe.backends.operation import TABLE

            for operation in operations:
                TABLE[operation].assign(before[operation])


def _register_again(adapter: ModuleType, package: str, operations: tuple[str, ...]) -> None:
    for operation in operations:
        backends.unregister(operation, package)
    adapter.register(backends.register)
