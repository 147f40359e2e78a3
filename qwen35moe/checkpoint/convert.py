"""Conversion of a checkpoint to another layout, tensor by tensor: no model is built, memory does not grow with its size.

read the headers -> list the tensors of the new checkpoint (published names, from the configuration) -> locate the numbers
of each -> raise everything that is wrong in one error -> write, reading 32 MiB at a time

Every tensor of the old checkpoint is accounted for: it is written, it belongs to a layer that was not selected, or it is
an error. No tensor is dropped because its name is unknown.
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
from qwen35moe.config.parameters import FP32_PARAMETERS
from qwen35moe.files import UnreadableFile, read_limited

from . import names
from .block_fp8 import dequantise
from .blocks import BLOCK, FP8, SCALE, scale_shape
from .dtypes import FLOATS, TORCH_DTYPES, checked_dtype, name_of
from .folder import CONFIG, config_of
from .headers import INDEX, Header, StoredTensor, locate, read_headers
from .ownership import folder_to_write
from .problems import CheckpointError, Problem, check_choice
from .published import check_experts
from .write import LAYOUTS, Entry, bytes_of, json_bytes, write_checkpoint

log = logging.getLogger(__name__)

CHUNK = 32 * 2**20  # bytes of one read
MAX_OTHER = 64 * 2**20  # bytes of a file that is copied along; the largest published one, tokenizer.json, has 13 MB
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files of a checkpoint by their names. Any other file in the target keeps its contents.
_CHECKPOINT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
                     "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")  # fmt: skip
_LAYER = re.compile(r"^layers\.(\d+)\.")
_LISTED_LAYER = re.compile(r"^((?:model\.)?(?:language_model\.)?layers\.)(\d+)(\..*)?$")

# Called with the total number of bytes; the function that it returns is called with the bytes of every written piece.
Progress = Callable[[int], Callable[[int], object]]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    mtp_layout: str | None = None,
    dtype: str | torch.dtype | None = None,
    layers: Iterable[int] | None = None,
    max_shard_size: int | str = "5GB",
    ignore: str | Iterable[str] = (),
    progress: Progress | None = None,
) -> Config:
    """Write the checkpoint in the folder `source` to the folder `target` in another form; returns its configuration.

    layout, mtp_layout: "grouped" or "per_expert", of the decoder's experts and of the MTP head's (the same by default);
        None keeps the layout of the source.
    dtype: float64, float32, bfloat16 or float16; None keeps the dtype of every tensor, block-FP8 included. A_log, dt_bias
        and the delta rule's norm are only ever widened: with a narrower dtype they stay as stored.
    layers: the decoder layers to keep; they are renumbered in this order, and layer_types in config.json follows.
    ignore: patterns of stored names that are not written, such as "score.*".

    The target changes in one step after everything is written (folder.py); it may be the source. Tokenizer and other
    files beside the weights are copied. CheckpointError lists everything that does not fit.
    """
    limit, new_dtype = bytes_of(max_shard_size), checked_dtype(dtype)
    target = folder_to_write(target)
    for name, choice in (("layout", layout), ("mtp_layout", mtp_layout)):
        check_choice(name, choice, (None, *LAYOUTS))
    problems: list[Problem] = []
    patterns = names.checked_patterns(ignore)
    wanted = (lambda name: names.ignored_by(patterns, name) is None) if patterns else None
    header = read_headers(source, problems, wanted)
    for name in [name for name in header.tensors if names.ignored_by(patterns, name) is not None]:
        del header.tensors[name]
    config = config_of(header)
    _check_method(config, header)
    old = _Source(header, config, problems)
    _check_layouts(old, layout, mtp_layout)
    kept = _checked_layers(layers, config.text_config.num_hidden_layers)
    new = _new_config(config, kept, new_dtype)
    layouts = (layout or old.layout_of("text"), mtp_layout or layout or old.layout_of("mtp"))
    if "per_expert" in (*layouts, old.layout_of("text"), old.layout_of("mtp")):
        check_experts(config, len(header.tensors) + len(header.unreadable))
    entries = list(_entries(old, new, kept, layouts, new_dtype))
    problems += old.unused(kept)
    if problems:
        raise CheckpointError(f"{header.folder} cannot be converted:", problems)
    others = side_files(header, target)
    wrote = progress(sum(entry.nbytes for entry in entries)) if progress else None
    write_checkpoint(target, json_bytes(new.to_dict()), entries, limit, others, wrote)
    return new


def _check_method(config: Config, header: Header) -> None:
    method = (config.quantization_config or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise CheckpointError(
            f"{header.folder} is quantised by {method!r}; supported are block-FP8 ('fp8') and weights stored as "
            f"{', '.join(FLOATS)}"
        )


def _check_layouts(old: _Source, layout: str | None, mtp_layout: str | None) -> None:
    """ValueError for a layout of experts that the checkpoint does not have."""
    if not old.config.text_config.is_moe and (layout or mtp_layout):
        raise ValueError(f"{old.header.folder} is dense and has no experts: omit the layout")
    if mtp_layout and not old.has("mtp"):
        raise ValueError(f"{old.header.folder} has no MTP head: omit mtp_layout={mtp_layout!r}")


def _checked_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    kept = list(range(count)) if layers is None else list(layers)
    if not kept or not all(0 <= layer < count for layer in kept) or len(set(kept)) != len(kept):
        raise ValueError(f"layers={kept} must be one or more different numbers out of 0 ... {count - 1}")
    return kept


# -------------------------------------------------------------------------------------------------------- configuration


def _new_config(config: Config, kept: Sequence[int], dtype: torch.dtype | None) -> Config:
    changes: dict[str, Any] = {}
    types = config.text_config.layer_types
    if list(kept) != list(range(len(types))):
        changes["layer_types"] = [types[layer] for layer in kept]
    if dtype is not None:
        changes["dtype"] = name_of(dtype)
    quantised = config.quantization_config
    if quantised is not None:  # a new dtype dequantises
        changes["quantization_config"] = _renumbered(quantised, kept) if dtype is None else None
    return config.replace(**changes) if changes else config


def _renumbered(quantised: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """quantization_config with the list of unquantised modules reduced to the layers that are kept."""
    listed = quantised.get("modules_to_not_convert")
    if not isinstance(listed, list):
        return quantised
    new_index = {layer: index for index, layer in enumerate(kept)}
    modules = []
    for module in listed:
        match = _LISTED_LAYER.match(module) if isinstance(module, str) else None
        if match is None:
            modules.append(module)
        elif int(match[2]) in new_index:
            modules.append(f"{match[1]}{new_index[int(match[2])]}{match[3] or ''}")
    return quantised | {"modules_to_not_convert": modules}


# --------------------------------------------------------------------------------------------------- the old checkpoint


@dataclass
class _Source:
    """The tensors of the old checkpoint by canonical name, and the names that the new checkpoint uses."""

    header: Header
    config: Config
    problems: list[Problem]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unknown: list[StoredTensor] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unreadable = {names.canonical(name) for name in self.header.unreadable}  # their files are already a problem
        for tensor in self.header.tensors.values():
            name = names.canonical(tensor.name)
            if name is None:
                self.unknown.append(tensor)
            elif name in self.tensors:
                self.problems.append(Problem("stored twice", tensor.name, f"also as {self.tensors[name].name}"))
            else:
                self.tensors[name] = tensor
        self.single_experts = {single[0] for name in self.tensors if (single := names.expert_of(name))}

    def missing(self, name: str, shape: Sequence[int]) -> None:
        if name not in self.unreadable:
            self.problems.append(Problem("missing", name, str(list(shape))))

    def has(self, part: str) -> bool:
        return any(names.part_of(name) == part for name in self.tensors)

    def layout_of(self, part: str) -> str:
        experts = (name for name in self.tensors if ".mlp.experts." in name and names.part_of(name) == part)
        return "per_expert" if any(names.expert_of(name) for name in experts) else "grouped"

    def take(self, name: str, shape: tuple[int, ...]) -> StoredTensor | None:
        """The tensor of this name, marked as used; a wrong shape or dtype is a problem. None if there is no such tensor."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self.used.add(name)
        if tensor.shape != shape:
            detail = f"on disk {list(tensor.shape)}, config.json describes {list(shape)}"
            self.problems.append(Problem("wrong shape", tensor.name, detail))
        elif tensor.dtype == FP8 and f"{name}{SCALE}" not in self.tensors:
            self.problems.append(Problem("scale missing", tensor.name, f"{FP8} needs {tensor.name}{SCALE}"))
        elif tensor.dtype not in TORCH_DTYPES:
            detail = f"{tensor.dtype}; supported are {', '.join(TORCH_DTYPES)}"
            self.problems.append(Problem("wrong dtype", tensor.name, detail))
        return tensor

    def scale_of(self, name: str, tensor: StoredTensor) -> StoredTensor | None:
        """The scale of an FP8 weight, marked as used; None for any other tensor."""
        scale = self.tensors.get(name + SCALE)
        if scale is None or tensor.dtype != FP8:
            return None
        self.used.add(name + SCALE)
        if len(tensor.shape) != 2 or scale.shape != scale_shape(tensor.shape) or scale.dtype not in FLOATS:
            detail = f"{scale.dtype} {list(scale.shape)} for a weight {list(tensor.shape)} in blocks of {BLOCK}"
            self.problems.append(Problem("wrong scales", scale.name, detail))
        return scale

    def unused(self, kept: Sequence[int]) -> Iterator[Problem]:
        """A problem for every tensor that is not used, except in layers that were not selected, and computed buffers."""
        dropped = set(range(self.config.text_config.num_hidden_layers)) - set(kept)
        for name, tensor in self.tensors.items():
            layer = _LAYER.match(name)
            if name in self.used or name.endswith(names.COMPUTED) or (layer and int(layer[1]) in dropped):
                continue
            yield Problem("unexpected", tensor.name, "config.json describes no such tensor")
        for tensor in self.unknown:
            yield Problem("unexpected", tensor.name, "not a tensor name of this architecture")


