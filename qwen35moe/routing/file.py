"""A routing on disk: one safetensors file, small enough to keep for every rollout.

Tensors: indices [L, N, k] in the smallest signed integer that holds num_experts; weights [L, N, k], logits [L, N, E] and
mask [N] if the routing has them. Metadata: "format"; under "routing", as JSON, layers, num_experts, shape and open_ended;
other keys belong to the caller. Writer and reader make the same checks, so that what is written is read again.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwen35moe.files import UnreadableFile, check_own, open_tensors, parse_json, write_tensors

from .value import FACTS, TENSORS, UNFORCED, Routing, are_integers, check_range

FORMAT = "qwen35moe.routing.2"
MAX_COUNTS = 2**27  # L * E * E, the numbers of `coactivation`; the largest published model needs 2^24.5
_WHAT = "a saved routing"
_OWN = ("format", "routing")


def save_routing(routing: Routing, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces the file at `path` in one step: a killed save leaves the old file whole. ValueError for a routing that
    `load_routing` would refuse, before anything is written."""
    taken = [key for key in metadata or {} if key in _OWN]
    if taken:
        raise ValueError(f"metadata {taken[0]!r} is a key of the format: use another name")
    highest = max(routing.num_experts - 1, int(routing.indices.max()) if routing.indices.numel() else 0)
    dtype = next(t for t in (torch.int8, torch.int16, torch.int32, torch.int64) if highest <= torch.iinfo(t).max)
    tensors = {name: getattr(routing, name) for name in TENSORS if getattr(routing, name) is not None}
    text = json.dumps({name: _plain(getattr(routing, name)) for name in FACTS})
    _checked("this routing", tensors, _facts("this routing", text))
    tensors["indices"] = routing.indices.to(dtype)
    check_own(path)
    write_tensors(path, tensors, {**(metadata or {}), "format": FORMAT, "routing": text})


def load_routing(path: str | os.PathLike[str]) -> Routing:
    """Reads a file written by `save_routing`; indices become int64. The file is not trusted: ValueError names the problem."""
    with open_tensors(path, _WHAT, FORMAT) as (file, metadata):
        names = sorted(file.keys())
        unknown = sorted(set(names) - set(TENSORS))
        if unknown or "indices" not in names:
            raise ValueError(f"{path}: " + (f"unknown tensor {unknown[0][:60]!r}" if unknown else "it has no indices"))
        tensors = {name: file.get_tensor(name) for name in names}
    return _checked(str(path), tensors, _facts(path, metadata.get("routing", "")))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The caller's strings of a saved routing."""
    with open_tensors(path, _WHAT, FORMAT) as (_, metadata):
        return {key: value for key, value in metadata.items() if key not in _OWN}


def _plain(value: Any) -> Any:
    """A fact as JSON: numbers of other libraries as int."""
    if isinstance(value, list | tuple):
        return [operator.index(item) for item in value]
    return value if value is None or isinstance(value, bool) else operator.index(value)


def _checked(source: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Routing:
    """The routing of these tensors and facts; ValueError where they contradict each other or ask for too much memory."""
    for name, tensor in tensors.items():
        fits = {"indices": are_integers(tensor), "mask": tensor.dtype == torch.bool}.get(name, tensor.is_floating_point())
        if not fits:
            raise ValueError(f"{source}: {name} is stored as {tensor.dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} has numbers that are not finite")
    indices, experts = tensors["indices"].long(), facts["num_experts"]
    logits = tensors.get("logits")
    if logits is not None and experts and logits.shape[-1:] != (experts,):
        raise ValueError(f"{source}: logits {list(logits.shape)} of {experts} experts")
    check_range(indices, experts, source, lowest=UNFORCED)
    highest = max(experts, int(indices.max()) + 1 if indices.numel() else 0)
    layers = max(indices.shape[0], 1) if indices.dim() else 1
    if layers * highest**2 > MAX_COUNTS:
        raise ValueError(f"{source}: {highest} experts in {layers} layers; layers x experts^2 is at most {MAX_COUNTS}")
    shape = facts["shape"]
    facts = {**facts, "layers": tuple(facts["layers"]), "shape": None if shape is None else tuple(shape)}
    try:
        return Routing(**{**tensors, "indices": indices}, **facts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _facts(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    """The fields of a Routing that are in the metadata, with their types checked; else ValueError."""
    try:
        facts = parse_json(text.encode("utf-8", "replace"))
    except UnreadableFile:
        facts = None
    if not isinstance(facts, dict) or set(facts) != set(FACTS):
        raise ValueError(f"{path}: its metadata must have exactly {', '.join(FACTS)}")
    layers, shape = facts["layers"], facts["shape"]
    valid = (
        _naturals(layers) and len(layers) > 0 and (shape is None or (_naturals(shape) and len(shape) == 2))
        and _naturals([facts["num_experts"]]) and isinstance(facts["open_ended"], bool)
    )
    if not valid:
        raise ValueError(f"{path}: its metadata are not numbers of layers, experts and tokens: {text[:120]}")
    return facts


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)
