"""Figures replace regular files only, in one step, in the format of their name."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from qwen35moe.figures import figure_path, new_figure, save_figure
from qwen35moe.files import UnwritableFile

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plot)")


@pytest.fixture
def figure() -> Any:
    drawn = new_figure(1, 1)
    drawn.add_subplot().plot([1, 3, 2])
    return drawn


@pytest.mark.parametrize(("name", "written", "start"), [
    ("a.png", "a.png", b"\x89PNG"), ("b.SVG", "b.SVG", b"<?xml"), ("c.pdf", "c.pdf", b"%PDF"), ("d", "d.png", b"\x89PNG"),
    ("e.", "e.png", b"\x89PNG"), (".f", ".f.png", b"\x89PNG"),
])  # fmt: skip
def test_the_extension_selects_the_format(name: str, written: str, start: bytes, figure: Any, tmp_path: Path) -> None:
    save_figure(figure, tmp_path / name)
    assert os.listdir(tmp_path) == [written]
    assert (tmp_path / written).read_bytes().startswith(start)


def test_an_unknown_format_is_refused_and_the_old_file_stays(figure: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    for call in (figure_path, lambda path: save_figure(figure, path)):
        with pytest.raises(ValueError, match=r"no format 'txt', only .*png"):
            call(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_an_error_while_drawing_keeps_the_old_file(figure: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(ValueError):
        save_figure(figure, tmp_path / "a.png", dpi=-3)
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_text() == "old"


@pytest.mark.parametrize("name", ["pipe", "pipe.png"])
def test_pipes_folders_and_links_to_them_stay(name: str, figure: Any, tmp_path: Path) -> None:
    pipe, folder, link = tmp_path / name, tmp_path / "folder.png", tmp_path / "link.png"
    os.mkfifo(pipe)  # writing to it would wait for a reader
    folder.mkdir()
    link.symlink_to(pipe)
    for path in (pipe, folder, link):
        with pytest.raises(UnwritableFile, match="a pipe|a directory"):
            save_figure(figure, path)
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and link.is_symlink() and len(os.listdir(tmp_path)) == 3


def test_a_missing_folder_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        figure_path(tmp_path / "no" / "a.png")
