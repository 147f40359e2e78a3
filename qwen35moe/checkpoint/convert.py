"""From one layout on disk to another, tensor by tensor: no model is built, and memory does not grow with the checkpoint.

read the headers -> list what the new checkpoint holds (published names, from the configuration) -> find for each tensor
where its numbers lie -> refuse, with everything that is wrong -> write, reading 32 MiB at a time

Every tensor of the old checkpoint is accounted for: it goes into the new one, it belongs to a layer that was not asked
for, or it is an error. Nothing is dropped because it was not recognised.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35moe.config import Config

from . import names
from .block_fp8 import dequantise
from .blocks import BLOCK, SCALE, scale_shape
from .dtypes import FLOATS
from .folder import CONFIG, config_file
from .headers import INDEX, Header, StoredTensor, locate, read_headers
from .problems import CheckpointError, Problem
from .published import check_experts
from .write import Entry, bytes_of, json_bytes, write_checkpoint

log = logging.getLogger(__name__)

CHUNK = 32 * 2**20  # bytes read at once
MAX_OTHER = 64 * 2**20  # bytes of a file that is copied along; the largest published one, tokenizer.json, has 13 MB
FP8 = "F8_E4M3"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ISLANDS = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight")  # float32 in a model of any dtype
_LAYER = re.compile(r"^layers\.(\d+)\.")
_LISTED_LAYER = re.compile(r"^((?:model\.)?(?:language_model\.)?layers\.)(\d+)(\..*)?$")

Progress = Callable[[int], Callable[[int], object]]  # told the total of bytes; what it returns is told of every piece


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    mtp_layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    layers: Iterable[int] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Config:
    """Write the checkpoint in the folder `source` into the folder `target` in another form; returns its configuration.

    layout, mtp_layout: "grouped" or "per_expert", of the decoder's experts and of the MTP head's (by default the same);
        None keeps what is there.
    dtype: float64, float32, bfloat16 or float16; None keeps every tensor as it is stored, block-FP8 too. A_log, dt_bias
        and the delta rule's norm are only ever widened: in a checkpoint of a narrower dtype they stay as stored.
    layers: which decoder layers; they are renumbered in their order, and config.json says so.

    The folder changes at once, when everything is written (folder.py); it may be the source itself. Tokenizer and other
    files beside the weights are copied. CheckpointError lists everything that does not fit.
    """
    limit, wanted = bytes_of(max_shard_size), _dtype(dtype)
    for choice in (layout, mtp_layout):
        if choice not in (None, "grouped", "per_expert"):
            raise ValueError(f"layout={choice!r}; it is 'grouped' or 'per_expert'")
    problems: list[Problem] = []
    header = read_headers(source, problems)
    config = Config.from_pretrained(config_file(header))
    _check_method(config, header)
    old = _Old(header, config, problems)
    kept = _checked_layers(layers, config.text_config.num_hidden_layers)
    new = _new_config(config, kept, wanted, keeps_fp8=wanted is None)
    form = (layout or old.layout_of("text"), mtp_layout or layout or old.layout_of("mtp"))
    if "per_expert" in (*form, old.layout_of("text"), old.layout_of("mtp")):
        check_experts(config, len(header.tensors) + len(header.lost))
    entries = list(_entries(old, new, kept, form, wanted))
    problems += old.unused(kept)
    if problems:
        raise CheckpointError(f"{header.folder} cannot be converted:", problems)
    others = side_files(header, Path(target))
    wrote = progress(sum(entry.nbytes for entry in entries)) if progress else None
    write_checkpoint(target, json_bytes(new.to_dict()), entries, limit, others, wrote)
    return new


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in FLOATS.values():
        known = ", ".join(str(known).removeprefix("torch.") for known in FLOATS.values())
        raise ValueError(f"dtype={dtype!r}; it is one of {known}")
    return found


def _check_method(config: Config, header: Header) -> None:
    method = (config.quantization_config or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(
            f"{header.folder} is quantised by {method!r}; supported are block-FP8 ('fp8') and weights stored as "
            f"{', '.join(FLOATS)}"
        )


def _checked_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    kept = list(range(count)) if layers is None else list(layers)
    wrong = [layer for layer in kept if not 0 <= layer < count]
    if wrong or not kept or len(set(kept)) != len(kept):
        raise ValueError(f"layers={kept}; they are different numbers out of 0 ... {count - 1}, at least one")
    return kept


def _new_config(config: Config, kept: Sequence[int], dtype: torch.dtype | None, *, keeps_fp8: bool) -> Config:
    changes: dict[str, Any] = {}
    types = config.text_config.layer_types
    if list(kept) != list(range(len(types))):
        changes["layer_types"] = [types[layer] for layer in kept]
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    quantised = config.quantization_config
    if quantised is not None:
        changes["quantization_config"] = _renumbered(quantised, kept) if keeps_fp8 else None
    return config.replace(**changes) if changes else config


def _renumbered(quantised: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The list of modules that are not quantised, for the layers that are kept."""
    listed = quantised.get("modules_to_not_convert")
    if not isinstance(listed, list):
        return quantised
    place = {layer: index for index, layer in enumerate(kept)}
    new = []
    for module in listed:
        match = _LISTED_LAYER.match(module) if isinstance(module, str) else None
        if match is None:
            new.append(module)
        elif int(match[2]) in place:
            new.append(f"{match[1]}{place[int(match[2])]}{match[3] or ''}")
    return quantised | {"modules_to_not_convert": new}


