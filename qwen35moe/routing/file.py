"""A routing on disk: one safetensors file, small enough to keep for every rollout.

Tensors: indices [L, N, k] in the smallest signed integer that holds num_experts; weights [L, N, k], logits [L, N, E] and
mask [N] if the routing has them. Metadata: "format"; under "routing", as JSON, layers, num_experts, shape and open_ended;
other keys belong to the caller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35moe.files import replacing

from .value import UNFORCED, Routing, are_integers, check_range

FORMAT = "qwen35moe.routing.2"
_OWN = ("format", "routing")
_TENSORS = ("indices", "weights", "logits", "mask")
_FACTS = ("layers", "num_experts", "shape", "open_ended")


def save_routing(routing: Routing, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces the file at `path` in one step: a killed save leaves the old file whole."""
    taken = [key for key in metadata or {} if key in _OWN]
    if taken:
        raise ValueError(f"metadata {taken[0]!r} is a key of the format: use another name")
    highest = max(routing.num_experts - 1, int(routing.indices.max()) if routing.indices.numel() else 0)
    dtype = next(t for t in (torch.int8, torch.int16, torch.int32, torch.int64) if highest <= torch.iinfo(t).max)
    tensors = {name: getattr(routing, name) for name in _TENSORS if getattr(routing, name) is not None}
    tensors["indices"] = routing.indices.to(dtype)
    facts = {name: getattr(routing, name) for name in _FACTS}
    with replacing(path) as partial:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
            metadata={**(metadata or {}), "format": FORMAT, "routing": json.dumps(facts)},
        )


def load_routing(path: str | os.PathLike[str]) -> Routing:
    """Reads a file written by `save_routing`; indices become int64. The file is not trusted: ValueError names the problem."""
    tensors, metadata = _read(path)
    unknown = sorted(set(tensors) - set(_TENSORS))
    if unknown or "indices" not in tensors:
        raise ValueError(f"{path}: " + (f"unknown tensor {unknown[0][:60]!r}" if unknown else "it has no indices"))
    for name, tensor in tensors.items():
        fits = {"indices": are_integers(tensor), "mask": tensor.dtype == torch.bool}.get(name, tensor.is_floating_point())
        if not fits:
            raise ValueError(f"{path}: {name} is stored as {tensor.dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    facts = _facts(path, metadata.get("routing", ""))
    indices = tensors.pop("indices").long()
    experts = facts["num_experts"]
    logits = tensors.get("logits")
    if logits is not None and experts and logits.shape[-1] != experts:
        raise ValueError(f"{path}: logits {list(logits.shape)} of {experts} experts")
    check_range(indices, experts, str(path), lowest=UNFORCED)
    try:
        return Routing(indices, **tensors, **facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The caller's strings of a saved routing."""
    return {key: value for key, value in _open(path)[1].items() if key not in _OWN}


def _open(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    try:
        file = safe_open(os.fspath(path), framework="pt", device="cpu").__enter__()
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved routing: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    return file, metadata


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    file, metadata = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}, metadata


def _facts(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    """The fields of a Routing that are in the metadata, with their types checked; else ValueError."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or set(facts) != set(_FACTS):
        raise ValueError(f"{path}: its metadata must have exactly {', '.join(_FACTS)}")
    layers, shape = facts["layers"], facts["shape"]
    valid = (
        _naturals(layers) and len(layers) > 0 and (shape is None or (_naturals(shape) and len(shape) == 2))
        and _naturals([facts["num_experts"]]) and isinstance(facts["open_ended"], bool)
    )
    if not valid:
        raise ValueError(f"{path}: its metadata are not numbers of layers, experts and tokens: {text[:120]}")
    return facts | {"layers": tuple(layers), "shape": None if shape is None else tuple(shape)}


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)
