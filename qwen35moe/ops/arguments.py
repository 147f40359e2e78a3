"""Checks the arguments of an operation that a user calls directly: shapes, dtypes and bounds against the operation's contract.

A module passes `caller=`, and its arguments have the right shapes by construction: nothing is checked then, nor inside a
compiled graph. Without the checks a wrong shape may broadcast, and the result is another function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe.backends.operation import TABLE
from qwen35moe.backends.values import values_known

# The axes of every tensor, as in the operations' docstrings. `...` stands for the same leading axes everywhere; N of a state is
# the number of rows, with cu_seqlens that of documents.
AXES = {
    "rms_norm": "x ... D, weight D",
    "add_rms_norm": "residual ... D, change ... D, weight D",
    "gated_rms_norm": "x ... V, gate ... V, weight V",
    "rotary": "query B T H K, key B T G K, cos B T R/2, sin B T R/2",
    "norm_rotary": "query B T H K, key B T G K, cos B T R/2, sin B T R/2, query_weight K, key_weight K",
    "attention": "query B T H K, key B P G K, value B P G V",
    "sigmoid_gate": "x ... V, gate ... V",
    "vision_attention": "query N H K, key N H K, value N H K",
    "linear": "x ... D, weight F D, bias F",
    "projections": "x ... D, first F1 D, second F2 D, third F3 D, fourth F4 D",
    "swiglu": "x ... D, gate_weight F D, up_weight F D",
    "add_shared_expert": "residual ... D, routed ... D, shared ... D, x ... D, gate_weight 1 D",
    "gelu_linear": "x N D, weight F D, bias F",
    "short_convolution": "x B T C, weight C W, state N C W-1, lengths B",
    "gated_delta_rule": "query B T G K, key B T G K, value B T H V, decay B T H, beta B T H, state N H K V",
    "delta_net_step": "qkv B C, gate B H V, a B H, b B H, conv_state B C W-1, recurrent_state B H K V, conv_weight C W, "
    "A_log H, dt_bias H, norm_weight V",
    "router": "hidden N D, weight E D",
    "experts": "hidden N D, gate_up E 2F D, down E D F, indices N k, weights N k",
    "linear_cross_entropy": "hidden N D, weight vocabulary D, labels N",
}
INTEGERS = ("indices", "labels", "lengths", "cu_seqlens")
SIZES = {"R/2": ("R", lambda n: 2 * n), "W-1": ("W", lambda n: n + 1), "2F": ("F", lambda n: n // 2)}  # axis -> what it tells


def check_arguments(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """ValueError where the arguments of a call of the operation `name` contradict its contract."""
    operands = _bound(name, args, kwargs)
    sizes: dict[str, int] = {}
    for tensor, axes in (part.split(maxsplit=1) for part in AXES[name].split(", ")):
        x = operands.get(tensor)
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: {tensor} is a tensor [{', '.join(axes.split())}], got a {type(x).__name__}")
        _check_dtype(name, tensor, x)
        _check_axes(name, tensor, x, axes.split(), sizes)
    _check_dtypes_agree(name, operands)
    if (bounds := operands.get("cu_seqlens")) is not None:
        _check_bounds(name, bounds, sizes)
    if name in MORE:
        MORE[name](operands, sizes)


def _bound(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; TypeError, as any function raises it, where one is missing or unknown."""
    return inspect.signature(TABLE[name].definition).bind(*args, **kwargs).arguments


def _check_dtype(name: str, tensor: str, x: Tensor) -> None:
    if tensor in INTEGERS:
        if x.is_floating_point() or x.is_complex() or x.dtype in (torch.bool, torch.uint8):
            raise ValueError(f"{name}: {tensor} holds integers, got {x.dtype}: convert it to torch.int64")
    elif not x.is_floating_point():
        raise ValueError(f"{name}: {tensor} holds floating-point numbers, got {x.dtype}")


def _check_axes(name: str, tensor: str, x: Tensor, axes: list[str], sizes: dict[str, int]) -> None:
    """Axes of a name have one size throughout the call."""
    shape, expected = list(x.shape), f"{name}: {tensor} {list(x.shape)} must be [{', '.join(axes)}]"
    if axes[0] == "...":
        leading = tuple(shape[:-1])
        if sizes.setdefault("...", leading) != leading or not shape:  # type: ignore[arg-type]
            raise ValueError(f"{expected}, and the axes before the last one {list(sizes['...'])}")  # type: ignore[call-overload]
        shape, axes = shape[-1:], axes[1:]
    if len(shape) != len(axes):
        raise ValueError(expected)
    for axis, size in zip(axes, shape, strict=True):
        key, meaning = SIZES.get(axis, (axis, int))
        if sizes.setdefault(key, meaning(size)) != meaning(size) or (axis == "2F" and size % 2):
            raise ValueError(f"{expected}, with {key} = {sizes[key]}")


