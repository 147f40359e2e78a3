"""Adapter to flash-linear-attention (>= 0.6): `chunk_gated_delta_rule`, and `fused_recurrent_gated_delta_rule` for one token.

fla calls the decay g, value heads HV (our H) and key heads H (our G). It supports fewer key heads than value heads (its GVA)
and normalises queries and keys with the same eps, 1e-6. It does not support float32 within 2e-5 (its chunks multiply in
TF32), float64, heads wider than 256, tensors that are not on CUDA, and compiled graphs.

With flash-qla installed, fla dispatches to it for bfloat16 and float16 at K = V = 128 on Hopper and Blackwell, unless
FLA_FLASH_QLA=0. Gradients depend on it: fla's own backward is wrong on Hopper with Triton 3.4 to 3.7.0 (its issue 640; fla
raises there), and has returned NaN on data-centre Blackwell (its issue 913).
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

OLDEST = (0, 6)
HOW = "pip install 'flash-linear-attention>=0.6' (and flash-qla, which fla uses if it is installed)"
WIDEST = 256
_HALF = (torch.bfloat16, torch.float16)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def missing() -> str | None:
    """None, or the reason why fla cannot be used on this machine."""
    if reason := runtime.package_missing("fla", HOW):
        return reason
    version = _version("fla-core", "flash-linear-attention")
    if version is not None and runtime.version_numbers(version) < OLDEST:
        return f"fla {version} is installed, the adapter needs 0.6 or newer: {HOW}"
    return None


def _one_token(query: Tensor, cu_seqlens: Tensor | None, gradient: bool) -> bool:
    """Whether the recurrent kernel runs: it is the faster one for one token, and has no backward."""
    return query.shape[1] == 1 and cu_seqlens is None and not gradient


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _takes_flash_qla(query: Tensor, value: Tensor, capability: tuple[int, int]) -> bool:
    """Whether fla dispatches forward and backward to flash-qla, by the rules of its own dispatch."""
    enabled = os.environ.get("FLA_FLASH_QLA", "1") != "0" and os.environ.get("FLA_DISABLE_BACKEND_DISPATCH", "0") != "1"
    supported = query.shape[-1] == value.shape[-1] == 128 and query.dtype in _HALF
    return enabled and supported and capability[0] in (9, 10) and runtime.installed("flash_qla")


def _wrong_gradients(query: Tensor, value: Tensor) -> str | None:
    """None, or why fla's own backward is known to be wrong on this machine."""
    capability = _capability(query.device)
    if capability[0] not in (9, 10) or _takes_flash_qla(query, value, capability):
        return None
    if capability[0] == 10:
        return "an input requires a gradient, and fla's backward returned NaN on this GPU (its issue 913): install flash-qla"
    version = _version("triton") or ""
    if not (3, 4) <= runtime.version_numbers(version) < (3, 7, 1):
        return None
    return (
        f"an input requires a gradient, and fla's backward is wrong on Hopper GPUs with Triton {version} (its issue 640): "
        "install Triton 3.7.1 or flash-qla"
    )


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None, or the reason why fla cannot run this call."""
    if torch.compiler.is_compiling():
        return "a graph is being compiled, and fla is not a torch.library operator"
    floats = {"query": query, "key": key, "value": value, "decay": decay, "beta": beta, "state": state}
    if reason := runtime.unsupported_cuda(**floats):
        return reason
    gradient = runtime.needs_gradient(*floats.values())
    dtypes = (*_HALF, torch.float32) if _one_token(query, cu_seqlens, gradient) else _HALF
    if reason := runtime.unsupported_dtype(*dtypes, query=query, key=key, value=value):
        return reason if query.dtype != torch.float32 else f"{reason}: fla multiplies float32 in TF32, to three digits"
    if reason := runtime.unsupported_dtype(*_HALF, torch.float32, decay=decay, beta=beta, state=state):
        return reason
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}: fla takes one dtype"
    if max(key.shape[-1], value.shape[-1]) > WIDEST:
        return f"heads are {key.shape[-1]} and {value.shape[-1]} wide: fla takes at most {WIDEST}"
    return _wrong_gradients(query, value) if gradient else None


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation `gated_delta_rule`; the final state is float32. With cu_seqlens on the host, fla lays out its chunks
    without reading from the device."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule  # pyright: ignore[reportMissingImports]

    decay = decay.float()
    options = {
        "g": decay, "beta": beta, "scale": query.shape[-1] ** -0.5, "output_final_state": True,
        "initial_state": None if state is None else state.float(), "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    if _one_token(query, cu_seqlens, runtime.needs_gradient(query, key, value, decay, beta, state)):
        return fused_recurrent_gated_delta_rule(query, key, value, **options)
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens.to(query.device, torch.int64)
        if cu_seqlens.device.type == "cpu":
            options["cu_seqlens_cpu"] = cu_seqlens.to(torch.int64)
    return chunk_gated_delta_rule(query, key, value, **options)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of all others: an installed package was built for this machine."""
    before = "triton" if runtime.place("chunked_cpu") else "chunked_cpu"
    reason = missing()
    register(
        "gated_delta_rule", "fla", None if reason else gated_delta_rule, unsupported, before=before, missing=reason,
        **runtime.FIRST_ORDER,
    )  # fmt: skip
