"""A cache on disk: one safetensors file with every tensor by its name; the counters are in its metadata.

The file is not trusted: names, shapes and dtypes are compared with the configuration and with each other before memory is
taken for them. The writer makes the same checks, so that what is written is read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen35moe.cache.ids import UNKNOWN, with_ids
from qwen35moe.cache.states import KVCache
from qwen35moe.cache.value import Cache
from qwen35moe.compat import short
from qwen35moe.config import TextConfig
from qwen35moe.files import UnreadableFile, available_memory, check_own, open_tensors, parse_json, write_tensors

_FORMAT = "qwen35moe.cache.3"
_WHAT = "a saved cache"
MAX_TOKENS = 2**20  # of a row, or max_position_embeddings if that is more: the room of a static cache is in no tensor
MAX_COUNTER = 2**53
_NUMBERS = ("seen", "max_length", "record", "common_length", "lengths")
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32}  # fmt: skip

Form = tuple[torch.dtype | None, tuple[int, ...]]  # of a tensor: dtype (None: of the file, not supported) and shape


def save_cache(cache: Cache, path: str | os.PathLike[str]) -> None:
    """Replaces the file at `path` in one step: a killed save leaves the old file whole. ValueError for a cache that
    `load_cache` would refuse, before anything is written."""
    lengths = cache.lengths.tolist()
    longest = max(lengths, default=0)
    tensors: dict[str, Tensor] = {"lengths": cache.lengths, "ids": cache._ids[:, :longest]}
    if cache.rope_delta is not None and cache._rope_delta_since is not None:
        tensors |= {"rope_delta": cache.rope_delta, "rope_delta_since": cache._rope_delta_since}
    for index, layer in enumerate(cache._layers):
        for name in layer.names:  # an attention layer may be longer than its longest row
            tensor: Tensor = getattr(layer, name)
            tensors[f"layers.{index}.{name}"] = tensor[:, :longest] if isinstance(layer, KVCache) else tensor
    numbers = {
        "seen": cache.seen, "max_length": cache.max_length, "record": cache.record, "common_length": cache._common_length,
        "lengths": lengths,
    }
    where = "this cache"
    _check_numbers(where, numbers, cache.config)
    _check_forms(where, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, numbers, cache.config)
    _check_values(where, tensors, numbers)
    check_own(path)
    write_tensors(path, tensors, {"format": _FORMAT, "numbers": json.dumps(numbers)})


def load_cache(
    path: str | os.PathLike[str], config: Any, *, device: torch.device | str = "cpu",
    devices: Sequence[torch.device] | None = None,
) -> Cache:
    """Reads a file written by `save_cache`; ValueError names what does not fit the configuration, or contradicts itself."""
    config = TextConfig.of(config)
    with open_tensors(path, _WHAT, _FORMAT, str(device)) as (file, metadata):
        numbers = _read_numbers(path, metadata.get("numbers", ""))
        _check_numbers(str(path), numbers, config)
        slices = {name: file.get_slice(name) for name in file.keys()}
        forms = {name: (_CODES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
        dtype = _check_forms(str(path), forms, numbers, config)
        _check_room(str(path), config, numbers, dtype)
        tensors = {name: file.get_tensor(name) for name in forms}
    _check_values(str(path), tensors, numbers)
    return _cache_of(tensors, numbers, config, dtype, device, devices)


def _cache_of(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], config: TextConfig, dtype: torch.dtype,
    device: torch.device | str, devices: Sequence[torch.device] | None,
) -> Cache:
    lengths = numbers["lengths"]
    cache = Cache(
        config, len(lengths), max_length=numbers["max_length"], record=numbers["record"], dtype=dtype, device=device,
        devices=devices,
    )
    cache._lengths, cache.seen, cache._common_length = tensors["lengths"], numbers["seen"], numbers["common_length"]
    cache._rope_delta, cache._rope_delta_since = tensors.get("rope_delta"), tensors.get("rope_delta_since")
    cache.set_host_lengths(lengths)
    cache._ids = with_ids(cache._ids, tensors["ids"])
    for index, layer in enumerate(cache._layers):
        if isinstance(layer, KVCache):
            layer.length, layer.behind = cache._longest, True
        for name in layer.names:
            tensor = tensors[f"layers.{index}.{name}"]
            setattr(layer, name, tensor if devices is None else tensor.to(devices[index]))
    return cache


# ----------------------------------------------------------------------------------------------------- what is checked


def _read_numbers(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    try:
        numbers = parse_json(text.encode("utf-8", "replace"))
    except UnreadableFile:
        numbers = None
    if not isinstance(numbers, dict) or set(numbers) != set(_NUMBERS):
        raise ValueError(f"{path}: its numbers must be exactly {', '.join(_NUMBERS)}")
    return numbers


def _check_numbers(source: str, numbers: Mapping[str, Any], config: TextConfig) -> None:
    """ValueError for counters that are no counts, that contradict each other, or that are beyond the configuration."""
    most = max(MAX_TOKENS, config.max_position_embeddings)
    lengths, common, room = numbers["lengths"], numbers["common_length"], numbers["max_length"]
    if not isinstance(lengths, list) or not lengths or not all(_is_count(length, most) for length in lengths):
        raise ValueError(f"{source}: lengths {short(lengths)} are not a list of numbers 0 ... {most}")
    for name, low, high in (("seen", 0, MAX_COUNTER), ("record", 0, MAX_COUNTER), ("max_length", 1, most)):
        value = numbers[name]
        if not (_is_count(value, high) and value >= low) and not (name == "max_length" and value is None):
            raise ValueError(f"{source}: {name} = {short(value)} is not a number {low} ... {high}")
    if common is not None and (type(common) is not int or set(lengths) != {common}):
        raise ValueError(f"{source}: common_length = {short(common)}, the lengths are {short(lengths)}")
    if room is not None and room < max(lengths):
        raise ValueError(f"{source}: max_length = {room}, its longest row has {max(lengths)} tokens")
    if numbers["seen"] < max(lengths):
        raise ValueError(f"{source}: seen = {numbers['seen']} columns, its longest row has {max(lengths)} tokens")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _check_forms(source: str, forms: Mapping[str, Form], numbers: Mapping[str, Any], config: TextConfig) -> torch.dtype:
    """The dtype of the cache; ValueError for tensors that the configuration and the lengths do not describe."""
    rows, longest = len(numbers["lengths"]), max(numbers["lengths"])
    states = {name: form for name, form in forms.items() if name.endswith((".conv_state", ".key"))}
    dtype = next((form[0] for form in states.values()), None)
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(f"{source} lacks a state of a supported dtype: F64, F32, BF16 or F16")
    expected = _described(config, rows, longest, dtype)
    if "rope_delta" in forms or "rope_delta_since" in forms:
        expected |= dict.fromkeys(("rope_delta", "rope_delta_since"), (torch.int64, (rows,)))
    for name, form in expected.items():
        if name not in forms:
            layer = name.split(".")[1] if name.startswith("layers.") else None
            raise ValueError(f"{source} lacks {name}" + (f", which layer_types[{layer}] needs" if layer else ""))
        if forms[name] != form:
            stored, wanted = (f"{list(shape)} {kind or 'of another dtype'}" for kind, shape in (forms[name], form))
            raise ValueError(f"{source}: {name} is {stored}, the configuration and the lengths describe {wanted}")
    if extra := sorted(forms.keys() - expected.keys()):
        raise ValueError(f"{source} holds tensors that this configuration does not have: {short(extra[:5])}")
    return dtype


def _described(config: TextConfig, rows: int, longest: int, dtype: torch.dtype) -> dict[str, Form]:
    """The tensors of a cache: see `empty_state`."""
    heads, head = config.num_key_value_heads, config.head_dim
    state = (rows, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    forms: dict[str, Form] = {"lengths": (torch.int64, (rows,)), "ids": (torch.int32, (rows, longest))}
    for index, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            forms |= {f"layers.{index}.{name}": (dtype, (rows, longest, heads, head)) for name in ("key", "value")}
        else:
            forms[f"layers.{index}.conv_state"] = (dtype, (rows, config.conv_dim, config.linear_conv_kernel_dim - 1))
            forms[f"layers.{index}.recurrent_state"] = (torch.promote_types(torch.float32, dtype), state)
    return forms


def _check_room(source: str, config: TextConfig, numbers: Mapping[str, Any], dtype: torch.dtype) -> None:
    """ValueError if a static cache needs more than the memory; its room is not in the file."""
    positions = len(numbers["lengths"]) * (numbers["max_length"] or 0)
    layers = config.layer_types.count("full_attention")
    nbytes = positions * (4 + 2 * layers * config.num_key_value_heads * config.head_dim * dtype.itemsize)
    if nbytes > (available := available_memory()):
        raise ValueError(f"{source}: max_length = {numbers['max_length']} takes {nbytes} bytes, {available} are available")


def _check_values(source: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """ValueError for numbers that are not finite, and for counters that contradict the metadata."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} has numbers that are not finite")
    lengths = tensors["lengths"]
    if lengths.tolist() != numbers["lengths"]:
        raise ValueError(f"{source}: lengths {short(lengths.tolist())}, in the metadata {short(numbers['lengths'])}")
    if tensors["ids"].numel() and int(tensors["ids"].min()) < UNKNOWN:
        raise ValueError(f"{source}: ids has {int(tensors['ids'].min())}; ids are at least 0, or {UNKNOWN} for unknown")
    if "rope_delta" in tensors:
        since, positions = tensors["rope_delta_since"], lengths + tensors["rope_delta"]
        if bool((since < 0).any() or (since > lengths).any()):
            problem = f"rope_delta_since {short(since.tolist())} is beyond the lengths {short(numbers['lengths'])}"
            raise ValueError(f"{source}: {problem}")
        if bool((positions < 0).any() or (positions > MAX_COUNTER).any()):
            raise ValueError(f"{source}: rope_delta {short(tensors['rope_delta'].tolist())} leads to a negative position")
