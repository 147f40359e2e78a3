"""The needed files of a checkpoint on the Hugging Face Hub, from the local cache if it has all of them.

    folder = fetch("Qwen/Qwen3.5-35B-A3B", revision="a commit, a tag or a branch")

Cached files are used without a request, so a second start needs no network; a branch is then as it was when it was
fetched, and a commit as `revision` is exact. Other files are downloaded by huggingface_hub (extra `[hub]`) with its own
settings: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. All files come from one commit. Files that may contain code are
never requested.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import CONFIG, GENERATION_CONFIG
from .headers import INDEX, SINGLE, read_index
from .problems import CheckpointError, Problem, shown

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TINY = "tiny"  # the name of the bundled checkpoint
BUNDLED = Path(__file__).parents[1] / "assets" / "tiny"
_SHARD = re.compile(r"[\w.-]+(/[\w.-]+)*\.safetensors")
_AT_ONCE = 4  # parallel downloads: one connection rarely uses the whole bandwidth

Get = Callable[[str], "Path | None"]
Wanted = Callable[[str], bool]


def no_weights(name: str) -> bool:
    """As `wanted`: not even the single file is fetched."""
    return False


@dataclass(frozen=True)
class HubOptions:
    """Arguments of huggingface_hub with transformers' names; the defaults leave them to its own settings."""

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False


DEFAULTS = HubOptions()


def folder_of(
    path: str | os.PathLike[str], *, revision: str | None = None, wanted: Wanted | None = None,
    required: Sequence[str] = (), optional: Sequence[str] = (), options: HubOptions = DEFAULTS,
    subfolder: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder `path` (of it, `subfolder`); if it does not exist and `path` has the form owner/name, the folder that `fetch`
    returns. "tiny" is the checkpoint bundled with the library, unless there is a folder of this name.

    `options` have no effect on a folder, as in transformers.
    """
    if path == TINY and not Path(TINY).is_dir():
        return BUNDLED
    folder = Path(path).expanduser()
    if folder.exists() or not _NAME.fullmatch(str(path)):
        if revision in (None, "main"):  # transformers' default
            return _inside(folder, subfolder)
        raise CheckpointError(f"revision={revision!r} needs a name on the Hub (owner/name), not {path}: omit revision")
    if subfolder not in (None, "", "."):
        raise CheckpointError(
            f"subfolder={shown(str(subfolder))} of {path} on the Hub is not supported: download the repository with "
            "huggingface_hub.snapshot_download and give that folder"
        )
    return fetch(str(path), revision=revision, wanted=wanted, required=required, optional=optional, options=options)


def _inside(folder: Path, subfolder: str | os.PathLike[str] | None) -> Path:
    if subfolder is None:
        return folder
    inner = Path(subfolder)
    if inner.is_absolute() or ".." in inner.parts:
        raise CheckpointError(f"subfolder={shown(str(subfolder))} must be a path inside {folder}")
    return folder / inner


def fetch(
    name: str, *, revision: str | None = None, wanted: Wanted | None = None, required: Sequence[str] = (),
    optional: Sequence[str] = (), options: HubOptions = DEFAULTS,
) -> Path:
    """The folder in the local cache with config.json, the weights, the `required` files, and those of the `optional` files
    that exist. wanted(tensor name): whether a tensor is needed; shards without a needed tensor are not downloaded.

    CheckpointError if a needed file is neither cached nor available.
    """
    hub = _library(name)
    try:
        cached = None
        if not options.force_download:
            cached = _collect(lambda file: _cached(hub, name, file, revision, options), wanted, required, optional)
        return cached or _download(hub, name, revision, wanted, required, optional, options)
    except CheckpointError:
        raise
    except Exception as error:  # the common base of the library's errors is Exception
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(f"there is no folder {name}, and {name}{at} cannot be fetched from the Hub: {reason}") from error


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
    """Get every file and return their folder; None as soon as a needed file is not available."""
    config = get(CONFIG)
    if config is None or any(get(file) is None for file in required):
        return None
    files = []
    if wanted is not no_weights:
        files = [SINGLE] if get(INDEX) is None else _shards(config.parent, wanted)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        if any(path is None for path in pool.map(get, files)):
            return None
    for file in (GENERATION_CONFIG, *optional):
        get(file)
    return config.parent


def _shards(folder: Path, wanted: Wanted | None) -> list[str]:
    """The files that contain the wanted tensors."""
    problems: list[Problem] = []
    weight_map, _ = read_index(folder, problems)
    files = sorted({file for tensor, file in weight_map.items() if wanted is None or wanted(tensor)})
    invalid = [file for file in files if not _SHARD.fullmatch(file) or ".." in file.split("/")]
    detail = "it must name a .safetensors file of the repository"
    problems += [Problem("bad file name", shown(file), detail) for file in invalid]
    if problems:
        raise CheckpointError(f"{folder} has an invalid index:", problems)
    return files


def _cached(hub: Any, name: str, file: str, revision: str | None, options: HubOptions) -> Path | None:
    path = hub.try_to_load_from_cache(name, file, revision=revision, cache_dir=options.cache_dir)
    return Path(path) if isinstance(path, str) else None


def _download(
    hub: Any, name: str, revision: str | None, wanted: Wanted | None, required: Sequence[str], optional: Sequence[str],
    options: HubOptions,
) -> Path:
    from huggingface_hub import errors

    commit = revision

    def get(file: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(name, file, revision=commit, **vars(options)))
        except errors.LocalEntryNotFoundError:
            raise  # the Hub could not be reached, although this is a subclass of the next error
        except errors.EntryNotFoundError:
            return None

    config = get(CONFIG)
    if config is None:
        raise CheckpointError(f"{name} on the Hub has no {CONFIG}; choose a repository with a model of this family")
    commit = config.parent.name  # the snapshot folder is named after its commit; the branch may move meanwhile
    folder = _collect(get, wanted, required, optional)
    if folder is None:
        missing = [file for file in (*required, SINGLE) if get(file) is None]
        raise CheckpointError(f"{name} on the Hub (commit {commit}) lacks {', '.join(missing)}, and has no {INDEX} either")
    return folder
