"""Files from outside are read up to a limit; new files replace old ones in one step.

A process that is killed while it writes leaves the old file whole (and its unfinished `NAME.*.partial` beside it).
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UnreadableFile(ValueError):
    """A file that is missing, is not a regular file, or is larger than allowed."""


def read_limited(file: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; its size is compared before memory is taken.

    UnreadableFile for any other file: opening a pipe would wait forever, and a file may be larger than the memory.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UnreadableFile(str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile("it is not a regular file")
    if status.st_size > limit:
        raise UnreadableFile(f"it has {status.st_size} bytes; at most {limit} are read")
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise UnreadableFile(f"it grew beyond {limit} bytes while it was read")
    return content


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of an empty file beside `path`; when the block ends, it takes the place of `path`, on the disk.

    If the block raises, the old file stays as it is and the new one is removed. A link at `path` is replaced, not
    followed. The new file has the permissions of any new file of this process.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
    # The name is unpredictable and O_EXCL refuses a name that exists: nobody can place a link there.
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)  # 0o666 less the umask
    os.close(descriptor)
    try:
        yield partial
        os.chmod(partial, mode)  # safetensors puts a file of its own in its place, which nobody else may read
        _sync(partial, os.O_RDWR)
        os.replace(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(partial)
        raise
    sync_folder(target.parent)


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
