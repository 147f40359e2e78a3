"""The contents of a checkpoint, read from headers alone and checked.

A safetensors file is  u64 length N | N bytes of JSON | data,  where the JSON maps each name to
{"dtype": "BF16", "shape": [256, 2048], "data_offsets": [begin, end]} (offsets from the start of the data, no holes, no
overlaps) and "__metadata__" to strings. A checkpoint is one such file, `model.safetensors`, or several with
`model.safetensors.index.json`: {"weight_map": {name: file}}. If both exist, the single file is the checkpoint and the
index is ignored, as in transformers.

Files are untrusted: no file outside the folder is opened, every size in a header is compared with the size of the file
before memory is allocated for it, and braces and commas are counted before JSON is parsed (qwen35moe/files.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from qwen35moe.files import UnreadableFile, file_in, parse_json, read_limited

from .problems import CheckpointError, Problem, fold, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
MAX_TENSORS = 500_000  # of a whole checkpoint; the largest published one has 189,042
SAVE_ID = "save_id"  # a metadata key of the checkpoints that this library writes: see folder.py

# Bits per number of all dtypes of the format, to check the sizes of tensors. dtypes.py has the supported dtypes.
_BITS = {"C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
         "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
         "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: `nbytes` bytes from byte `offset` of `file` (counted from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, begin: int, end: int) -> StoredTensor:
        """Rows begin ... end - 1 of the first axis, which are contiguous."""
        row = self.nbytes // max(self.shape[0], 1)
        shape = (end - begin, *self.shape[1:])
        return StoredTensor(self.name, self.dtype, shape, self.file, self.offset + begin * row, (end - begin) * row)


@dataclass
class Header:
    """The contents of a checkpoint: tensors by name, their files, and the metadata.

    unreadable: names whose file or entry is missing or wrong; the problems say why.
    unread: names that the index assigns to files without any wanted tensor; these files are not opened.
    """

    folder: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def save_id(self) -> str | None:
        value = self.metadata.get(SAVE_ID)
        return value if isinstance(value, str) else None


def read_headers(
    path: str | os.PathLike[str],
    problems: list[Problem] | None = None,
    wanted: Callable[[str], bool] | None = None,
) -> Header:
    """Read and check the headers of the checkpoint in the folder `path`.

    wanted(name): files without a wanted tensor (by the index) are not opened and may be missing.

    All problems are appended to `problems`; without that list, one CheckpointError contains them. A folder without a
    checkpoint raises in either case.
    """
    collected: list[Problem] = [] if problems is None else problems
    header = _read(Path(path), collected, wanted)
    if problems is None and collected:
        raise CheckpointError(f"{path} is not a valid checkpoint:", collected)
    return header


def _read(folder: Path, problems: list[Problem], wanted: Callable[[str], bool] | None) -> Header:
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}. A checkpoint is a folder with config.json and {SINGLE} or {INDEX}; "
            f"download a model of the Hub first (hf download NAME --local-dir FOLDER)"
        )
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        file = locate(folder, SINGLE, problems)
        header = Header(folder)
        if file is not None:
            header.files = (file,)
            contents = read_contents(file, SINGLE, problems) or Contents([], {}, set())
            header.tensors = {tensor.name: tensor for tensor in contents.tensors}
            header.metadata, header.unreadable = contents.metadata, contents.wrong
        return header
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return _read_sharded(folder, problems, wanted)
    raise CheckpointError(_no_checkpoint(folder))


def _no_checkpoint(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return (
            f"{folder} stores its weights as pickles ({', '.join(pickles[:3])}), which can run code and are never read. "
            f"Convert them to safetensors files, with model.save_pretrained(...) of transformers"
        )
    listed = ", ".join(shown(name, 60) for name in names[:10]) or "nothing"
    return f"{folder} has neither {SINGLE} nor {INDEX}; it contains {listed}"


def locate(folder: Path, name: str, problems: list[Problem]) -> Path | None:
    """The path of the file `name` in the folder, or None and a problem if there is no such file or it is outside.

    A symbolic link may point into the blobs of the Hub's cache (snapshots/REVISION/x -> blobs/HASH beside snapshots),
    but nowhere else outside the folder.
    """
    try:
        return file_in(folder, name)
    except UnreadableFile as error:
        problems.append(Problem(error.kind, shown(name), str(error)))
        return None


def _read_sharded(folder: Path, problems: list[Problem], wanted: Callable[[str], bool] | None) -> Header:
    weight_map, metadata = read_index(folder, problems)
    header = Header(folder, metadata=metadata)
    names_in: dict[str, set[str]] = {}
    total = 0
    for tensor_name, name in weight_map.items():
        names_in.setdefault(name, set()).add(tensor_name)
    for name, listed in names_in.items():
        if wanted is not None and not any(map(wanted, listed)):
            header.unread |= listed
            continue
        before = len(problems)
        file = locate(folder, name, problems)
        contents = None if file is None else read_contents(file, name, problems)
        if file is None or contents is None:
            problems[before:] = [_needed_for(problem, listed, wanted) for problem in problems[before:]]
            continue
        header.files += (file,)
        total += len(contents.tensors)
        if total > MAX_TENSORS:
            problems.append(Problem("too many tensors", shown(name), f"more than {MAX_TENSORS} in all"))
            break
        for tensor in contents.tensors:
            indexed = weight_map.get(tensor.name)
            if indexed == name:
                header.tensors[tensor.name] = tensor
            else:
                entry = "has no such name" if indexed is None else f"has {shown(indexed)}"
                problems.append(Problem("index and shard disagree", tensor.name, f"in {shown(name)}; the index {entry}"))
        for absent in sorted(listed - {tensor.name for tensor in contents.tensors} - contents.wrong):
            problems.append(Problem("index and shard disagree", absent, f"the index has {shown(name)}, which lacks it"))
    header.unreadable = weight_map.keys() - header.tensors.keys() - header.unread
    return header


def _needed_for(problem: Problem, listed: set[str], wanted: Callable[[str], bool] | None) -> Problem:
    """A shard that cannot be read, with the tensors that the index assigns to it."""
    needed = sorted(name for name in listed if wanted is None or wanted(name))
    rows = [row.removeprefix("x: ") for row in fold(Problem("x", name) for name in needed)]
    detail = f"needed for {len(needed)} tensors: " + ", ".join(rows[:3]) + (", ..." if len(rows) > 3 else "")
    return replace(problem, detail=f"{problem.detail}; {detail}" if problem.detail else detail)


def read_index(folder: Path, problems: list[Problem]) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight_map (tensor name to file name) and the metadata of the index."""
    index = read_object(folder, INDEX, MAX_HEADER_BYTES, problems)
    if index is None:
        return {}, {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        problems.append(Problem("bad index", INDEX, "weight_map must map tensor names to file names"))
        return {}, {}
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def read_object(folder: Path, name: str, limit: int, problems: list[Problem]) -> dict[str, Any] | None:
    """The object in the JSON file `name` of the folder, of at most `limit` bytes; None and a problem for any other file."""
    file = locate(folder, name, problems)
    if file is None:
        return None
    try:
        text = read_limited(file, limit)
    except UnreadableFile as error:
        problems.append(Problem("unreadable file", name, str(error)))
        return None
    return parse_object(text, name, problems)


def parse_object(text: bytes, where: str, problems: list[Problem]) -> dict[str, Any] | None:
    """The object in a JSON text; None and a problem if it contains no object. A repeated key is a problem too."""

    def repeated(key: str) -> None:
        problems.append(Problem("name occurs twice", key, f"in {shown(where)}"))

    try:
        value = parse_json(text, most=MAX_TENSORS, repeated=repeated)
    except UnreadableFile as error:
        if error.kind == "too many values":
            detail = f"more than {MAX_TENSORS}, or JSON with other contents"
            problems.append(Problem("too many tensors", shown(where), detail))
        else:
            problems.append(Problem(error.kind, shown(where), shown(str(error))))
        return None
    if not isinstance(value, dict):
        problems.append(Problem("not a JSON object", shown(where)))
        return None
    return value


class Contents(NamedTuple):
    """The tensors and the metadata of one file, and the names of its invalid entries."""

    tensors: list[StoredTensor]
    metadata: dict[str, Any]
    wrong: set[str]


def read_contents(file: Path, where: str, problems: list[Problem]) -> Contents | None:
    """The contents of one file; None and a problem if the file as a whole is invalid."""
    where = shown(where)
    with file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if first.startswith(b"version ") and size < 1024:
            problems.append(Problem("not downloaded", where, "it is a Git LFS pointer: run `git lfs pull`"))
            return None
        if len(first) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            detail = f"{length} bytes of header in a file of {size} (at most {MAX_HEADER_BYTES})"
            problems.append(Problem("bad header", where, f"{detail}: the file is cut off, or not safetensors"))
            return None
        entries = parse_object(f.read(length), where, problems)
    if entries is None:
        return None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(Problem("bad header", where, "__metadata__ must map strings to strings"))
        metadata = {}
    start, before = 8 + length, len(problems)
    tensors = [t for name, entry in entries.items() if (t := _tensor(name, entry, file, start, where, problems))]
    if len(problems) == before:  # otherwise the layout would only repeat these problems
        _check_layout(tensors, start, size, where, problems)
    return Contents(tensors, metadata, entries.keys() - {tensor.name for tensor in tensors})


def _tensor(name: str, entry: Any, file: Path, start: int, where: str, problems: list[Problem]) -> StoredTensor | None:
    def wrong(detail: str) -> None:
        problems.append(Problem("bad entry", name, f"{detail} (in {where})"))

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return wrong("its keys must be dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        return wrong(f"unknown dtype {shown(dtype, 40) if isinstance(dtype, str) else 'that is no string'}")
    if not _naturals(shape) or len(shape) > 64:
        return wrong("shape must be a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return wrong("data_offsets must be [begin, end]")
    begin, end = offsets
    needed, odd = divmod(math.prod(shape) * bits, 8)
    if odd or end - begin != needed:
        return wrong(f"{end - begin} bytes for {dtype} {list(shape)}, which takes {needed}")
    return StoredTensor(name, dtype, tuple(shape), file, start + begin, needed)


def _naturals(value: Any) -> bool:
    # `true` in a header is not a size, although bool is an int in Python.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(
    tensors: Iterable[StoredTensor], start: int, size: int, where: str, problems: list[Problem]
) -> None:
    """Check that the tensors cover the data exactly once: no overlap, no hole, no bytes after the last one."""
    at = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            kind = "overlaps" if tensor.offset < at else "hole before"
            detail = f"it begins at byte {tensor.offset - start} of the data, the previous tensor ends at {at - start}"
            problems.append(Problem(kind, tensor.name, f"{detail} (in {where})"))
            return  # all later tensors would be reported too
        at += tensor.nbytes
    if at > size:
        problems.append(Problem("cut off", where, f"the header describes {at} bytes, the file has {size}"))
    elif at < size:
        problems.append(Problem("bad header", where, f"{size - at} bytes after the last tensor"))
