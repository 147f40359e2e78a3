"""Reading untrusted files: checks and error messages shared by the tokenizer, image and video readers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..compat import short
from ..files import UnreadableFile, file_in, parse_json, read_limited

MAX_TEXT = 1 << 28  # bytes of a tokenizer.json; the published ones have 20 million
MAX_JSON = 1 << 24  # bytes of another JSON file
MAX_TOKENIZER_VALUES = 500_000  # see `parse_json`; the published tokenizer.json has 250,000 merges, each a list


def find_file(file: Path) -> Path | None:
    """The file, if its folder has one of this name. ValueError, which names it, for a link that leads out of the folder or for
    something else than a regular file."""
    if not os.path.lexists(file):
        return None
    try:
        return file_in(file.parent, file.name)
    except UnreadableFile as error:
        raise ValueError(f"{file}: {error.kind}{f': {error}' if str(error) else ''}") from None


def read_text(file: Path, limit: int = MAX_TEXT) -> str:
    """The text of a file of at most `limit` bytes. ValueError, which names the file, if it cannot be read."""
    path = find_file(file)
    if path is None:
        raise ValueError(f"{file}: no such file")
    try:
        return read_limited(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8: {error}") from error
    except UnreadableFile as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. ValueError if the file holds anything else."""
    path = find_file(file)
    if path is None:
        return {}
    try:
        values = parse_json(read_limited(path, MAX_JSON))
    except UnreadableFile as error:
        raise ValueError(f"{file} is not valid JSON: {str(error)[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold an object, got {type(values).__name__}")
    return values


def check_local_file(path: str | os.PathLike[str]) -> None:
    """ValueError for a URL or a file that does not exist."""
    text = os.fspath(path)
    if "://" in text[:40] or text.startswith("data:"):
        raise ValueError("URLs are not downloaded: pass the path of a local file")
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, or a NUL byte
        is_file = False
    if not is_file:
        raise ValueError("no such file")


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Raise ValueError for any exception of a decoder: on damaged files decoders raise exceptions of all types."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot be read: {text[:300]}") from error


@contextmanager
def item_errors(kind: str, index: int, item: Any) -> Iterator[None]:
    """Prefix a ValueError with the kind, the index and, if the item is a path, the path of the input that caused it."""
    try:
        yield
    except ValueError as error:
        path = f" ({shown_path(item)})" if isinstance(item, (str, os.PathLike)) else ""
        raise ValueError(f"{kind} {index}{path}: {error}") from error


def shown_path(item: Any) -> str:
    """A path for a message: shortened, and without the content of a data: address."""
    text = os.fspath(item)
    if isinstance(text, bytes):
        return short(text)
    return text if len(text) <= 200 and not text.startswith("data:") else text[:24] + " ..."


def template_source(folder: Path) -> str | None:
    """The text of the checkpoint's chat template: a file of its own, or a key of a JSON file in older checkpoints."""
    file = folder / "chat_template.jinja"
    if find_file(file):
        return read_text(file, MAX_JSON)
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = read_json(folder / name).get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}.get("default")
        if isinstance(source, str):
            return source
    return None
