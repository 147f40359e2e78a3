"""Files from outside are read by one rule; new files replace old ones in one step.

Reading: `file_in` finds a file of a folder and refuses links that lead out of it, `read_limited` compares the size before it
takes memory and never waits for a pipe, `parse_json` limits the number of values before it parses. `open_tensors` opens a
safetensors file in the same way. Everything that these refuse is an `UnreadableFile`, a ValueError.

Writing: `replacing`, `write_text` and `write_tensors` write beside the old file, which stays whole if the process is killed
(and its unfinished `NAME.*.partial` beside it). A directory, a pipe or a device is never replaced.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

MAX_HEADER = 16 * 2**20  # bytes of the header of a cache or a routing; 10,000 layers take 3 MB
MAX_VALUES = 20_000  # objects and lists in a small JSON file; with 16 times as many values it takes 20 MB
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
          stat.S_IFSOCK: "a socket"}  # fmt: skip


class UnreadableFile(ValueError):
    """A file that is missing, is not a regular file, is larger than allowed, or has contents that are refused.

    kind: two or three words for a table of problems.
    """

    def __init__(self, detail: str, kind: str = "unreadable file") -> None:
        super().__init__(detail)
        self.kind = kind


class UnwritableFile(ValueError):
    """A path that a new file must not take."""


# ----------------------------------------------------------------------------------------------------------- reading


def file_in(folder: Path, name: str) -> Path:
    """The path of the regular file `name` of the folder; UnreadableFile if there is none, or if it is outside.

    A symbolic link may point to a file of the folder or into the blobs of the Hub's cache (snapshots/REVISION/x ->
    ../../blobs/HASH), but nowhere else.
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnreadableFile("it must name a file inside the folder", "bad file name")
    path = folder / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop of links, before Python 3.13
        raise UnreadableFile("", "missing file") from None
    if not stat.S_ISREG(mode):
        raise UnreadableFile("", "not a file")
    home = folder.resolve()
    allowed = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(target.is_relative_to(root) for root in allowed):
        raise UnreadableFile(f"it is a link to {target}; copy the file into the folder", "outside the folder")
    return path


def read_limited(file: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; its size is compared before memory is taken.

    UnreadableFile for any other file: opening a pipe would wait forever, and a file may be larger than the memory.
    """
    size = _size_of(file)
    if size > limit:
        raise UnreadableFile(f"it has {size} bytes; at most {limit} are read")
    with _opened(file) as stream:
        content = stream.read(min(size, limit) + 1)
        if len(content) > size:
            content += stream.read(limit + 1 - len(content))
    if len(content) > limit:
        raise UnreadableFile(f"it grew beyond {limit} bytes while it was read")
    return content


def _size_of(file: Path) -> int:
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UnreadableFile(str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile("it is not a regular file")
    return status.st_size


def _opened(file: Path) -> IO[bytes]:
    """The open regular file. A pipe that took its place since it was checked is refused too, without waiting."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UnreadableFile(str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def parse_json(
    text: bytes, *, most: int = MAX_VALUES, repeated: Callable[[str], object] | None = None
) -> Any:
    """The value of a JSON text from outside, in time and memory linear in the text; else UnreadableFile.

    most: how many objects and how many pairs of lists there may be, and a sixteenth of the number of commas. They are counted
    before the text is parsed: a hundred megabytes of "[[],[],[]" would become gigabytes of lists. NaN, Infinity and numbers
    beyond the range of float64 are no JSON values. repeated: called for every key that an object has twice; without it, such
    a key is refused if its values differ, because JSON does not define which of the two counts.
    """
    if text.count(b"{") > most or text.count(b"[") > 2 * most or text.count(b",") > 16 * most:
        raise UnreadableFile(f"it has more than {most} objects, or too many lists or values", "too many values")

    strange: list[str] = []  # numbers that are not finite

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            _check_repeated(pairs, repeated)
        return values

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            strange.append(digits)
        return value

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=number, parse_float=number)
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, an integer of 4,301 digits
        raise UnreadableFile(str(error), "not JSON") from None
    if strange:
        raise UnreadableFile(f"{_key_of_strange(value)} = {strange[0][:60]} must be finite", "not JSON")
    return value


