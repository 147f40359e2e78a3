"""Figures without a window, written like every other file. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .files import checked_path, file_to_write, replacing


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure, sizes in inches; ValueError with the install command where matplotlib is missing."""
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("a plot needs matplotlib: pip install 'qwen35moe[plot]'") from None
    return figure.Figure(figsize=(width, height), layout="constrained")


def figure_path(path: str | os.PathLike[str]) -> Path:
    """The file that `save_figure` writes: `path`, with the extension .png if it has none.

    Call it before long work: ValueError or FileNotFoundError if matplotlib is missing or has no such format, or if the file
    cannot be written (see `files.file_to_write`).
    """
    target, formats = file_to_write(path), new_figure(1, 1).canvas.get_supported_filetypes()
    if not target.suffix.strip("."):
        target = file_to_write(f"{checked_path(path).rstrip('.')}.png")
    if target.suffix[1:].lower() not in formats:
        raise ValueError(f"{path}: matplotlib has no format {target.suffix[1:][:20]!r}, only {', '.join(sorted(formats))}")
    return target


def save_figure(figure: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes a figure with `files.replacing`, in the format of the path's extension. options: of Figure.savefig (dpi, ...)."""
    target = figure_path(path)
    with replacing(target) as partial:
        figure.savefig(partial, format=target.suffix[1:].lower(), **options)
