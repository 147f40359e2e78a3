"""Whether a model can be loaded again from what a save writes: asked before the first byte is written.

The configuration describes names and shapes, the class the parts. A model that was changed by hand (a layer removed, a bias
added, two layers that share their weights), wrapped, sharded or quantised either has exactly these parameters or is refused,
with every difference in one error. Names that torch.compile, checkpointing and FSDP add are removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe.config import Config
from qwen35moe.modules.unfused import UnfusedExperts
from qwen35moe.ops.cpu.packed_weight import PackedWeight

from . import names
from .dtypes import FLOATS
from .parameters import ModelParameter, parameters_of, parts_in
from .problems import CheckpointError, Problem, shown
from .selection import PARTS

_TIED = {"embed_tokens.weight", "lm_head.weight"}

# Words in parameter names of what added them, and what to do.
_ORIGINS = {
    ".parametrizations.": "a parametrization: torch.nn.utils.parametrize.remove_parametrizations first",
    ".lora_": "an adapter: merge it (merge_and_unload) or save it by itself",
    ".base_layer.": "an adapter: merge it (merge_and_unload) or save it by itself",
    ".original_module.": "an adapter: merge it (merge_and_unload) or save it by itself",
    ".modules_to_save.": "an adapter: merge it (merge_and_unload) or save it by itself",
    "_flat_param": "FSDP, which has flattened the weights: gather them and pass state_dict=",
    ".weight_g": "weight_norm: torch.nn.utils.remove_weight_norm first",
    ".weight_orig": "pruning: torch.nn.utils.prune.remove first",
    ".weight_v": "weight_norm: torch.nn.utils.remove_weight_norm first",
}


def parameters_to_save(model: Any, state_dict: Mapping[str, Tensor] | None) -> list[ModelParameter]:
    """The parameters with their values, or those of `state_dict`; CheckpointError if one has no plain numbers."""
    problems: list[Problem] = []
    if state_dict is None:
        # Unfused experts copy their weights, so the types are checked first.
        for name, tensor in model.named_parameters():
            problems += _no_plain_numbers(name, tensor)
        problems += _buffers(model)
        _raise(model, problems)
        parameters = parameters_of(model, every_name=True)
    else:
        for name, tensor in state_dict.items():
            problems += _no_plain_numbers(name, tensor)
        _raise(model, problems)
        parameters = _parameters_from(state_dict, model)
    for parameter in parameters:
        parameter.names = list(dict.fromkeys(parameter.names))
    return parameters


def _raise(model: Any, problems: Sequence[Problem]) -> None:
    if problems:
        raise CheckpointError(f"{type(model).__name__} cannot be saved:", problems)


def _no_plain_numbers(name: str, tensor: Any) -> Iterator[Problem]:
    name = names.unwrapped(name)
    if not isinstance(tensor, Tensor):
        yield Problem("no tensor", name, f"it is {type(tensor).__name__}")
    elif hasattr(tensor, "full_tensor"):
        how = "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        yield Problem("sharded", name, f"it is a {type(tensor).__name__}: gather the weights ({how}) and pass state_dict=")
    elif isinstance(tensor, PackedWeight):
        return  # written from plain copies
    elif type(tensor) not in (Tensor, nn.Parameter):
        way = "save the model before it is quantised or wrapped, or pass state_dict= with plain tensors"
        yield Problem("no plain tensor", name, f"it is a {type(tensor).__name__}: {way}")
    elif tensor.is_meta:
        way = "initialise or load the model first, or gather an offloaded model and pass state_dict="
        yield Problem("no values", name, f"it is on the meta device and has no values: {way}")
    elif tensor.dtype not in FLOATS.values() or tensor.layout != torch.strided:
        form = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        yield Problem("wrong dtype", name, f"{form}; weights are saved as {', '.join(FLOATS)}")


def _buffers(model: nn.Module) -> Iterator[Problem]:
    """Buffers that a state_dict contains: no checkpoint of this architecture has one, and they would be lost."""
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is None or leaf in module._non_persistent_buffers_set or name.endswith(names.COMPUTED):
                continue
            detail = "it is a buffer, which no checkpoint of this architecture has: register it with persistent=False"
            if leaf.endswith("_mask"):
                detail = "it is a mask of pruning: torch.nn.utils.prune.remove first"
            yield Problem("buffer", names.unwrapped(name), detail)


def _parameters_from(state_dict: Mapping[str, Tensor], model: Any) -> list[ModelParameter]:
    """The tensors of a state_dict, with the owners and the tying of the model's parameters."""
    if any(isinstance(module, UnfusedExperts) for module in model.modules()):
        raise CheckpointError("state_dict= needs grouped experts: call model.fuse_experts() before its state_dict()")
    known = {name: parameter for parameter in parameters_of(model) for name in parameter.names}
    parameters: dict[str, ModelParameter] = {}
    for stored, tensor in state_dict.items():
        name = names.canonical(stored) or stored
        if name in parameters:
            raise CheckpointError(f"state_dict= has {shown(stored)} twice, under names with and without a wrapper")
        of_model = known.get(name)
        owners = [(model, name)] if of_model is None else of_model.owners
        parameters[name] = ModelParameter(tensor, owners, [name])
    config, of_model = model.config, known.get("lm_head.weight")
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    tied = tied or (of_model is not None and _TIED <= set(of_model.names))
    head, embedding = (parameters.get(name) for name in ("lm_head.weight", "embed_tokens.weight"))
    if tied and embedding is not None and (head is None or _equal(head.tensor, embedding.tensor)):
        parameters.pop("lm_head.weight", None)
        embedding.names.append("lm_head.weight")
    return list(parameters.values())


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first))