@dataclass
class _Old:
    """The tensors of the old checkpoint by canonical name, and which of them have found a place in the new one."""

    header: Header
    config: Config
    problems: list[Problem]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    foreign: list[StoredTensor] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lost = {names.canonical(name) for name in self.header.lost}  # their files are a problem already
        for tensor in self.header.tensors.values():
            name = names.canonical(tensor.name)
            if name is None:
                self.foreign.append(tensor)
            elif name in self.tensors:
                self.problems.append(Problem("stored twice", tensor.name, f"also as {self.tensors[name].name}"))
            else:
                self.tensors[name] = tensor
        self.single_experts = {single[0] for name in self.tensors if (single := names.expert_of(name))}

    def missing(self, name: str, shape: Sequence[int]) -> None:
        if name not in self.lost:
            self.problems.append(Problem("missing", name, str(list(shape))))

    def has(self, part: str) -> bool:
        return any(names.part_of(name) == part for name in self.tensors)

    def layout_of(self, part: str) -> str:
        experts = (name for name in self.tensors if ".mlp.experts." in name and names.part_of(name) == part)
        return "per_expert" if any(names.expert_of(name) for name in experts) else "grouped"

    def take(self, name: str, shape: tuple[int, ...]) -> StoredTensor | None:
        """The tensor of this name, now used; None and a problem where its shape or dtype does not fit."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self.used.add(name)
        if tensor.shape != shape:
            detail = f"on disk {list(tensor.shape)}, config.json describes {list(shape)}"
            self.problems.append(Problem("wrong shape", tensor.name, detail))
        elif tensor.dtype == FP8 and f"{name}{SCALE}" not in self.tensors:
            self.problems.append(Problem("FP8 without a scale", tensor.name, f"{tensor.name}{SCALE} is missing"))
        elif tensor.dtype not in (*FLOATS, FP8):
            known = ", ".join((*FLOATS, FP8))
            self.problems.append(Problem("wrong dtype", tensor.name, f"{tensor.dtype}; converted are {known}"))
        return tensor

    def scale_of(self, name: str, tensor: StoredTensor) -> StoredTensor | None:
        """The scales of an FP8 weight, now used; None for any other tensor."""
        scale = self.tensors.get(name + SCALE)
        if scale is None or tensor.dtype != FP8:
            return None
        self.used.add(name + SCALE)
        if len(tensor.shape) != 2 or scale.shape != scale_shape(tensor.shape) or scale.dtype not in FLOATS:
            detail = f"{scale.dtype} {list(scale.shape)} for a weight {list(tensor.shape)} in blocks of {BLOCK}"
            self.problems.append(Problem("wrong scales", scale.name, detail))
        return scale

    def unused(self, kept: Sequence[int]) -> Iterator[Problem]:
        """What has no place in the new checkpoint, but for layers that were not asked for and computed buffers."""
        dropped = set(range(self.config.text_config.num_hidden_layers)) - set(kept)
        for name, tensor in self.tensors.items():
            layer = _LAYER.match(name)
            if name in self.used or name.endswith(names.COMPUTED) or (layer and int(layer[1]) in dropped):
                continue
            yield Problem("unexpected", tensor.name, "config.json describes no such tensor")
        for tensor in self.foreign:
            yield Problem("unexpected", tensor.name, "no name of this architecture")


def _entries(
    old: _Old, new: Config, kept: Sequence[int], form: tuple[str, str], dtype: torch.dtype | None
) -> Iterator[Entry]:
    """The tensors of the new checkpoint, in the order of the model. Parts that the old one has not are not made up."""
    experts, mtp_experts = form
    vision, mtp = old.has("visual"), old.has("mtp")
    for tensor in new.tensor_shapes(vision=vision, mtp=mtp, experts=experts, mtp_experts=mtp_experts):
        name = names.canonical(tensor.name)
        assert name is not None
        before = _LAYER.sub(lambda match: f"layers.{kept[int(match[1])]}.", name)
        found = _one(old, before, tensor.name, tensor.shape, dtype)
        if found is None:
            found = _from_experts(old, before, tensor.name, tensor.shape, dtype)
        if found is None:
            old.missing(before, tensor.shape)
        yield from found or ()
    head = old.tensors.get("lm_head.weight")
    if head is not None and new.tie_word_embeddings:  # a copy of the embedding, which some programs store: it stays one
        yield from _one(old, "lm_head.weight", "lm_head.weight", head.shape, dtype) or ()


def _one(
    old: _Old, name: str, published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A tensor that lies on disk as it will; with its scales if it is FP8 and stays so."""
    tensor = old.take(name, shape)
    if tensor is None:
        return None
    scale = old.scale_of(name, tensor)
    if scale is not None and dtype is None:
        values = Entry(published, shape, torch.float8_e4m3fn, lambda: stored_numbers(tensor))
        scales = Entry(published + SCALE, scale.shape, _torch(scale), lambda: stored_numbers(scale))
        return [values, scales]
    return [Entry(published, shape, _target(name, tensor, dtype), lambda: _numbers(tensor, scale))]


