"""Stand-ins for packages that need a GPU or another processor: their signatures and checks, with plain PyTorch inside.

A stand-in raises where the package's source raises or its kernels would fail (causal_conv1d 1.7 and 1.6, flash-attn 2.8,
zentorch 2.13; docs/reference/adapters.md names the lines), with the same class of error; it changes the same arguments in
place, returns the same dtypes and layouts, checks the gradient that its backward receives, and has no other arguments. A
function of the package without a backward returns a tensor without one. It does not show the package's own arithmetic.
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
from qwen35moe_kernels.runtime import version_numbers

HALF = (torch.float16, torch.bfloat16)
CUDA = "CUDA error: "  # of a kernel


def require(condition: bool, message: str, error: type[Exception] = RuntimeError) -> None:
    if not condition:
        raise error(message)


def require_aligned(*tensors: Tensor) -> None:
    """16-byte accesses to every row."""
    for tensor in tensors:
        rows = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride != 1]
        require(tensor.data_ptr() % 16 == 0 and not any(stride % 8 for stride in rows), CUDA + "misaligned address")


class _Received(torch.autograd.Function):
    """The identity; `check` sees the gradient that the package's backward would receive."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, check: Callable[[Tensor], None]) -> Tensor:
        ctx.check = check
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.check(gradients[0])
        return gradients[0], None


def received(output: Tensor, check: Callable[[Tensor], None]) -> Tensor:
    return _Received.apply(output, check)  # pyright: ignore[reportReturnType]


# ---------------------------------------------------------------------------------------------------------- causal_conv1d


