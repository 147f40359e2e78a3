"""What a save may replace or delete in a folder: only files that are provably of the checkpoint that lies there.

    model.safetensors              replaced if its tensors have names of this architecture
    model.safetensors.index.json   replaced if it maps tensor names to file names
    shards                         deleted if such an index lists them, their names end with -00001-of-00003.safetensors, and
                                   they contain exactly the tensors that the index assigns to them
    config.json                    replaced if it describes a model of this family, or none beside such weights
    generation_config.json, ...    replaced beside such a checkpoint

Every other file stays. If the save would need its name, one CheckpointError lists all of them before anything is written. A
link is replaced (not the file behind it) where reading follows it: inside the folder and into the Hub's cache.

Files of a save that was killed are recognised by its journal, which has their inodes: see `Journal`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qwen35moe.config import ConfigError
from qwen35moe.config.keys import family
from qwen35moe.files import UnreadableFile, checked_path, file_in, parse_json, read_limited, read_object

from . import names
from .headers import INDEX, MAX_HEADER_BYTES, SINGLE, Header, read_contents, read_headers, read_index
from .problems import CheckpointError, Problem, shown

CONFIG = "config.json"
MAX_CONFIG = 16 * 2**20
SAVING = ".saving-"  # the directory of a save, inside the folder of the checkpoint
_MARK, _MOVES = ".of-qwen35moe", ".moves.json"
_SHARD = re.compile(r"^[\w.-]*-\d{5}-of-\d{5}\.safetensors$")

Identity = tuple[int, int, int]  # inode, size, time of the last change in ns: the same file, with the same contents


def folder_to_write(path: str | os.PathLike[str]) -> Path:
    """The folder for a checkpoint, ~ expanded. ValueError for an empty path; CheckpointError for a file, and for the current
    folder if a checkpoint lies there: an unset variable, Path(""), is the current folder too."""
    text = checked_path(path)
    folder = Path(text).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder for the checkpoint")
    if folder == Path() and any(os.path.lexists(name) for name in (CONFIG, SINGLE, INDEX)):
        raise CheckpointError(
            f"{text!r} is the current folder, which holds a checkpoint, and so is an unset variable: to replace that "
            f"checkpoint give the folder's name, {Path.cwd()}"
        )
    return folder


def identity_of(file: Path) -> Identity | None:
    """The identity of a regular file; None for anything else."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


@dataclass
class Present:
    """The checkpoint that lies in a folder. shards: its files that a save may delete; is_ours: whether its weights are of
    this architecture."""

    folder: Path
    header: Header
    shards: set[str] = field(default_factory=set)
    has_index: bool = False
    is_ours: bool = False

    @classmethod
    def of(cls, folder: Path) -> Present:
        """Reads the headers in a folder; damaged files are not of a checkpoint."""
        try:
            present = cls(folder, read_headers(folder, []))
        except CheckpointError:
            present = cls(folder, Header(folder))
        weight_map = read_index(folder, [])[0] if os.path.lexists(folder / INDEX) else {}
        listed: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            listed.setdefault(name, set()).add(tensor)
        present.has_index = any(map(names.canonical, weight_map))
        if present.has_index:
            present.shards = {name for name, tensors in listed.items() if _is_shard(folder, name, tensors)}
        known = any(map(names.canonical, present.header.tensors))
        present.is_ours = present.header.save_id is not None or known or present.has_index
        return present

    def check(self, written: Mapping[str, bytes | None]) -> None:
        """CheckpointError if the save needs the name of a file that is not provably of this checkpoint. written: the new
        files by name, with the contents of small ones."""
        problems = [
            Problem("not replaced", shown(name), reason)
            for name, content in written.items()
            if os.path.lexists(self.folder / name) and (reason := self._reason_to_keep(name, content))
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} has files that are not of a checkpoint of this family, and saving would replace them. Move "
                "them away, or save to another folder:",
                problems,
            )

    def _reason_to_keep(self, name: str, content: bytes | None) -> str:
        """Why a file that exists must not be replaced; "" if it may be."""
        try:
            file = file_in(self.folder, name)
        except UnreadableFile as error:
            return f"{error.kind}: {error}" if str(error) else "it is no regular file"
        if name == SINGLE:
            if read_contents(file, name, []) is None:
                return "its contents are no readable weights"
            return "" if self.is_ours else "its tensors have no names of this architecture"
        if name == INDEX:
            return "" if self.has_index else "it does not list tensors of this architecture"
        if name == CONFIG:
            return self._reason_to_keep_config(file)
        if self.is_ours or self._describes_a_model():
            return ""
        return "" if content is not None and _has_contents(file, content) else "there is no checkpoint beside it"

    def _reason_to_keep_config(self, file: Path) -> str:
        try:
            model_type = read_object(file, MAX_CONFIG).get("model_type")
        except UnreadableFile as error:
            return "" if self.is_ours else f"it is no configuration of a model: {error}"
        if model_type is None:
            return "" if self.is_ours else "it is no configuration of a model: it has no model_type"
        try:
            family(model_type)
        except ConfigError:
            return f"it describes a model of another family: model_type {shown(repr(model_type), 60)}"
        return ""

    def _describes_a_model(self) -> bool:
        try:
            return self._reason_to_keep_config(file_in(self.folder, CONFIG)) == ""
        except UnreadableFile:
            return False


