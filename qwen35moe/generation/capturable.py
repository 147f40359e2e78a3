"""Why decode steps of a model cannot be captured as a CUDA graph, and what a capture depends on.

A replay runs the kernels of the captured step and no Python. So a step is captured only if its Python has no effect beyond
those kernels, and replayed only as long as everything is the same that decided which kernels these were.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

from ..backends.operation import TABLE, current_choices
from ..backends.record import RECORDING
from ..taps.active import ACTIVE as ACTIVE_TAPS
from .prepare import replaced_prepare

CAPTURES = {"cuda"}  # types of devices whose kernels can be captured
_OURS = ("qwen35moe.", "torch.nn.modules.")


def reason(model: Any, cache: Any = None) -> str | None:
    """Why decoding with this model and cache runs each step from Python, or None if it replays captured steps. cache: None for
    one that `generate` makes."""
    for why in (of_process, _of_model, _of_modules):
        if text := why(model):
            return text
    return None if cache is None else _of_cache(cache)


def of_process(model: Any) -> str | None:
    """The part of `reason` that may change while `generate` runs."""
    if model.device.type not in CAPTURES:
        return f"the model is on {model.device}: CUDA graphs are for GPUs"
    if ACTIVE_TAPS:
        return "taps are active"
    if RECORDING:
        return "backends.ran() records the calls"
    modes = torch.overrides._get_current_function_mode_stack()
    if torch._C._len_torch_dispatch_stack() or any(type(mode) is not DeviceContext for mode in modes):
        return "a TorchDispatchMode or TorchFunctionMode is active"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "forward hooks of all modules are registered"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "the current stream is being captured"
    return None


def _of_model(model: Any) -> str | None:
    if model.device_map is not None:
        return "the layers are on several devices"
    if replaced_prepare(model) is not None:
        return "prepare_inputs_for_generation was replaced"
    if model.training and model.config.text_config.attention_dropout:
        return f"the model is in training mode with attention_dropout={model.config.text_config.attention_dropout}"
    for op in TABLE.values():
        if op.replaced:
            return f"{op.name} may run an implementation that was registered by others"
    return None


def _of_modules(model: nn.Module) -> str | None:
    device = model.device
    for path, module in model.named_modules():
        where = path or "the model"
        if not type(module).__module__.startswith(_OURS):
            return f"{where} is a {type(module).__name__}, which is not one of this library's modules"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has forward hooks"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"{where} has a forward of its own or is compiled"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                return f"{where}.{name} is a {type(tensor).__name__}"
            if tensor.device != device:
                return f"{where}.{name} is on {tensor.device}, the model on {device}"
    return None


def _of_cache(cache: Any) -> str | None:
    if cache.max_length is None:
        return "the cache grows: make one with new_cache(batch_size, max_length=...), or pass cache='static'"
    if cache.record:
        return f"the cache records tokens for a rollback (record={cache.record})"
    return None


def signature(model: nn.Module, cache: Any) -> Hashable:
    """Equal for two calls whose captured steps are the same: addresses and dtypes of all weights and of the cache's tensors,
    the implementations, the modules with their numbers and methods, and torch's settings."""
    kind = next(model.parameters()).device.type
    tensors = [*model.parameters(), *model.buffers()]
    for layer in cache._layers:
        tensors += layer.tensors()
    modules = tuple((id(module), *_attributes(module)) for module in model.modules())
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls.__module__.startswith(_OURS)}
    methods = tuple(sorted((cls.__qualname__, *(id(value) for value in vars(cls).values())) for cls in classes))
    return (
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in (*tensors, cache._ids)), modules, methods,
        tuple(sorted(current_choices().items())), tuple((name, *map(id, op.candidates)) for name, op in TABLE.items()),
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


def _attributes(module: nn.Module) -> tuple[Hashable, ...]:
    """The public attributes of a module: numbers by value, everything else by identity."""
    simple = (int, float, str, bool, type(None))
    items = (item for item in module.__dict__.items() if not item[0].startswith("_"))
    return tuple((name, value if isinstance(value, simple) else _choices(name, value)) for name, value in items)


def _choices(name: str, value: Any) -> Hashable:
    return tuple(sorted(value.items())) if name == "backend_choices" else id(value)