def _check_dtypes_agree(name: str, operands: dict[str, Any]) -> None:
    """Operands of one product; elsewhere each operation computes in the widest dtype."""
    dtypes = {tensor: operands[tensor].dtype for tensor in PRODUCTS.get(name, ())}
    if len(set(dtypes.values())) > 1 and not torch.is_autocast_enabled(operands[PRODUCTS[name][0]].device.type):
        raise ValueError(f"{name}: " + ", ".join(f"{k} is {v}" for k, v in dtypes.items()) + ": convert them to one dtype")


PRODUCTS = {
    "attention": ("query", "key", "value"), "vision_attention": ("query", "key", "value"),
    "gelu_linear": ("x", "weight", "bias"), "linear": ("x", "weight"), "router": ("hidden", "weight"),
    "experts": ("hidden", "gate_up", "down"), "projections": ("x", "first", "second", "third"),
    "swiglu": ("x", "gate_weight", "up_weight"), "add_shared_expert": ("x", "gate_weight"),
    "linear_cross_entropy": ("hidden", "weight"),
}  # fmt: skip


def _check_bounds(name: str, bounds: Any, sizes: dict[str, int]) -> None:
    """cu_seqlens [documents + 1] of one row: from 0 to its length, never falling."""
    tokens = sizes["N"] if name == "vision_attention" else sizes["T"]
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.shape[0] < 2:
        form = list(bounds.shape) if isinstance(bounds, Tensor) else type(bounds).__name__
        raise ValueError(f"{name}: cu_seqlens is a tensor [documents + 1] of integers, got {form}")
    _check_dtype(name, "cu_seqlens", bounds)
    if sizes.get("B", 1) != 1:
        raise ValueError(f"{name}: cu_seqlens divides one row, got {sizes['B']}: put the documents into one row [1, T]")
    if known(bounds) and (bounds[0] != 0 or bounds[-1] != tokens or bool((bounds.diff() < 0).any())):
        shown = f"{bounds[:8].tolist()}" + (" ..." if len(bounds) > 8 else "")
        raise ValueError(f"{name}: cu_seqlens {shown} must rise from 0 to the {tokens} tokens")


def _divides(name: str, sizes: dict[str, int]) -> None:
    heads, groups = sizes["H"], sizes["G"]
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: {heads} heads are no multiple of the {groups} of key, the axes are [B, T, heads, width]")


def _attention(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    _divides("attention", sizes)
    starts = operands.get("starts", 0)
    first = starts if isinstance(starts, int) else 0
    if sizes["T"] + first > sizes["P"]:
        raise ValueError(f"attention: {sizes['T']} queries from position {first} on need as many keys, got {sizes['P']}")


def _delta_rule(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    _divides("gated_delta_rule", sizes)
    _check_states("gated_delta_rule", operands, sizes)


def _convolution(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    _check_states("short_convolution", operands, sizes)
    lengths = operands.get("lengths")
    if lengths is not None and known(lengths) and bool(((lengths < 0) | (lengths > sizes["T"])).any()):
        raise ValueError(f"short_convolution: lengths {lengths[:8].tolist()} must be 0 ... {sizes['T']}")


def _check_states(name: str, operands: dict[str, Any], sizes: dict[str, int]) -> None:
    bounds = operands.get("cu_seqlens")
    expected, of = (sizes["B"], "row") if bounds is None else (bounds.shape[0] - 1, "document")
    if operands.get("state") is not None and sizes["N"] != expected:
        raise ValueError(f"{name}: state {list(operands['state'].shape)} must have one state for each {of}, {expected}")


def _rotary(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    if sizes["R"] > sizes["K"]:
        raise ValueError(
            f"rotary: cos and sin [B, T, R/2] rotate {sizes['R']} entries, a head has {sizes['K']}: give each pair's angle once"
        )


def _router(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    top_k = operands["top_k"]
    if not 1 <= top_k <= sizes["E"]:
        raise ValueError(f"router: top_k={top_k} must be 1 ... {sizes['E']}, the number of experts")


def _experts(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    _check_range("experts", "indices", operands["indices"], 0, sizes["E"])


def _cross_entropy(operands: dict[str, Any], sizes: dict[str, int]) -> None:
    labels = operands["labels"]
    if known(labels):
        _check_range("linear_cross_entropy", "labels other than -100", labels[labels != -100], 0, sizes["vocabulary"])


def _check_range(name: str, tensor: str, x: Tensor, low: int, end: int) -> None:
    if known(x) and x.numel() and not (low <= int(x.min()) and int(x.max()) < end):
        raise ValueError(f"{name}: {tensor} must be {low} ... {end - 1}, got {int(x.min())} ... {int(x.max())}")


def known(x: Tensor) -> bool:
    """Whether the values can be looked at without waiting."""
    return x.is_cpu and values_known(x)


MORE: dict[str, Callable[[dict[str, Any], dict[str, int]], None]] = {
    "attention": _attention, "gated_delta_rule": _delta_rule, "short_convolution": _convolution, "rotary": _rotary,
    "norm_rotary": _rotary,
    "router": _router, "experts": _experts, "linear_cross_entropy": _cross_entropy,
}  # fmt: skip


def check_direct_calls() -> None:
    """From now on, calls of operations without `caller` are checked."""
    for name in AXES:
        TABLE[name].check = check_arguments