def _is_shard(folder: Path, name: str, listed: set[str]) -> bool:
    """Whether a file that the index lists is provably its shard: by its name, and by the tensors in it."""
    if not _SHARD.match(name):
        return False
    try:
        contents = read_contents(file_in(folder, name), name, [])
    except (UnreadableFile, OSError):
        return False
    return contents is not None and {tensor.name for tensor in contents.tensors} | contents.wrong == listed


def _has_contents(file: Path, content: bytes) -> bool:
    """Whether a file has these bytes, or the same JSON in another form."""
    try:
        present = read_limited(file, 2 * len(content) + 1000)
        return present == content or (file.suffix == ".json" and parse_json(present) == parse_json(content))
    except (UnreadableFile, OSError):
        return False


# ----------------------------------------------------------------------------------------------------- killed saves


class Journal:
    """The directory of a save, `.saving-*`, and the list of files that the save puts into the folder or will delete there.

    The list has the identity of each file, so that the next save can remove what a killed one left, and nothing else. It is
    written before the first file is moved; the mark is written first of all and removed last.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def left_in(cls, folder: Path) -> list[Journal]:
        """Those of killed saves. Their other files, not yet moved, are removed here."""
        journals: list[Journal] = []
        for directory in sorted(folder.glob(f"{SAVING}*")):
            if directory.is_symlink() or not directory.is_dir():
                continue
            if identity_of(directory / _MARK) is None:  # killed before the mark was written, or not of a save
                with suppress(OSError):
                    directory.rmdir()
                continue
            journal = cls(directory)
            journal._remove_all_but(_MARK, _MOVES)
            journals.append(journal)
        return journals

    def begin(self) -> None:
        """Write the mark."""
        (self.directory / _MARK).write_text("Files of an unfinished save of qwen35moe: the next save here removes them.\n")

    def write(self, claims: Mapping[str, Identity]) -> None:
        """Write the list. It is not flushed to the disk: after a power failure some files may stay."""
        (self.directory / _MOVES).write_text(json.dumps(claims))

    def claims(self) -> dict[str, Identity]:
        """The list of a killed save; {} if it was killed before the list was whole."""
        try:
            listed = read_object(self.directory / _MOVES, MAX_HEADER_BYTES, most=10**6)
        except UnreadableFile:
            return {}
        return {
            name: (identity[0], identity[1], identity[2])
            for name, identity in listed.items()
            if os.path.basename(name) == name and isinstance(identity, list) and len(identity) == 3
        }

    def remove(self) -> None:
        """Remove the directory, the mark last. Directories inside it, which no save makes, stay."""
        self._remove_all_but(_MARK)
        with suppress(OSError):
            if all(entry.name == _MARK for entry in self.directory.iterdir()):
                os.unlink(self.directory / _MARK)
                os.rmdir(self.directory)

    def _remove_all_but(self, *kept: str) -> None:
        with suppress(OSError):
            for entry in sorted(self.directory.iterdir()):
                if entry.name not in kept and (entry.is_symlink() or not entry.is_dir()):
                    with suppress(OSError):
                        os.unlink(entry)


def delete(folder: Path, claims: Mapping[str, Identity | None], keep: Iterable[str]) -> None:
    """Delete files of a folder by name; one with another identity stays. None: a link of the old checkpoint."""
    kept = set(keep)
    for name, identity in sorted(claims.items()):
        file = folder / name
        same = file.is_symlink() if identity is None else identity_of(file) == identity
        if name not in kept and same:
            with suppress(OSError):
                os.unlink(file)