def check_described(cls: type[Any], config: Config, parameters: Sequence[ModelParameter]) -> None:
    """CheckpointError if `config`, read again by the class, describes other parameters than these."""
    unexpected = [parameter.name for parameter in parameters if names.canonical(parameter.name) is None]
    if unexpected:
        problems = [Problem("unexpected", name, _origin(name) or "not a name of this architecture") for name in unexpected]
        message = f"{shown(unexpected[0])} is not part of this architecture: merge or remove added modules"
        raise CheckpointError(message, problems)
    expected = _expected(cls, config, parts_in(parameters))
    problems = []
    names_so_far: set[str] = set()
    for parameter in parameters:
        problems += _compared(parameter, expected)
        if repeated := names_so_far.intersection(parameter.names):
            problems.append(Problem("two of one name", min(repeated), "two parameters have this name without their wrappers"))
        names_so_far.update(parameter.names)
    problems += [
        Problem("missing", name, f"config describes {list(shape)}; the model has no such parameter")
        for name, shape in expected.items()
        if name not in names_so_far
    ]
    if problems:
        raise CheckpointError(
            f"{cls.__name__} is not what its config describes, and could not be loaded again. Change the model, or its config "
            "(model.config = model.config.replace(...)):",
            problems,
        )


def _compared(parameter: ModelParameter, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Problem]:
    if len(parameter.names) > 1 and set(parameter.names) != _TIED:
        others = ", ".join(shown(name, 80) for name in parameter.names[1:4])
        detail = f"shares its weight with {others}; a checkpoint has one for each: give each a copy (copy.deepcopy)"
        yield Problem("shared", parameter.name, detail)
    for name in parameter.names:
        shape = expected.get(name)
        if shape is None and set(parameter.names) != _TIED:
            yield Problem("unexpected", name, _origin(name) or "config describes no such parameter")
        elif shape is not None and shape != parameter.shape:
            yield Problem("wrong shape", name, f"{list(parameter.shape)}, config describes {list(shape)}")


def _origin(name: str) -> str:
    return next((f"it is of {origin}" for word, origin in _ORIGINS.items() if word in f".{name}"), "")


def _expected(cls: type[Any], config: Config, parts: set[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that the reader will look for: those of the class on the meta device, or, of a class
    with other arguments, those that the configuration describes for the same parts."""
    from .read import build

    optional = frozenset(part for part, inner in PARTS.items() if parts.intersection(inner))
    try:
        reference = parameters_of(build(cls, config, optional))
    except (TypeError, ValueError):
        described = config.tensor_shapes(vision="visual" in parts, lm_head="head" in parts, mtp="mtp" in parts)
        return {names.canonical(tensor.name) or tensor.name: tensor.shape for tensor in described}
    return {name: parameter.shape for parameter in reference for name in parameter.names}
