"""Packs the weights of a model for inference on a CPU, in place, and unpacks them.

    model.pack_weights()      every nn.Linear and all experts in oneDNN's layout: faster products of a few rows
    model.unpack_weights()    the plain weights again, bit by bit

One weight after the other is packed and its plain memory released, so that at no moment more than one layer is stored twice.
The packed tensors are described in `qwen35moe.ops.cpu.packed_weight`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe.modules.moe import Experts
from qwen35moe.modules.unfused import UnfusedExperts
from qwen35moe.ops.cpu.packed_weight import WAY_OUT, PackedWeight, pack, plain, refusal
from qwen35moe.ops.cpu.products import SMALL

_EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, repr=False)
class WeightPacking:
    """What `pack_weights` or `unpack_weights` did."""

    done: str  # "packed" or "unpacked"
    weights: int = 0  # parameters, of which the experts of a layer are two
    matrices: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    left: Mapping[str, int] = field(default_factory=dict)  # reason -> number of weights that stay plain

    def __repr__(self) -> str:
        text = f"{self.done} {self.weights} weights ({self.matrices:,} matrices, {self.nbytes / 1e6:,.1f} MB)"
        lines = [f"{text} in {self.seconds:.1f} s", *(f"left plain: {count}, {reason}" for reason, count in self.left.items())]
        return "\n".join(lines)


def pack_weights(model: Any, release: Callable[[Tensor], None] | None = None) -> WeightPacking:
    """Pack every nn.Linear and all experts of a model. See `PretrainedModel.pack_weights`.

    release: called with each plain weight after it was packed, to give back memory that other tensors keep alive.
    """
    left: Counter[str] = Counter()
    weights = list(_weights(model, left))
    _check(weights)
    start, matrices, nbytes = time.perf_counter(), 0, 0
    for module, name in weights:
        weight: Any = module._parameters[name]
        packed: Any = pack(weight, weight.requires_grad)
        module._parameters[name] = packed
        _watch(module)
        if release is not None:
            release(weight)
        del weight
        matrices += 1 if packed.dim() == 2 else len(packed)
        nbytes += packed.nbytes
    return WeightPacking("packed", len(weights), matrices, nbytes, time.perf_counter() - start, dict(left))


def unpack_weights(model: nn.Module) -> WeightPacking:
    """Replace every packed weight by a plain one. See `PretrainedModel.unpack_weights`."""
    start, weights, matrices, nbytes = time.perf_counter(), 0, 0, 0
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if isinstance(weight, PackedWeight):
                    module._parameters[name] = nn.Parameter(weight.to_dense(), weight.trainable)
                    weights, nbytes = weights + 1, nbytes + weight.nbytes
                    matrices += 1 if weight.dim() == 2 else len(weight)
            _stop_watching(module)
    return WeightPacking("unpacked", weights, matrices, nbytes, time.perf_counter() - start)


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """The packed weights of a model."""
    return [weight for weight in model.parameters() if isinstance(weight, PackedWeight)]


def refuse_packed(model: nn.Module, call: str) -> None:
    """ValueError if a model has packed weights: `call` needs plain ones."""
    if packed_weights(model):
        raise ValueError(f"{call} needs plain weights, and those of this model are packed: {WAY_OUT}")


def refuse_conversion(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """ValueError, before .to() has changed anything, if it would convert or move packed weights."""
    packed = packed_weights(model)
    if packed:
        before = torch.empty(0, dtype=packed[0].dtype)
        after = convert(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            target = f"{after.dtype} on {after.device}"
            raise ValueError(f"packed weights of {before.dtype} cannot be converted to {target}: {WAY_OUT}, then convert")


def _weights(model: Any, left: Counter[str]) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of the weights to pack, in the order of the model; counts the others by the reason."""
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None)
    unfused: tuple[str, ...] = ()
    adapters: list[str] = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            unfused = (*unfused, f"{path}." if path else "")
        if "base_layer" in module._modules:
            adapters.append(f"{path}." if path else "")
        names = _EXPERTS if isinstance(module, Experts) else ("weight",) if isinstance(module, nn.Linear) else ()
        for name in names:
            weight = module._parameters.get(name)
            if isinstance(weight, PackedWeight):
                continue
            reason = _reason(module, weight)
            if unfused and path.startswith(unfused):
                reason = "unfused experts: model.fuse_experts() first"
            if any(path.startswith(wrapper) and not path.startswith(f"{wrapper}base_layer") for wrapper in adapters):
                reason = "of an adapter, which reads them by itself"
            if reason is None and owners[id(weight)] > 1:
                reason = "shared with another module, as a head with the embedding"
            if reason is None and module is head and weight is not None:
                wide = torch.promote_types(weight.dtype, model.dtype)
                reason = None if wide == weight.dtype else "a head in a narrower dtype than the model's"
            if reason is None:
                yield module, name
            else:
                left[reason] += 1


def _reason(module: nn.Module, weight: Any) -> str | None:
    """The reason why a weight stays plain wherever it is, or None."""
    if type(module) not in (nn.Linear, Experts):
        return f"of {type(module).__name__}, a subclass of {'Experts' if isinstance(module, Experts) else 'nn.Linear'}"
    if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return "no plain parameter: parametrised, quantised or sharded"
    if weight.numel() // (weight.shape[0] if weight.dim() == 3 else 1) < SMALL:
        return f"fewer than {SMALL:,} numbers in a matrix"
    return None if weight.device.type == "cpu" else f"on {weight.device}, not on a CPU"


def _check(weights: list[tuple[nn.Module, str]]) -> None:
    """ValueError, before anything is packed, for what packing would lose or cannot do."""
    for module, name in weights:
        weight: Any = module._parameters[name]
        if reason := refusal(weight.dtype):
            raise ValueError(f"pack_weights(): {reason}")
        if weight.grad is not None:
            raise ValueError("pack_weights(): the weights have gradients, which packing would lose: model.zero_grad() first")


# ------------------------------------------------------------------------------------------------ state_dict of the modules


def _watch(module: nn.Module) -> None:
    """From now on the state_dict of a module has plain weights."""
    if not any(hook is _plain_values for hook in module._state_dict_hooks.values()):
        module.register_state_dict_post_hook(_plain_values)


def _stop_watching(module: nn.Module) -> None:
    for number, hook in list(module._state_dict_hooks.items()):
        if hook is _plain_values:
            del module._state_dict_hooks[number]


def _plain_values(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
    for name in module._parameters:
        if prefix + name in state_dict:
            state_dict[prefix + name] = plain(state_dict[prefix + name])