def _key_of_strange(value: Any) -> str:
    """The key of a number that is not finite."""
    waiting = [("a value", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return key
        if isinstance(value, dict):
            waiting += [(inner[:60], child) for inner, child in value.items()]
        elif isinstance(value, list):
            waiting += [(key, child) for child in value]
    return "a value"  # of a repeated key


def _check_repeated(pairs: list[tuple[str, Any]], repeated: Callable[[str], object] | None) -> None:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen and repeated is not None:
            repeated(key)
        elif key in seen and seen[key] != value:
            first, second = (repr(one)[:60] for one in (seen[key], value))
            raise UnreadableFile(f"{key[:60]!r} occurs twice, as {first} and as {second}", "key occurs twice")
        seen[key] = value


def read_object(file: Path, limit: int, most: int = MAX_VALUES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; UnreadableFile for any other file. See `parse_json`."""
    value = parse_json(read_limited(file, limit), most=most)
    if not isinstance(value, dict):
        raise UnreadableFile(f"it contains {_kind_of(value)}, not an object", "not a JSON object")
    return value


def _kind_of(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


@contextmanager
def open_tensors(
    path: str | os.PathLike[str], what: str, format: str, device: str = "cpu"
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Opens a safetensors file that this library wrote: yields the `safe_open` object and the metadata.

    what: "a saved cache", for messages; format: of the file's metadata. No tensor is read here: compare
    `file.get_slice(name).get_shape()` and `get_dtype()` with what they must be first. ValueError for any other file.
    """
    file = Path(checked_path(path)).expanduser()
    try:
        size = _size_of(file)
        with _opened(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size > available_memory():
                raise UnreadableFile(f"it has {size} bytes, more than the memory that is available")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                detail = f"{length} bytes of header in a file of {size} (at most {MAX_HEADER})"
                raise UnreadableFile(f"{detail}: the file is cut off, or not safetensors")
            header = parse_json(stream.read(length), repeated=_refuse_repeated)
    except UnreadableFile as error:
        raise UnreadableFile(f"{path} is not a safetensors file: {error}", error.kind) from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    stored_format = metadata.get("format") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or stored_format != format:
        raise UnreadableFile(f"{path} is not {what}: its format is {repr(stored_format)[:60]}, expected {format!r}")
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(os.fspath(file), framework="pt", device=device)
    except (SafetensorError, OSError) as error:  # it compares all sizes with the size of the file
        raise UnreadableFile(f"{path} is not a safetensors file: {error}") from None
    with opened as tensors:
        yield tensors, tensors.metadata() or {}


def available_memory() -> int:
    """Bytes that can be used without swapping, including the page cache."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**63


def _refuse_repeated(key: str) -> None:
    raise UnreadableFile(f"{key[:60]!r} occurs twice", "key occurs twice")


# ----------------------------------------------------------------------------------------------------------- writing


def checked_path(path: Any) -> str:
    """The text of a path; ValueError for an empty one (an unset variable), and for anything that is no path."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise ValueError(f"a path is a str or a pathlib.Path, not {type(path).__name__}")
    if not text.strip():
        raise ValueError(f"the path is empty ({text!r}): is a variable unset?")
    if "\0" in text:
        raise ValueError(f"the path {text[:60]!r} contains a NUL character")
    return text


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """The path for a new file, ~ expanded. UnwritableFile if what lies there must not be replaced.

    A regular file is replaced, and so is a link to one or to nothing, not the file behind it. Anything else stays: a
    directory, a pipe, a device, a socket, or a link to one of them (/dev/stdout).
    """
    text = checked_path(path)
    separators = tuple(separator for separator in (os.sep, os.altsep) if separator)
    target = Path(text).expanduser()
    try:
        kind = stat.S_IFMT(target.stat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG  # nothing is there, or a link to nothing
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder; make it first", str(target.parent)) from None
    if kind != stat.S_IFREG:
        raise UnwritableFile(f"{text} is {_KINDS.get(kind, 'no regular file')}: give the name of a regular file, or a new name")
    if text.endswith(separators):
        raise UnwritableFile(f"{text} is the name of a folder: give the name of a file")
    return target


def check_own(path: str | os.PathLike[str]) -> None:
    """UnwritableFile where a safetensors file lies at `path` that another kind of save has written, weights for example."""
    try:
        with file_to_write(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length)) if 0 < length <= MAX_HEADER else None
    except (FileNotFoundError, UnreadableFile):
        return
    metadata = header.get("__metadata__") if isinstance(header, dict) else {"format": "qwen35moe."}
    written = str(metadata.get("format", "")) if isinstance(metadata, dict) else ""
    if not written.startswith("qwen35moe."):
        raise UnwritableFile(f"{path} holds other tensors and is not replaced: give another name, or move the file away")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of an empty file beside `path`; when the block ends, it takes the place of `path`, on the disk.

    If the block raises, the old file stays as it is and the new one is removed. A link at `path` is replaced, not
    followed; see `file_to_write` for what is never replaced. The new file has the permissions of the old one, else of any
    new file of this process.
    """
    target = file_to_write(path)
    start = target.name if len(os.fsencode(target.name)) < 200 else "long-name"  # names have at most 255 bytes
    partial = target.with_name(f"{start}.{secrets.token_hex(8)}.partial")
    # The name is unpredictable and O_EXCL refuses a name that exists: nobody can place a link there.
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = mode_of(target)
    if mode is None:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)  # 0o666 less the umask
    os.close(descriptor)
    try:
        yield partial
        _sync(partial, os.O_RDWR)
        os.chmod(partial, mode)  # safetensors puts a file of its own in its place, which only the owner may read
        file_to_write(target)  # what lies there may have changed meanwhile
        os.replace(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(partial)
        raise
    sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text with `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def mode_of(file: Path) -> int | None:
    """The permissions of a regular file; None for anything else."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with `replacing`. Tensors on any device; those that share memory are written one by one."""
    from safetensors.torch import save_file

    file_to_write(path)
    _check_header(tensors, metadata)
    contents: dict[str, Any] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:  # which save_file refuses
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        contents[name] = value
    with replacing(path) as partial:
        save_file(contents, partial, metadata=dict(metadata))


def _check_header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """ValueError for metadata that `open_tensors` would refuse."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(f"metadata are strings, not {type(key).__name__}: {type(value).__name__}")
    entries = {name: {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [2**48, 2**48]} for name, t in tensors.items()}
    try:
        text = json.dumps({"__metadata__": dict(metadata), **entries}, ensure_ascii=False).encode()
        if len(text) > MAX_HEADER:
            raise UnreadableFile(f"they take {len(text)} bytes, at most {MAX_HEADER} are read again")
        parse_json(text)
    except (UnicodeEncodeError, UnreadableFile) as error:
        raise ValueError(f"these metadata cannot be saved: {error}") from None


def write_new(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file that does not exist yet; its contents are on the disk when this returns."""
    with file.open("xb", buffering=0) as stream:
        for piece in pieces:
            rest = memoryview(piece)
            while len(rest):
                rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names in a folder (new files, renames) to the disk, where the system can do that."""
    with suppress(OSError):
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