# --------------------------------------------------------------------------------------------------- the new checkpoint


def _entries(
    old: _Source, new: Config, kept: Sequence[int], layouts: tuple[str, str], dtype: torch.dtype | None
) -> Iterator[Entry]:
    """The tensors of the new checkpoint in the order of the model, with the parts (vision, MTP) that the old one has."""
    experts, mtp_experts = layouts
    vision, mtp = old.has("visual"), old.has("mtp")
    for tensor in new.tensor_shapes(vision=vision, mtp=mtp, experts=experts, mtp_experts=mtp_experts):
        new_name = names.canonical(tensor.name)
        assert new_name is not None
        name = _LAYER.sub(lambda match: f"layers.{kept[int(match[1])]}.", new_name)
        entries = _as_stored(old, name, tensor.name, tensor.shape, dtype)
        if entries is None:
            entries = _regrouped(old, name, tensor.name, tensor.shape, dtype)
        if entries is None:
            old.missing(name, tensor.shape)
        yield from entries or ()
    head = old.tensors.get("lm_head.weight")
    if head is not None and new.tie_word_embeddings:  # some programs store a copy of the embedding: keep it
        yield from _as_stored(old, "lm_head.weight", "lm_head.weight", head.shape, dtype) or ()


def _as_stored(
    old: _Source, name: str, published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A tensor that has the same form in both checkpoints; with its scale if it stays FP8."""
    tensor = old.take(name, shape)
    if tensor is None:
        return None
    scale = old.scale_of(name, tensor)
    if scale is not None and dtype is None:
        values = Entry(published, shape, torch.float8_e4m3fn, lambda: stored_numbers(tensor))
        scales = Entry(published + SCALE, scale.shape, _torch_dtype(scale), lambda: stored_numbers(scale))
        return [values, scales]
    return [Entry(published, shape, _new_dtype(name, tensor, dtype), lambda: _numbers(tensor, scale))]


def _regrouped(
    old: _Source, name: str, published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A grouped tensor from single experts, or a single expert from a grouped tensor."""
    if single := names.expert_of(name):
        return _expert_of_group(old, single, published, shape, dtype)
    if (grouped := names.grouped_experts(name)) is None:
        return None
    module, projections = grouped
    if module not in old.single_experts:
        return None
    single_shape = (shape[1] // len(projections), shape[2])
    reads: list[tuple[StoredTensor, StoredTensor | None]] = []
    for expert in range(shape[0]):
        for projection in projections:
            single_name = names.single_expert(module, expert, projection)
            tensor = old.take(single_name, single_shape)
            if tensor is None:
                old.missing(single_name, single_shape)
            else:
                reads.append((tensor, old.scale_of(single_name, tensor)))
    if dtype is None and any(scale is not None for _, scale in reads):
        detail = "block-FP8 has no grouped form: use --layout per_expert, or a dtype such as bfloat16"
        old.problems.append(Problem("cannot be grouped", name, detail))
    dtypes = {_new_dtype(name, tensor, dtype) for tensor, _ in reads} or {torch.float32}  # empty: all of them are missing
    if len(dtypes) > 1:
        detail = f"its experts are {sorted(map(str, dtypes))}: choose a dtype"
        old.problems.append(Problem("several dtypes", name, detail))
    return [Entry(published, shape, dtypes.pop(), lambda: (part for read in reads for part in _numbers(*read)))]


def _expert_of_group(
    old: _Source, single: tuple[str, int, str], published: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[Entry] | None:
    """A single expert as rows of a grouped tensor."""
    module, expert, projection = single
    weight, projections = names.group_of(projection)
    rows, columns = shape
    name = f"{module}.{weight}"
    tensor = old.take(name, (old.config.text_config.num_experts, rows * len(projections), columns))
    if tensor is None:
        return None
    count = rows * columns
    at = (expert * len(projections) + projections.index(projection)) * count
    return [Entry(published, shape, _new_dtype(name, tensor, dtype), lambda: stored_numbers(tensor, at, count))]


def _torch_dtype(tensor: StoredTensor) -> torch.dtype:
    return TORCH_DTYPES.get(tensor.dtype, torch.float32)


def _new_dtype(name: str, tensor: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype on disk: `dtype`, but parameters kept in fp32 are not narrowed below their stored dtype or float32."""
    stored = _torch_dtype(tensor)
    if dtype is None:
        return stored
    if not name.endswith(FP32_PARAMETERS) or dtype.itemsize >= 4:
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
    dtype = _torch_dtype(tensor)
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
    """Tokenizer, templates, settings, README: every file directly in the folder that is neither a weight nor hidden."""
    contents: dict[str, bytes] = {}
    if target.resolve() == header.folder.resolve():
        return contents
    for path in sorted(header.folder.iterdir()):
        name = path.name
        if name.startswith((".", CONFIG)) or name == INDEX or name.endswith((*_WEIGHTS, ".index.json")) or path.is_dir():
            continue
        problems: list[Problem] = []
        file = locate(header.folder, name, problems)
        try:
            if file is not None and name not in _CHECKPOINT_FILES and os.path.lexists(target / name):
                problems.append(Problem("the target has a file of this name", name))
            elif file is not None:
                contents[name] = read_limited(file, MAX_OTHER)
        except UnreadableFile as error:
            problems.append(Problem(str(error), name))
        if problems:
            log.warning("%s is not copied: %s", path, problems[0].kind)
    return contents
