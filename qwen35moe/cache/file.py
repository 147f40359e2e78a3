"""A cache on disk: one safetensors file with every tensor by its name; the counters are in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35moe.cache.ids import with_ids
from qwen35moe.cache.states import KVCache
from qwen35moe.cache.value import Cache
from qwen35moe.files import replacing

_FORMAT = "qwen35moe.cache.3"


def save_cache(cache: Cache, path: str | os.PathLike[str]) -> None:
    """Replaces the file at `path` in one step: a killed save leaves the old file whole."""
    tensors: dict[str, Tensor] = {"lengths": cache.lengths, "ids": cache._ids[:, : cache._longest]}
    if cache.rope_delta is not None and cache._rope_delta_since is not None:
        tensors |= {"rope_delta": cache.rope_delta, "rope_delta_since": cache._rope_delta_since}
    for index, layer in enumerate(cache._layers):
        tensors |= {f"layers.{index}.{name}": getattr(layer, name) for name in layer.names}
    numbers = {
        "seen": cache.seen, "max_length": cache.max_length, "record": cache.record, "common_length": cache._common_length,
    }
    with replacing(path) as partial:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial,
            metadata={"format": _FORMAT, "numbers": json.dumps(numbers)},
        )


def load_cache(
    path: str | os.PathLike[str], config: Any, *, device: torch.device | str = "cpu",
    devices: Sequence[torch.device] | None = None,
) -> Cache:
    """Reads a file written by `save_cache`; ValueError with both shapes where it does not fit the configuration."""
    with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a saved cache: its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    numbers = json.loads(metadata["numbers"])
    lengths = tensors.pop("lengths")
    dtype = next((t.dtype for name, t in tensors.items() if name.endswith((".conv_state", ".key"))), torch.float32)
    cache = Cache(
        config, lengths.shape[0], max_length=numbers["max_length"], record=numbers["record"], dtype=dtype, device=device,
        devices=devices,
    )
    cache.lengths, cache.seen, cache._common_length = lengths, int(numbers["seen"]), numbers["common_length"]
    cache.rope_delta = tensors.pop("rope_delta", None)
    cache._rope_delta_since = tensors.pop("rope_delta_since", None if cache.rope_delta is None else lengths)
    cache._longest = int(lengths.max())
    ids = tensors.pop("ids", None)
    if ids is None or ids.shape != (lengths.shape[0], cache._longest) or ids.is_floating_point():
        raise ValueError(f"{path} lacks the ids of its tokens: integers [{lengths.shape[0]}, {cache._longest}]")
    cache._ids = with_ids(cache._ids, ids)
    for index, layer in enumerate(cache._layers):
        if isinstance(layer, KVCache):
            layer.length, layer.behind = cache._longest, True
        for name in layer.names:
            key = f"layers.{index}.{name}"
            if key not in tensors:
                raise ValueError(f"{path} lacks {key}, which layer_types[{index}] needs")
            tensor = tensors.pop(key)
            try:
                setattr(layer, name, tensor if devices is None else tensor.to(devices[index]))
            except ValueError as error:
                raise ValueError(f"{path}: layers.{index}: {error}") from None
    if tensors:
        raise ValueError(f"{path} holds tensors that this configuration does not have: {sorted(tensors)[:5]}")
    return cache
