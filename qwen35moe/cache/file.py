"""A cache on disk: one safetensors file, every tensor by its name, the counters as metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35moe.cache.states import DeltaNetState, KVCache
from qwen35moe.cache.value import Cache
from qwen35moe.config import TextConfig
from qwen35moe.files import replacing

_FORMAT = "qwen35moe.cache.1"


def save_cache(cache: Cache, path: str | os.PathLike[str]) -> None:
    """Replaces the file at `path` in one step: a killed save leaves the old file whole."""
    tensors: dict[str, Tensor] = {"lengths": cache.lengths}
    if cache.rope_delta is not None and cache._seen_pictures is not None:
        tensors |= {"rope_delta": cache.rope_delta, "seen_pictures": cache._seen_pictures}
    for index, layer in enumerate(cache.layers):
        names = ("key", "value") if isinstance(layer, KVCache) else ("conv_state", "recurrent_state")
        tensors |= {f"layers.{index}.{name}": getattr(layer, name) for name in names}
    numbers = {"seen": cache.seen, "max_length": cache.max_length, "record": cache.record, "common": cache._common}
    with replacing(path) as partial:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial,
            metadata={"format": _FORMAT, "numbers": json.dumps(numbers)},
        )


def load_cache(
    path: str | os.PathLike[str], config: TextConfig, *, device: torch.device | str = "cpu",
    devices: Sequence[torch.device] | None = None,
) -> Cache:
    """Reads what `save_cache` wrote; ValueError with both shapes where it does not fit the configuration."""
    with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no saved cache: its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    numbers = json.loads(metadata["numbers"])
    lengths = tensors.pop("lengths")
    dtype = next((t.dtype for name, t in tensors.items() if name.endswith((".conv_state", ".key"))), torch.float32)
    cache = Cache(
        config, lengths.shape[0], max_length=numbers["max_length"], record=numbers["record"], dtype=dtype, device=device,
        devices=devices,
    )
    cache.lengths, cache.seen, cache._common = lengths, int(numbers["seen"]), numbers["common"]
    cache.rope_delta = tensors.pop("rope_delta", None)
    cache._seen_pictures = tensors.pop("seen_pictures", None if cache.rope_delta is None else lengths)
    cache._used = int(lengths.max())
    for index, layer in enumerate(cache.layers):
        names = ("key", "value") if isinstance(layer, KVCache) else ("conv_state", "recurrent_state")
        found = [tensors.pop(f"layers.{index}.{name}", None) for name in names]
        for name, tensor in zip(names, found, strict=False):
            if tensor is None:
                raise ValueError(f"{path} lacks layers.{index}.{name}, which layer_types[{index}] calls for")
            tensor = tensor if devices is None else tensor.to(devices[index])
            _place(layer, name, tensor, cache._used, f"{path}: layers.{index}.{name}")
    if tensors:
        raise ValueError(f"{path} holds tensors this configuration has no place for: {sorted(tensors)[:5]}")
    return cache


def _place(layer: KVCache | DeltaNetState, name: str, tensor: Tensor, used: int, where: str) -> None:
    if isinstance(layer, KVCache):
        layer.used = used
        buffer = layer.keys if name == "key" else layer.values
        wanted = (buffer.shape[0], used, *buffer.shape[2:])
        if tensor.shape != wanted:
            raise ValueError(f"{where} is {list(tensor.shape)}, this configuration needs {list(wanted)}")
        if not layer.fixed:
            setattr(layer, "keys" if name == "key" else "values", tensor)
        else:
            buffer[:, :used] = tensor
        return
    if tensor.shape != getattr(layer, name).shape:
        raise ValueError(f"{where} is {list(tensor.shape)}, this configuration needs {list(getattr(layer, name).shape)}")
    setattr(layer, name, tensor)
