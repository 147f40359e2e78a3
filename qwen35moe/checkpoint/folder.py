"""A checkpoint's folder, and how a new checkpoint takes the place of an old one in it.

Whoever reads the folder finds the old checkpoint or the new one, whole, wherever the writer was killed:

1. everything is written to files nobody looks at and flushed to the disk: shards under names that are free, the rest in
   a directory `.saving-*` inside the folder, the new config.json as `config.json.ID`;
2. one system call makes the new weights the checkpoint and says ID in their metadata. Which call, depends on the two
   forms, because `model.safetensors` counts before an index does (here and in transformers):

       old \\ new       one file                                shards
       none, shards    rename to model.safetensors             rename to model.safetensors.index.json
       one file        rename to model.safetensors             rename the index (unseen), then unlink model.safetensors

3. config.json.ID is renamed to config.json. Until then `config_file` answers with it, since the weights name ID;
4. weight files that the old checkpoint had and the new one has not are deleted. Any other file stays.

Other programs do not know `config.json.ID`: for them a kill between 2 and 3, two renames in a row, is the one moment
at which a changed config.json does not belong to the weights.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .headers import INDEX, SINGLE, Header, locate, read_headers, read_index
from .problems import CheckpointError, Problem

log = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_SAVING = ".saving-"
_ID = re.compile(r"^[0-9a-f]{16}$")
_PENDING = re.compile(r"^config\.json\.[0-9a-f]{16}$")
_OWN_SHARD = re.compile(r"^model(-\d+)?-\d{5}-of-\d{5}\.safetensors$")


def config_file(header: Header) -> Path:
    """The config.json that belongs to the weights: after an interrupted save it still waits under its other name."""
    if header.save_id is not None and _ID.match(header.save_id):
        pending = header.folder / f"{CONFIG}.{header.save_id}"
        if pending.is_file() and not pending.is_symlink():
            log.warning("%s: a save was interrupted; its configuration is %s", header.folder, pending.name)
            return pending
    return header.folder / CONFIG


class Replacement:
    """A new checkpoint for a folder: `write` its files, then `commit`. Without that the old one stays."""

    def __init__(self, folder: Path, config: bytes) -> None:
        self.folder = folder
        self.config = config
        problems: list[Problem] = []
        try:
            self.old = read_headers(folder, problems)
        except CheckpointError:
            self.old = Header(folder)
        self.old_files = {os.path.relpath(file, folder) for file in self.old.files}
        if os.path.lexists(folder / INDEX):  # beside a model.safetensors it is left over, its files too
            named = read_index(folder, problems)[0].values()
            self.old_files |= {name for name in named if locate(folder, name, problems)}
        self.save_id = self._new_id()
        self.directory = Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder))
        self.moved: list[Path] = []  # in the folder already, not yet part of a checkpoint
        self.committed = False

    def _new_id(self) -> str:
        """A digest of the configuration; not the one the old weights name, whose config.json may be another by now."""
        digest = hashlib.sha256(self.config)
        while (found := digest.hexdigest()[:16]) == self.old.save_id:
            digest.update(b"again")
        return found

    def shard_names(self, count: int) -> list[str]:
        """Names for `count` files: model.safetensors for one, otherwise model-00001-of-00003.safetensors and so on.

        Where one of these is taken, all get a number: model-2-00001-of-00003.safetensors.
        """
        if count == 1:
            return [SINGLE]
        names, version = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)], 1
        while any(os.path.lexists(self.folder / name) for name in names):
            version += 1
            names = [f"model-{version}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return names

    def write(self, name: str, pieces: Iterator[bytes | memoryview]) -> None:
        """A new file, on the disk when this returns."""
        with (self.directory / name).open("xb", buffering=0) as f:
            for piece in pieces:
                rest = memoryview(piece)
                while len(rest):
                    rest = rest[f.write(rest) :]
            os.fsync(f.fileno())

    def commit(self, names: Sequence[str], index: bytes | None, others: Mapping[str, bytes]) -> None:
        """Make the written weight files `names` the checkpoint; `others` are small files beside them."""
        pending = self.folder / f"{CONFIG}.{self.save_id}"
        for name, content in {pending.name: self.config, **others}.items():
            self.write(name, iter([content]))
        if index is not None:
            self.write(INDEX, iter([index]))
            for name in names:
                self._place(name)
        self._place(pending.name)
        sync_directory(self.folder)

        self.committed = True  # before the call: should it be interrupted right after, the new files must stay
        if index is None:
            os.replace(self.directory / SINGLE, self.folder / SINGLE)
        else:
            os.replace(self.directory / INDEX, self.folder / INDEX)
            sync_directory(self.folder)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / SINGLE)
        sync_directory(self.folder)

        os.replace(pending, self.folder / CONFIG)
        for name in others:
            os.replace(self.directory / name, self.folder / name)
        self._delete_old(set(names), keep_index=index is not None)
        sync_directory(self.folder)

    def _place(self, name: str) -> None:
        os.rename(self.directory / name, self.folder / name)
        self.moved.append(self.folder / name)

    def _delete_old(self, new: set[str], keep_index: bool) -> None:
        """Weight files of the old checkpoint, and what interrupted saves of this library left."""
        if not keep_index:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / INDEX)
        here = os.listdir(self.folder)
        old = self.old_files | {name for name in here if _OWN_SHARD.match(name) or _PENDING.match(name)}
        for name in sorted(old - new):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)

    def abandon(self) -> None:
        """Remove what was written and is no part of a checkpoint."""
        if not self.committed:
            for file in self.moved:
                with contextlib.suppress(OSError):
                    file.unlink()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], config: bytes, nbytes: int) -> Iterator[Replacement]:
    """A Replacement for the folder `path`, which is made if need be; nobody else may save there meanwhile.

    OSError when the disk has no `nbytes` bytes left, before anything is written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as alone:
        if alone:
            for left in folder.glob(f"{_SAVING}*"):  # of saves that were killed: their locks are gone
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            detail = f"{nbytes} bytes are needed beside the old files, {free} are free"
            raise OSError(errno.ENOSPC, detail, str(folder))
        replacement = Replacement(folder, config)
        try:
            yield replacement
        finally:
            replacement.abandon()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process. False where the system or the filesystem has no locks."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = _try_lock(fcntl, descriptor, folder)
        yield alone
    finally:
        os.close(descriptor)


def _try_lock(fcntl: Any, descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another save into {folder} is running") from None
    except OSError:
        return False
    return True


def sync_directory(folder: Path) -> None:
    """Bring renames to the disk, where directories can be flushed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
