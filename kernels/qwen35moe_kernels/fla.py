"""Adapter to flash-linear-attention (>= 0.6): `chunk_gated_delta_rule`, and `fused_recurrent_gated_delta_rule` for one token.

fla calls the decay g, value heads HV (our H) and key heads H (our G). It supports fewer key heads than value heads (its GVA)
and normalises queries and keys with the same eps, 1e-6. It does not support float32 within 2e-5 (its chunks multiply in
TF32), float64, heads wider than 256, tensors that are not on CUDA, and compiled graphs.

With flash-qla installed, fla dispatches to it for bfloat16 and float16 at K = V = 128 on Hopper and Blackwell, unless
FLA_FLASH_QLA=0. Gradients depend on it: fla's own backward is wrong on Hopper with Triton 3.4 to 3.7.0 (its issue 640; fla
raises there), and has returned NaN on data-centre Blackwell (its issue 913; fla 0.6 avoids the tile sizes of that report,
which nobody has verified here). flash-qla assigns the tokens after an empty document to the wrong one. The contract, line by
line: docs/reference/adapters.md.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

OLDEST = (0, 6)
HOW = "pip install 'flash-linear-attention>=0.6' (and flash-qla, which fla uses if it is installed)"
WIDEST = 256
GRID = 65535  # programs along the second axis of a CUDA grid: fla launches one for each row and head
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
    """Of an NVIDIA GPU; (0, 0) for AMD's, whose numbers (9.4 for an MI300) say nothing about NVIDIA's generations."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def _takes_flash_qla(query: Tensor, value: Tensor, gradient: bool) -> bool:
    """Whether fla dispatches to flash-qla, by the rules of its own dispatch."""
    enabled = os.environ.get("FLA_FLASH_QLA", "1") != "0" and os.environ.get("FLA_DISABLE_BACKEND_DISPATCH", "0") != "1"
    supported = query.shape[-1] == value.shape[-1] == 128 and query.dtype in _HALF
    if not (enabled and supported and runtime.installed("flash_qla")):
        return False
    capability = _capability(query.device)
    return capability[0] in (9, 10) or (capability == (12, 0) and query.dtype == torch.bfloat16 and not gradient)


def _unsupported_by_own_kernels(batch: int, heads: int, device: torch.device, gradient: bool) -> str | None:
    """None, or why fla's own chunked kernels cannot run."""
    if batch * heads > GRID:
        return f"{batch} rows of {heads} heads: fla launches at most {GRID} together"
    if runtime.strictly_deterministic():
        return "deterministic algorithms are enabled, and fla chooses its tiles by timing them"
    return _wrong_gradients(_capability(device)) if gradient else None


def _wrong_gradients(capability: tuple[int, int]) -> str | None:
    """None, or why fla's own backward is known to be wrong on this machine."""
    if capability[0] not in (9, 10):
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


@runtime.same_result
def _bounds(cu_seqlens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The arguments cu_seqlens, a copy, and cu_seqlens_cpu if they are on the host.

    fla and flash-qla keep the layout of the chunks by the identity of these objects and never compare their values. A tensor
    that the caller fills again must therefore not reach them, while a new copy in every layer would be laid out every time.
    """
    bounds = {"cu_seqlens": runtime.send(cu_seqlens.to(torch.int64, copy=True), device)}
    values = runtime.values_on_host(cu_seqlens)
    if values is not None:
        bounds["cu_seqlens_cpu"] = torch.tensor(values, dtype=torch.int64, device="cpu")
    return bounds


@runtime.same_result
def _any_empty(cu_seqlens: Tensor) -> bool:
    """Whether a document is empty. Reads from the device, once, as flash-qla does as well, unless the host has the values."""
    values = runtime.values_on_host(cu_seqlens)
    if values is None:
        return bool((cu_seqlens.diff() == 0).any())
    return any(start == end for start, end in pairwise(values))


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None, or the reason why fla cannot run this call."""
    if torch.compiler.is_compiling():
        return "a graph is being compiled, and fla is not a torch.library operator"
    if not value.numel():
        return f"value {list(value.shape)} is empty"
    floats = {"query": query, "key": key, "value": value, "decay": decay, "beta": beta, "state": state}
    if reason := runtime.unsupported_cuda(**floats):
        return reason
    gradient = runtime.needs_gradient(*floats.values())
    one_token = _one_token(query, cu_seqlens, gradient)
    dtypes = (*_HALF, torch.float32) if one_token else _HALF
    if reason := runtime.unsupported_dtype(*dtypes, query=query, key=key, value=value):
        return reason if query.dtype != torch.float32 else f"{reason}: fla multiplies float32 in TF32, to three digits"
    if reason := runtime.unsupported_dtype(*_HALF, torch.float32, decay=decay, beta=beta, state=state):
        return reason
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}: fla takes one dtype"
    if max(key.shape[-1], value.shape[-1]) > WIDEST:
        return f"heads are {key.shape[-1]} and {value.shape[-1]} wide: fla takes at most {WIDEST}"
    if one_token:
        return None
    if not _takes_flash_qla(query, value, gradient):
        return _unsupported_by_own_kernels(query.shape[0], value.shape[2], query.device, gradient)
    if cu_seqlens is not None and _any_empty(cu_seqlens):
        return "a document of cu_seqlens is empty: flash-qla, to which fla dispatches, assigns tokens to wrong documents"
    return None


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
        options |= _bounds(cu_seqlens, query.device)
    return chunk_gated_delta_rule(query, key, value, **options)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of all others: an installed package was built for this machine."""
    before = "triton" if runtime.place("chunked_cpu") else "chunked_cpu"
    reason = missing()
    register(
        "gated_delta_rule", "fla", None if reason else gated_delta_rule, unsupported, before=before, missing=reason,
        **runtime.FIRST_ORDER,
    )  # fmt: skip