def _channel_last(x: Tensor) -> bool:
    """The layout by which the package chooses its kernels, with the checks of that layout."""
    channels = x.shape[1]
    require(x.stride(2) == 1 or x.stride(1) == 1, "x.stride(2) == 1 || x.stride(1) == 1")
    last = x.stride(1) == 1 and x.stride(2) > 1
    if last:
        require(channels % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now")
        require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides (x.stride(0) and x.stride(2)) to be multiples of 8")
        require_aligned(x)
    return last


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """x [B, C, T], weight [C, W]; y [B, C, T]. With seq_idx the initial states precede the first document."""
    batch, channels, tokens = x.shape
    taps = weight.shape[1]
    require(activation in (None, "silu", "swish"), "activation must be None, silu, or swish", NotImplementedError)
    require(2 <= taps <= 4, "causal_conv1d only supports width between 2 and 4")
    require(weight.shape == (channels, taps), "weight must have shape (dim, width)")
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    last = _channel_last(x)
    require(x.numel() > 0, CUDA + "invalid configuration argument")
    require(x.numel() < 1 << 32, CUDA + "an illegal memory access was encountered")
    before, first = x.new_zeros(batch, channels, taps - 1), -1
    if seq_idx is not None:
        old = version_numbers(importlib.metadata.version("causal-conv1d")) < (1, 7)
        require(initial_states is None or not old, "initial_states must be None if seq_idx is not None", AssertionError)
        require(not return_final_states, "If seq_idx is not None, we don't return final_states_out", AssertionError)
        seq_idx = seq_idx.contiguous()
        require(last, "seq_idx is only supported for channel last layout")
        require(seq_idx.dtype == torch.int32, "seq_idx.scalar_type() == torch::kInt32")
        require(seq_idx.shape == (batch, tokens), "seq_idx must have shape (batch_size, seqlen)")
        behind = seq_idx.untyped_storage().nbytes() // 4 - seq_idx.storage_offset() - seq_idx.numel()
        require(not old or behind >= -tokens % 64, CUDA + "an illegal memory access was encountered")  # their PR 117
    if initial_states is not None:
        require(last, "initial_states is only supported for channel last layout")
        require(initial_states.dtype == x.dtype, "initial_states.scalar_type() == input_type")
        require(initial_states.shape == before.shape, "initial_states must have shape (batch_size, dim, width - 1)")
        require(initial_states.stride(1) == 1, "initial_states.stride(1) == 1")
        require_aligned(initial_states)
        before, first = initial_states, None
    require(not return_final_states and final_states_out is None and bias is None, "not in this stand-in")
    inputs, wide = torch.cat([before, x], dim=-1).float(), weight.float()
    total = torch.zeros(batch, channels, tokens, device=x.device)
    for w in range(taps):
        back = taps - 1 - w
        term = inputs[..., w : w + tokens] * wide[:, w, None]
        if seq_idx is not None and back:
            of = seq_idx[:, :1] if first is None else seq_idx.new_full((batch, 1), first)
            same = torch.cat([of.expand(-1, back), seq_idx], dim=1)[:, :tokens] == seq_idx
            term = torch.where(same[:, None], term, 0.0)
        total = total + term
    y = (F.silu(total) if activation else total).to(x.dtype)
    y = y.mT.contiguous().mT if last else y

    def check(gradient: Tensor) -> None:
        if gradient.stride(2) != 1 and gradient.stride(1) != 1:
            gradient = gradient.contiguous()
        if last:
            gradient = gradient if gradient.stride(1) == 1 else gradient.mT.contiguous().mT
            aligned = gradient.stride(2) % 8 == 0 and gradient.stride(0) % 8 == 0
            require(aligned, "requires strides (dout.stride(0) and dout.stride(2)) to be multiples of 8")
            require_aligned(gradient)

    return received(y, check)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, C], conv_state [B, C, >= W-1], written in place."""
    taps = weight.shape[1]
    require(activation in (None, "silu", "swish"), "activation must be None, silu, or swish", NotImplementedError)
    require(conv_state.dtype == x.dtype, "conv_state.scalar_type() == input_type")
    require(conv_state.shape[2] >= taps - 1, "conv_state_len >= width - 1")
    require(weight.shape[0] == x.shape[1], "weight must have shape (dim, width)")
    require(2 <= taps <= 4, "causal_conv1d only supports width between 2 and 4")
    require(conv_state.shape[:2] == x.shape, "conv_state must have shape (batch_size, dim, conv_state_len)")
    require(x.numel() > 0, CUDA + "invalid configuration argument")
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


def _last_contiguous(x: Tensor) -> Tensor:
    return x.contiguous() if x.stride(-1) != 1 else x


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    require(k.dtype == q.dtype, "query and key must have the same dtype")
    require(v.dtype == q.dtype, "query and value must have the same dtype")
    require(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    require(q.shape[-1] % 8 == 0, "not in this stand-in: the package pads the head dimension to a multiple of 8")
    require(k.shape == v.shape and q.shape[-1] == k.shape[-1], "v must have shape (.., num_heads_k, head_size)")
    require(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    require_aligned(q, k, v)
    require(q.shape[0] > 0, "batch size must be positive")
    require(q.numel() > 0, CUDA + "invalid configuration argument")


def _check_attention_gradient(gradient: Tensor) -> None:
    require_aligned(_last_contiguous(gradient))


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    _check_attention(q, k, v)
    require(q.dim() == 4 and k.shape[0] == q.shape[0], "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    rows = [_softmax_attention(*row, softmax_scale, causal, dropout_p) for row in zip(q, k, v, strict=True)]
    return received(torch.stack(rows), _check_attention_gradient)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    _check_attention(q, k, v)
    require(q.dim() == 3, "q must have shape (total_q, num_heads, head_size)")
    for bounds in (cu_seqlens_q, cu_seqlens_k):
        require(bounds.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
        require(bounds.is_contiguous(), "cu_seqlens_q must be contiguous")
        require(bounds.numel() > 1, "batch size must be positive")
    require(isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int), "incompatible function arguments", TypeError)
    require(max_seqlen_q >= int(cu_seqlens_q.diff().max()), "rows beyond max_seqlen_q are not written")
    require(max_seqlen_k >= int(cu_seqlens_k.diff().max()), "max_seqlen_k is the longest")
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and not dropout_p:
        require(len(q) == len(cu_seqlens_q) - 1, "shape '[batch_size, num_heads_k, ngroups, head_size]' is invalid")
    splits = (cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), cu_seqlens_k.diff().tolist())
    rows = zip(*(x.split(sizes) for x, sizes in zip((q, k, v), splits, strict=True)), strict=True)
    out = torch.cat([_softmax_attention(*row, softmax_scale, causal, dropout_p) for row in rows])
    return received(out, _check_attention_gradient)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:  # fmt: skip
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(cache.stride(-1) == 1, f"{name} must have contiguous last dimension", AssertionError)
    q = _last_contiguous(q)
    _check_attention(q, k_cache, v_cache)
    if isinstance(cache_seqlens, Tensor):
        require(cache_seqlens.dtype == torch.int32, "seqlens_k must have dtype int32")
        require(cache_seqlens.is_contiguous(), "seqlens_k must be contiguous")
        require(cache_seqlens.shape == q.shape[:1], "seqlens_k must have shape (batch_size)")
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
    "causal_conv1d": ("1.7.0", (causal_conv1d_fn, causal_conv1d_update)),
    "flash_attn": ("2.8.3", (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)),
}


@contextmanager
def installed(package: str, operations: tuple[str, ...], version: str | None = None) -> Iterator[ModuleType]:
    """Installs the stand-in and registers its adapter again, as on a machine with a GPU; the adapter takes CPU tensors."""
    from qwen35moe_kernels import runtime

    newest, functions = PACKAGES[package]
    version = version or newest
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
