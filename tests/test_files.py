"""Atomic writes, which leave the old file or the new one when they are interrupted, and reads with a size limit."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen35moe import Cache, Routing, files
from qwen35moe.config import TextConfig
from qwen35moe.files import UnreadableFile, read_limited, replacing, sync_folder, write_new

HAS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def in_child(function: Callable[[], object]) -> int:
    """The exit code of a forked process that runs `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_new_file_replaces_the_old_one_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with replacing(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old" and partial.parent == tmp_path
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    with replacing(str(tmp_path / "another")) as partial:
        partial.write_text("x")
    assert (tmp_path / "another").read_text() == "x"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt(), ValueError("no")])
def test_an_error_keeps_the_old_file_and_removes_the_partial_one(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)), replacing(target) as partial:
        partial.write_text("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(type(error)), replacing(target) as partial:
        partial.unlink()  # the writer removed it: the original error is raised
        raise error
    assert target.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_keeps_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk failed")

    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="the disk failed"), replacing(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@HAS_FORK
def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write_and_die() -> None:
        with replacing(target) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write_and_die) == -signal.SIGKILL and target.read_text() == "old"
    (remaining,) = (name for name in os.listdir(tmp_path) if name != "file")
    assert remaining.startswith("file.") and remaining.endswith(".partial")
    with replacing(target) as partial:  # the remaining file does not matter
        partial.write_text("new")
    assert target.read_text() == "new"


def test_the_contents_are_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(
        "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file") or fsync(descriptor))  # fmt: skip
    monkeypatch.setattr(files.os, "replace", lambda *names: calls.append("replace") or replace(*names))
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert calls == ["file", "replace", "folder"]


def test_two_writers_do_not_share_a_partial_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other, target = tmp_path / "other", tmp_path / "file"
    other.write_text("untouched")
    target.symlink_to(other)
    with replacing(target) as partial:
        partial.write_text("new")
    assert other.read_text() == "untouched" and target.read_text() == "new" and not target.is_symlink()


def test_a_link_with_the_partial_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "file.guessed.partial").symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError), replacing(tmp_path / "file"):
        pytest.fail("the block ran")
    assert (tmp_path / "other").read_text() == "untouched"


@HAS_FORK
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    """In a child process, because the umask is that of the whole process."""

    def write() -> None:
        os.umask(umask)
        with replacing(tmp_path / "plain") as partial:
            partial.write_text("x")
        with replacing(tmp_path / "tensors") as partial:
            save_file({"x": torch.ones(1)}, partial)
        write_new(tmp_path / "new", [b"x"])

    assert in_child(write) == 0
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("plain", "tensors", "new"), 0o666 & ~umask)


@pytest.mark.parametrize("kind", ["cache", "routing"])
def test_an_interrupted_save_of_a_cache_or_a_routing_keeps_the_old_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "cache":
        config = TextConfig(hidden_size=24, num_hidden_layers=4, vocab_size=61, num_experts=5, num_experts_per_tok=2)
        value: Any = Cache(config, 1)
    else:
        value = Routing(torch.zeros(1, 3, 2, dtype=torch.long), layers=(0,), num_experts=4)
    value.save(tmp_path / "file")
    old = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        value.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == old and os.listdir(tmp_path) == ["file"]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_write_new_does_not_overwrite_a_file(tmp_path: Path) -> None:
    write_new(tmp_path / "file", [b"one", memoryview(b" two"), b""])
    assert (tmp_path / "file").read_bytes() == b"one two"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", [b"three"])
    sync_folder(tmp_path)
    sync_folder(tmp_path / "missing")  # systems that cannot flush folders are no error


def test_reads_have_a_size_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    with pytest.raises(UnreadableFile, match="it has 5 bytes; at most 4 are read"):
        read_limited(file, 4)
    with file.open("wb") as stream:
        stream.truncate(2**40)  # sparse
    with pytest.raises(UnreadableFile, match="at most 100"):
        read_limited(file, 100)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    for wrong in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("a\0b")):
        with pytest.raises(UnreadableFile):
            read_limited(wrong, 100)


def test_a_file_that_grows_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps([1]))
    small = os.stat(file)
    file.write_text(json.dumps([1] * 100))
    monkeypatch.setattr(Path, "stat", lambda self: small)
    with pytest.raises(UnreadableFile, match="it grew beyond 10 bytes"):
        read_limited(file, 10)
