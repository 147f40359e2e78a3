"""A checkpoint's files from the Hugging Face Hub: those that are needed, from the local cache where it has them all.

    folder = fetch("Qwen/Qwen3.5-35B-A3B", revision="a commit, a tag or a branch")

What is cached is used without asking anybody, so a second start needs no network; a branch is then as new as it was when
it was fetched, and a commit as `revision` says exactly what is meant. What is not cached is downloaded by
huggingface_hub (extra `[hub]`), whose settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. All files come from
one commit. Nothing that could be code is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .folder import CONFIG, GENERATION_CONFIG
from .headers import INDEX, SINGLE, read_index
from .problems import CheckpointError, Problem, shown

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"[\w.-]+(/[\w.-]+)*\.safetensors")
_AT_ONCE = 4  # downloads side by side: one connection rarely fills a line

Get = Callable[[str], "Path | None"]
Wanted = Callable[[str], bool]


def folder_of(
    path: str | os.PathLike[str], *, revision: str | None = None, wanted: Wanted | None = None,
    required: Sequence[str] = (), optional: Sequence[str] = (),
) -> Path:
    """The folder `path`, or where there is none and it reads owner/name, what `fetch` makes of it."""
    folder = Path(path).expanduser()
    if revision is None and (folder.exists() or not _NAME.fullmatch(str(path))):
        return folder
    if revision is not None and (folder.exists() or not _NAME.fullmatch(str(path))):
        raise CheckpointError(f"revision={revision!r} is for names on the Hub (owner/name), {path} is none: leave it out")
    return fetch(str(path), revision=revision, wanted=wanted, required=required, optional=optional)


def fetch(
    name: str, *, revision: str | None = None, wanted: Wanted | None = None, required: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Path:
    """The folder in the local cache that holds config.json, the weights, the `required` files, and of the `optional`
    ones those that exist. wanted(tensor name): whether a tensor is needed; shards without any are left where they are.

    CheckpointError when something that is needed is neither cached nor to be had.
    """
    hub = _library(name)
    try:
        cached = _collect(lambda file: _cached(hub, name, file, revision), wanted, required, optional)
        return cached or _download(hub, name, revision, wanted, required, optional)
    except CheckpointError:
        raise
    except Exception as error:  # the library's errors have no common base short of Exception
        why = " ".join(str(error).split())[:400] or type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(f"there is no folder {name}, and {name}{at} cannot be fetched from the Hub: {why}") from error


def _library(name: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise CheckpointError(
            f"there is no folder {name}, and a Hub name needs the package huggingface_hub: pip install 'qwen35moe[hub]'"
        ) from None
    return huggingface_hub


def _collect(get: Get, wanted: Wanted | None, required: Sequence[str], optional: Sequence[str]) -> Path | None:
    """Gets every file; the folder they are in, or None as soon as one that is needed is not to be had."""
    config = get(CONFIG)
    if config is None or any(get(file) is None for file in required):
        return None
    files = [SINGLE] if get(INDEX) is None else _shards(config.parent, wanted)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        if any(found is None for found in pool.map(get, files)):
            return None
    for file in (GENERATION_CONFIG, *optional):
        get(file)
    return config.parent


def _shards(folder: Path, wanted: Wanted | None) -> list[str]:
    """The files that hold the tensors which are wanted."""
    problems: list[Problem] = []
    weight_map, _ = read_index(folder, problems)
    files = sorted({file for tensor, file in weight_map.items() if wanted is None or wanted(tensor)})
    strange = [file for file in files if not _SHARD.fullmatch(file) or ".." in file.split("/")]
    problems += [Problem("bad file name", shown(file), "it is no .safetensors file of the repository") for file in strange]
    if problems:
        raise CheckpointError(f"{folder} has an index that cannot be used:", problems)
    return files


def _cached(hub: Any, name: str, file: str, revision: str | None) -> Path | None:
    found = hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _download(
    hub: Any, name: str, revision: str | None, wanted: Wanted | None, required: Sequence[str], optional: Sequence[str]
) -> Path:
    from huggingface_hub import errors

    commit = revision

    def get(file: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(name, file, revision=commit))
        except errors.LocalEntryNotFoundError:
            raise  # it says that nobody could be asked, though it counts as one of the next kind
        except errors.EntryNotFoundError:
            return None

    config = get(CONFIG)
    if config is None:
        raise CheckpointError(f"{name} on the Hub has no {CONFIG}: is it a model of this family?")
    commit = config.parent.name  # the snapshot's folder is named by its commit: a branch may move meanwhile
    found = _collect(get, wanted, required, optional)
    if found is None:
        missing = [file for file in (*required, SINGLE) if get(file) is None]
        raise CheckpointError(f"{name} on the Hub (commit {commit}) lacks {', '.join(missing)}, and has no {INDEX} either")
    return found
