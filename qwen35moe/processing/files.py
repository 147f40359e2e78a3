"""Reading untrusted files: checks and error messages shared by the tokenizer, image and video readers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. ValueError if the file holds anything else."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold an object, got {type(values).__name__}")
    return values


def check_local_file(path: str | os.PathLike[str]) -> None:
    """ValueError for a URL or a file that does not exist."""
    if str(path).startswith(("http://", "https://", "data:")):
        raise ValueError("URLs are not downloaded: pass the path of a local file")
    if not Path(path).is_file():
        raise ValueError("no such file")


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Raise ValueError for any exception of a decoder: on damaged files decoders raise exceptions of all types."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot be read: {text}") from error


@contextmanager
def item_errors(kind: str, index: int, item: Any) -> Iterator[None]:
    """Prefix a ValueError with the kind, the index and, if the item is a path, the path of the input that caused it."""
    try:
        yield
    except ValueError as error:
        path = f" ({os.fspath(item)})" if isinstance(item, (str, os.PathLike)) else ""
        raise ValueError(f"{kind} {index}{path}: {error}") from error
