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
4. weight files of the old checkpoint that are not in the new one are deleted, and what killed saves left. Any other file
   stays: see ownership.py.

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

from qwen35moe.config import Config
from qwen35moe.files import mode_of, sync_folder, write_new

from .headers import INDEX, SINGLE, Header, locate
from .ownership import CONFIG, SAVING, Identity, Journal, Present, delete, folder_to_write, identity_of
from .problems import CheckpointError, Problem

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
MAX_SETTINGS_BYTES = 2**20  # of a generation_config.json; published ones have 202 bytes
_ID = re.compile(r"^[0-9a-f]{16}$")


def config_file(header: Header) -> Path:
    """The config.json that belongs to the weights: after an interrupted save it still has its other name."""
    if header.save_id is not None and _ID.match(header.save_id):
        pending = header.folder / f"{CONFIG}.{header.save_id}"
        if pending.is_file() and not pending.is_symlink():
            log.warning("%s: a save was interrupted; reading its configuration from %s", header.folder, pending.name)
            return pending
    return header.folder / CONFIG


def config_of(header: Header) -> Config:
    """The configuration of a checkpoint; CheckpointError if its file is missing or outside the folder."""
    problems: list[Problem] = []
    file = locate(header.folder, config_file(header).name, problems)
    if file is None:
        raise CheckpointError(f"{header.folder} has no readable configuration; add it or pass config=...:", problems)
    return Config.from_pretrained(file)


class Replacement:
    """A new checkpoint for a folder: `write` its files, then `commit`. Without `commit` the old one stays."""

    def __init__(self, folder: Path, config: bytes, count: int, others: Mapping[str, bytes], alone: bool) -> None:
        self.folder = folder
        self.config, self.others = config, others
        self.old = Present.of(folder)
        self.names = self._shard_names(count)
        written: dict[str, bytes | None] = {SINGLE: None, CONFIG: None} | dict(others)
        if count > 1:
            written[INDEX] = None
        self.old.check(written)  # also model.safetensors, which shards replace too
        self.save_id = self._new_id()
        self.killed = Journal.left_in(folder) if alone else []  # alone: a process loses its lock when it ends
        self.directory = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
        self.journal = Journal(self.directory)
        self.journal.begin()
        self.claims: dict[str, Identity | None] = {}  # what step 4 deletes
        self.placed: dict[str, Identity | None] = {}  # already in the folder
        self.new: Identity | None = None  # the file whose renaming commits the save
        self.finished = False

    def _new_id(self) -> str:
        """A digest of the configuration that differs from the id of the old weights, whose config.json may have changed."""
        digest = hashlib.sha256(self.config)
        while (save_id := digest.hexdigest()[:16]) == self.old.header.save_id:
            digest.update(b"again")
        return save_id

    def _shard_names(self, count: int) -> list[str]:
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

    def commit(self, index: bytes | None) -> None:
        """Make the written weight files `names` the checkpoint."""
        pending = f"{CONFIG}.{self.save_id}"
        for name, content in {pending: self.config, **self.others}.items():
            self.write(name, iter([content]))
        if index is not None:
            self.write(INDEX, iter([index]))
        self._keep_permissions(pending)
        moved = [*(self.names if index is not None else []), pending]
        self._write_journal(moved)
        for name in moved:
            self.placed[name] = identity_of(self.directory / name)  # before the call: it may be interrupted right after
            os.rename(self.directory / name, self.folder / name)
        sync_folder(self.folder)

        weights = SINGLE if index is None else INDEX
        self.new = identity_of(self.directory / weights)
        os.replace(self.directory / weights, self.folder / weights)
        if index is not None:
            sync_folder(self.folder)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / SINGLE)
        sync_folder(self.folder)

        os.replace(self.folder / pending, self.folder / CONFIG)
        for name in self.others:
            os.replace(self.directory / name, self.folder / name)
        if index is None and self.old.has_index:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / INDEX)
        delete(self.folder, self.claims, keep=[*self.names, CONFIG])
        sync_folder(self.folder)
        self.finished = True

    def _keep_permissions(self, pending: str) -> None:
        """New files get the permissions of those that they replace; shards those of the old weights."""
        old = [self.folder / name for name in (SINGLE, *sorted(self.old.shards))]
        weights = next((mode for file in old if (mode := mode_of(file)) is not None), None)
        modes = dict.fromkeys(self.names, weights) | {pending: mode_of(self.folder / CONFIG)}
        for name in (INDEX, *self.others):
            modes[name] = mode_of(self.folder / name)
        for name, mode in modes.items():
            if mode is not None and (self.directory / name).exists():
                os.chmod(self.directory / name, mode)

    def _write_journal(self, moved: Sequence[str]) -> None:
        """List what this save puts into the folder or deletes there, and what earlier ones left."""
        for journal in self.killed:
            self.claims |= journal.claims()
        self.claims |= {name: identity_of(self.folder / name) for name in self.old.shards}
        own = {name: identity_of(self.directory / name) for name in moved}
        self.journal.write({name: identity for name, identity in (self.claims | own).items() if identity is not None})
        for journal in self.killed:
            journal.remove()

    @property
    def is_committed(self) -> bool:
        """Whether the new weights are the checkpoint: the call that commits may have been interrupted."""
        return self.new is not None and self.new in (identity_of(self.folder / SINGLE), identity_of(self.folder / INDEX))

    def abandon(self) -> None:
        """Remove written files that are not part of a checkpoint. What an interrupted commit left is removed by the next
        save: the journal stays."""
        if self.finished or not self.is_committed:
            if not self.finished:
                delete(self.folder, self.placed, keep=())
            self.journal.remove()


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], config: bytes, nbytes: int, count: int = 1, others: Mapping[str, bytes] | None = None
) -> Iterator[Replacement]:
    """A Replacement for the folder `path`, which is created if it does not exist and locked against other saves.

    config: the text of config.json; count: of weight files; others: small files beside the weights. Before anything is
    written, CheckpointError if the folder has files with these names that are not a checkpoint's (ownership.py), and OSError
    if the disk has fewer than `nbytes` bytes free. A folder that was created is removed again if saving fails.
    """
    folder = folder_to_write(path)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    finished = False
    try:
        with _locked(folder) as alone:
            free = shutil.disk_usage(folder).free
            if free < nbytes:
                detail = f"saving needs {nbytes} bytes beside the old files, {free} are free"
                raise OSError(errno.ENOSPC, detail, str(folder))
            replacement = Replacement(folder, config, count, others or {}, alone)
            try:
                yield replacement
            finally:
                replacement.abandon()
        finished = True
    finally:
        for parent in [] if finished else created:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


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
