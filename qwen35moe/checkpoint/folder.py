"""Replaces the checkpoint in a folder by a new one in one step.

A reader of the folder finds the old checkpoint or the new one, whole, even if the writer is killed at any moment:

1. every file is written under a name that no reader uses and flushed to the disk: shards under free names, the rest in a
   directory `.saving-*` inside the folder, the new config.json as `config.json.ID`;
2. one system call makes the new weights, whose metadata contain ID, the checkpoint. The call depends on the forms of both,
   because `model.safetensors` takes precedence over an index (here and in transformers):

       old \\ new       one file                                shards
       none, shards    rename to model.safetensors             rename to model.safetensors.index.json
       one file        rename to model.safetensors             rename the index (unseen), then unlink model.safetensors

3. config.json.ID is renamed to config.json. Until then `config_file` returns it, because the weights contain ID;
4. weight files of the old checkpoint that are not in the new one are deleted. Any other file stays.

Other programs do not use `config.json.ID`: for them a kill between 2 and 3, two renames in a row, leaves a config.json
that does not belong to the weights.
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

from qwen35moe.files import sync_folder, write_new

from .headers import INDEX, SINGLE, Header, locate, read_headers, read_index
from .problems import CheckpointError, Problem

log = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_SAVING = ".saving-"
_ID = re.compile(r"^[0-9a-f]{16}$")
_PENDING = re.compile(r"^config\.json\.[0-9a-f]{16}$")
_OWN_SHARD = re.compile(r"^model(-\d+)?-\d{5}-of-\d{5}\.safetensors$")


def config_file(header: Header) -> Path:
    """The config.json that belongs to the weights: after an interrupted save it still has its other name."""
    if header.save_id is not None and _ID.match(header.save_id):
        pending = header.folder / f"{CONFIG}.{header.save_id}"
        if pending.is_file() and not pending.is_symlink():
            log.warning("%s: a save was interrupted; reading its configuration from %s", header.folder, pending.name)
            return pending
    return header.folder / CONFIG


class Replacement:
    """A new checkpoint for a folder: `write` its files, then `commit`. Without `commit` the old one stays."""

    def __init__(self, folder: Path, config: bytes) -> None:
        self.folder = folder
        self.config = config
        problems: list[Problem] = []
        try:
            self.old = read_headers(folder, problems)
        except CheckpointError:
            self.old = Header(folder)
        self.old_files = {os.path.relpath(file, folder) for file in self.old.files}
        if os.path.lexists(folder / INDEX):  # beside model.safetensors the index and its files are left over
            indexed = read_index(folder, problems)[0].values()
            self.old_files |= {name for name in indexed if locate(folder, name, problems)}
        self.save_id = self._new_id()
        self.directory = Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder))
        self.moved: list[Path] = []  # already in the folder, not yet part of a checkpoint
        self.committed = False

    def _new_id(self) -> str:
        """A digest of the configuration that differs from the id of the old weights, whose config.json may have changed."""
        digest = hashlib.sha256(self.config)
        while (save_id := digest.hexdigest()[:16]) == self.old.save_id:
            digest.update(b"again")
        return save_id

    def shard_names(self, count: int) -> list[str]:
        """Names for `count` files: model.safetensors for one, otherwise model-00001-of-00003.safetensors and so on.

        If one of these exists, all get a number: model-2-00001-of-00003.safetensors.
        """
        if count == 1:
            return [SINGLE]
        names, version = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)], 1
        while any(os.path.lexists(self.folder / name) for name in names):
            version += 1
            names = [f"model-{version}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return names

    def write(self, name: str, pieces: Iterator[bytes | memoryview]) -> None:
        """Write a new file; it is on the disk when this returns."""
        write_new(self.directory / name, pieces)

    def commit(self, names: Sequence[str], index: bytes | None, others: Mapping[str, bytes]) -> None:
        """Make the written weight files `names` the checkpoint; `others` are small files beside the weights."""
        pending = self.folder / f"{CONFIG}.{self.save_id}"
        for name, content in {pending.name: self.config, **others}.items():
            self.write(name, iter([content]))
        if index is not None:
            self.write(INDEX, iter([index]))
            for name in names:
                self._place(name)
        self._place(pending.name)
        sync_folder(self.folder)

        self.committed = True  # before the call: if it is interrupted right after, the new files must stay
        if index is None:
            os.replace(self.directory / SINGLE, self.folder / SINGLE)
        else:
            os.replace(self.directory / INDEX, self.folder / INDEX)
            sync_folder(self.folder)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / SINGLE)
        sync_folder(self.folder)

        os.replace(pending, self.folder / CONFIG)
        for name in others:
            os.replace(self.directory / name, self.folder / name)
        self._delete_old(set(names), keep_index=index is not None)
        sync_folder(self.folder)

    def _place(self, name: str) -> None:
        os.rename(self.directory / name, self.folder / name)
        self.moved.append(self.folder / name)

    def _delete_old(self, new: set[str], keep_index: bool) -> None:
        """Delete weight files of the old checkpoint, and files that interrupted saves of this library left."""
        if not keep_index:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / INDEX)
        present = os.listdir(self.folder)
        old = self.old_files | {name for name in present if _OWN_SHARD.match(name) or _PENDING.match(name)}
        for name in sorted(old - new):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)

    def abandon(self) -> None:
        """Remove written files that are not part of a checkpoint."""
        if not self.committed:
            for file in self.moved:
                with contextlib.suppress(OSError):
                    file.unlink()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], config: bytes, nbytes: int) -> Iterator[Replacement]:
    """A Replacement for the folder `path`, which is created if it does not exist and locked against other saves.

    OSError if the disk has fewer than `nbytes` bytes free, before anything is written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder for the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as alone:
        if alone:
            for leftover in folder.glob(f"{_SAVING}*"):  # of killed saves: a process loses its lock when it ends
                shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            detail = f"saving needs {nbytes} bytes beside the old files, {free} are free"
            raise OSError(errno.ENOSPC, detail, str(folder))
        replacement = Replacement(folder, config)
        try:
            yield replacement
        finally:
            replacement.abandon()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process. False if the system or the filesystem has no locks."""
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
        raise CheckpointError(f"another save into {folder} is running: wait for it, or save elsewhere") from None
    except OSError:
        return False
    return True