def _from_experts(
    old: _Old, name: str, published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A grouped tensor put together from single experts, or a single one cut out of a grouped tensor."""
    if single := names.expert_of(name):
        return _cut(old, single, published, shape, dtype)
    if (grouped := names.grouped_experts(name)) is None:
        return None
    module, projections = grouped
    if module not in old.single_experts:
        return None
    each = (shape[1] // len(projections), shape[2])
    reads: list[tuple[StoredTensor, StoredTensor | None]] = []
    for expert in range(shape[0]):
        for projection in projections:
            one = names.single_expert(module, expert, projection)
            tensor = old.take(one, each)
            if tensor is None:
                old.missing(one, each)
            else:
                reads.append((tensor, old.scale_of(one, tensor)))
    if dtype is None and any(scale is not None for _, scale in reads):
        detail = "block-FP8 has no grouped form: choose --layout per_expert, or a dtype such as bfloat16"
        old.problems.append(Problem("cannot be grouped", name, detail))
    kinds = {_target(name, tensor, dtype) for tensor, _ in reads} or {torch.float32}  # none: all of them are missing
    if len(kinds) > 1:
        old.problems.append(Problem("several dtypes", name, f"its experts are {sorted(map(str, kinds))}: choose a dtype"))
    return [Entry(published, shape, kinds.pop(), lambda: (part for read in reads for part in _numbers(*read)))]


def _cut(
    old: _Old, single: tuple[str, int, str], published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A single expert as rows of a grouped tensor."""
    module, expert, projection = single
    weight, parts = next((w, p) for w, p in names.EXPERT_WEIGHTS.items() if projection in p)
    rows, columns = shape
    whole = f"{module}.{weight}"
    tensor = old.take(whole, (old.config.text_config.num_experts, rows * len(parts), columns))
    if tensor is None:
        return None
    at = (expert * len(parts) + parts.index(projection)) * rows * columns
    count = rows * columns
    return [Entry(published, shape, _target(whole, tensor, dtype), lambda: stored_numbers(tensor, at, count))]


def _torch(tensor: StoredTensor) -> torch.dtype:
    return torch.float8_e4m3fn if tensor.dtype == FP8 else FLOATS.get(tensor.dtype, torch.float32)


def _target(name: str, tensor: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype on disk: the one asked for, and for islands at least what they have, float32 being enough."""
    stored = _torch(tensor)
    if dtype is None:
        return stored
    if not name.endswith(_ISLANDS):
        return dtype
    if dtype.itemsize >= 4:
        return dtype
    return torch.float32 if stored.itemsize > 4 else stored


def _numbers(tensor: StoredTensor, scale: StoredTensor | None) -> Iterator[Tensor]:
    """The numbers of a tensor in order, those of an FP8 weight as float32."""
    if scale is None:
        yield from stored_numbers(tensor)
        return
    scales = torch.cat(list(stored_numbers(scale))).view(scale.shape)
    rows, columns = tensor.shape
    step = max(1, CHUNK // (4 * BLOCK * columns)) * BLOCK
    for row in range(0, rows, step):
        count = min(step, rows - row)
        values = torch.cat(list(stored_numbers(tensor, row * columns, count * columns)))
        yield dequantise(values.view(count, columns), scales[row // BLOCK : -(-(row + count) // BLOCK)])


def stored_numbers(tensor: StoredTensor, at: int = 0, count: int | None = None) -> Iterator[Tensor]:
    """`count` numbers of a stored tensor from number `at` on (all of them by default), CHUNK bytes at a time."""
    dtype = _torch(tensor)
    end = tensor.numel if count is None else at + count
    step = CHUNK // dtype.itemsize
    with tensor.file.open("rb", buffering=0) as f:
        for begin in range(at, end, step):
            buffer = bytearray((min(end, begin + step) - begin) * dtype.itemsize)
            f.seek(tensor.offset + begin * dtype.itemsize)
            rest = memoryview(buffer)
            while rest and (got := f.readinto(rest)):
                rest = rest[got:]
            if rest:
                raise OSError(f"{tensor.file} ended {len(rest)} bytes early: it was changed while it was read")
            yield torch.frombuffer(buffer, dtype=dtype)


def side_files(header: Header, target: Path) -> dict[str, bytes]:
    """Tokenizer, templates, settings, README: every file of the folder itself that is no weight and not hidden."""
    found: dict[str, bytes] = {}
    if target.resolve() == header.folder.resolve():
        return found
    for path in sorted(header.folder.iterdir()):
        name = path.name
        if name.startswith((".", CONFIG)) or name == INDEX or name.endswith((*_WEIGHTS, ".index.json")) or path.is_dir():
            continue
        problems: list[Problem] = []
        file = locate(header.folder, name, problems)
        if file is None or file.stat().st_size > MAX_OTHER:
            log.warning("%s is not copied: %s", path, problems[0].kind if problems else "larger than 64 MiB")
            continue
        found[name] = file.read_bytes()
    return found
