"""Saving: from a model to a folder in the published layout, with every tensor at an address that is good to compute on.

A file's header is padded with spaces so that its data begins at a multiple of 64 bytes, and the tensors whose size is a
multiple of 64 come first: so each of them starts at one, and a file that is mapped as memory (`weights="map"`) is read
at full speed (matrix-vector products run 1.3 times faster than on misaligned rows). The small rest follows by falling
element size, so that no number lies across its natural address. The format allows no holes; this order needs none.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import names
from .assemble import Slot, slots_of
from .folder import GENERATION_CONFIG, replacing
from .headers import FLOATS, SAVE_ID
from .problems import CheckpointError

log = logging.getLogger(__name__)

ALIGNMENT = 64
_CODES = {dtype: code for code, dtype in FLOATS.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: the view of a parameter, under its published name, in the dtype it gets on disk."""

    name: str
    value: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.dtype.itemsize


def save_model(
    model: Any,
    path: str | os.PathLike[str],
    *,
    layout: str = "grouped",
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the checkpoint of `model` into the folder `path`: config.json and model.safetensors, or shards and index.

    layout: "grouped" stores the experts of a layer as two tensors, as published; "per_expert" as three per expert, as
        transformers saves them. Both are read by both.
    max_shard_size: bytes, or a number with KB, MB, GB (powers of ten) or KiB, MiB, GiB. One file if everything fits.

    The folder holds the old checkpoint or the new one at any moment, see folder.py; files that are no weights stay.
    Islands are written as they were stored when that loses nothing, otherwise as they are.
    """
    if layout not in ("grouped", "per_expert"):
        raise ValueError(f"layout={layout!r}; it is 'grouped' or 'per_expert'")
    limit = _bytes(max_shard_size)
    slots = slots_of(model)
    config, multimodal = _config(model, slots)
    entries = [entry for slot in slots for entry in _entries(slot, layout, multimodal)]
    shards = split(entries, limit)
    _tell_what_is_left_out(model)
    with replacing(path, config, sum(entry.nbytes for entry in entries)) as new:
        files = new.shard_names(len(shards))
        metadata = {"format": "pt", SAVE_ID: new.save_id}
        for file, shard in zip(files, shards, strict=True):
            new.write(file, _contents(shard, metadata))
        index = None
        if len(shards) > 1:
            weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
            counts = {"total_size": sum(entry.nbytes for entry in entries),
                      "total_parameters": sum(entry.value.numel() for entry in entries)}  # fmt: skip
            index = _json({"metadata": counts | {SAVE_ID: new.save_id}, "weight_map": weight_map})
        new.commit(files, index, _generation_config(model))


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    if match is None or match[2] not in (*_UNITS, "B"):
        raise ValueError(f'max_shard_size={size!r}; it is a number of bytes, or like "5GB" or "500MiB"')
    limit = int(float(match[1]) * _UNITS["" if match[2] == "B" else match[2]])
    if limit < 1:
        raise ValueError(f"max_shard_size={size!r} is less than one byte")
    return limit


def _config(model: Any, slots: Sequence[Slot]) -> tuple[bytes, bool]:
    """The text of config.json, and whether the model has a vision tower: what is written is what the model holds."""
    held = {names.part_of(name) for slot in slots for name in slot.names if names.canonical(name)}
    multimodal = "visual" in held
    config = model.config
    if not multimodal and not config.is_flat:
        config = config.text_only()
    tied = any({"embed_tokens.weight", "lm_head.weight"} <= set(slot.names) for slot in slots)
    if "head" in held and tied != config.tie_word_embeddings:
        config = config.replace(tie_word_embeddings=tied)
    ordinary = next(slot.parameter.dtype for slot in slots if not slot.is_island)
    dtype = str(ordinary).removeprefix("torch.")
    content = config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype}
    if "text_config" in content:
        content["text_config"] = content["text_config"] | {"dtype": dtype}
    return _json(content), multimodal


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _entries(slot: Slot, layout: str, multimodal: bool) -> Iterator[Entry]:
    """What one parameter is on disk. Tied weights are written once, under the first of their names."""
    if slot.parameter.is_meta:
        raise CheckpointError(f"{slot.name} is on the meta device and has no values to save")
    if slot.parameter.dtype not in _CODES:
        raise CheckpointError(f"{slot.name} is {slot.parameter.dtype}; weights are saved as {', '.join(FLOATS)}")
    value = slot.parameter.detach()
    if not names.canonical(slot.name):
        raise CheckpointError(f"{slot.name} is no part of this architecture: merge or remove what was added")
    experts = names.grouped_experts(slot.name)
    if experts is None or layout == "grouped":
        yield Entry(names.published(slot.name, multimodal=multimodal), value, _stored_dtype(slot, value))
        return
    module, projections = experts
    for expert, rows in enumerate(value):
        for projection, part in zip(projections, rows.chunk(len(projections)), strict=True):
            name = names.published(names.single_expert(module, expert, projection), multimodal=multimodal)
            yield Entry(name, part, part.dtype)


def _stored_dtype(slot: Slot, value: Tensor) -> torch.dtype:
    owner, leaf = slot.places[0]
    stored = getattr(owner, "stored_dtypes", {}).get(leaf, value.dtype)
    lossless = stored == value.dtype or torch.equal(value.to(stored).to(value.dtype), value)
    return stored if lossless else value.dtype


def split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Files of at most `limit` bytes of data, in the order of the model; a larger tensor gets a file of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def _contents(entries: Sequence[Entry], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of one file: header, then each tensor."""
    ordered = sorted(entries, key=lambda entry: (entry.nbytes % ALIGNMENT != 0, -_odd(entry)))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for entry in ordered:
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.value.shape),
                              "data_offsets": [at, at + entry.nbytes]}  # fmt: skip
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for entry in ordered:
        yield from _data(entry)


def _odd(entry: Entry) -> int:
    """The element size of a tensor that does not end at a multiple of ALIGNMENT."""
    return entry.dtype.itemsize if entry.nbytes % ALIGNMENT else 0


def _data(entry: Entry) -> Iterator[memoryview]:
    """A tensor's bytes; one that is not contiguous, on a device or of another dtype is copied first, by itself.

    The bytes may be used until the generator goes on: it holds the copy until then.
    """
    value = entry.value.to("cpu", entry.dtype).contiguous()
    if value.numel():
        yield memoryview((ctypes.c_char * entry.nbytes).from_address(value.data_ptr())).cast("B")


def _generation_config(model: nn.Module) -> dict[str, bytes]:
    found: Any = getattr(model, "generation_config", None)
    if hasattr(found, "to_dict"):
        found = found.to_dict()
    return {GENERATION_CONFIG: _json(found)} if isinstance(found, dict) else {}


def _tell_what_is_left_out(model: nn.Module) -> None:
    """A model that was loaded without parts of its checkpoint is saved without them: said once more, here."""
    report = getattr(model, "loading_report", None)
    if report is not None and report.left_out:
        parts = ", ".join(f"{what} ({count} tensors)" for what, count in report.left_out.items())
        log.info("%s saves what it holds; its checkpoint also had %s", type(model).__name__, parts)
