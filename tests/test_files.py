"""Atomic writes, which leave the old file or the new one when they are interrupted, and reads with a size limit."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35moe import Cache, Qwen3_5MoeForCausalLM, Routing, files
from qwen35moe.config import TextConfig
from qwen35moe.files import (
    UnreadableFile,
    UnwritableFile,
    file_in,
    open_tensors,
    parse_json,
    read_limited,
    read_object,
    replacing,
    sync_folder,
    write_new,
    write_tensors,
)
from tests.models.test_model import small

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


# ------------------------------------------------------------------------------------------------------ what is replaced


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    for mode in (0o600, 0o444, 0o664, 0o755):
        target = tmp_path / f"{mode:o}"
        target.write_text("old")
        target.chmod(mode)
        with replacing(target) as partial:
            save_file({"x": torch.ones(1)}, partial)
        assert stat.S_IMODE(target.stat().st_mode) == mode and target.read_bytes() != b"old"


def strange_files(folder: Path) -> dict[str, Path]:
    """One of every kind of file that must never be replaced, and links to them."""
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(folder / "socket"))  # a socket's full name may have 108 characters only
    listening.close()
    names = ["pipe", "directory", "socket"]
    for name in names:
        (folder / f"link to {name}").symlink_to(folder / name)
    return {name: folder / name for name in (*names, *(f"link to {name}" for name in names))} | {"device": Path("/dev/null")}


@HAS_FORK
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strange = strange_files(tmp_path)
    before = {name: (path.lstat().st_ino, path.lstat().st_mode) for name, path in strange.items()}
    config = TextConfig(hidden_size=24, num_hidden_layers=4, vocab_size=61, num_experts=5, num_experts_per_tok=2)
    values: list[Any] = [Cache(config, 1), Routing(torch.zeros(1, 3, 2, dtype=torch.long), layers=(0,), num_experts=4)]
    for name, path in strange.items():
        kind = "a (pipe|device|socket|directory)"
        with pytest.raises(UnwritableFile, match=f"is {kind}: give the name of a regular file"), replacing(path):
            pytest.fail(f"{name}: the block ran")
        for value in values:
            with pytest.raises(UnwritableFile):
                value.save(path)
    assert {name: (path.lstat().st_ino, path.lstat().st_mode) for name, path in strange.items()} == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


def test_a_pipe_that_appears_while_a_file_is_written_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UnwritableFile, match="a pipe"), replacing(tmp_path / "file") as partial:
        partial.write_text("new")
        os.mkfifo(tmp_path / "file")
    assert stat.S_ISFIFO((tmp_path / "file").stat().st_mode) and os.listdir(tmp_path) == ["file"]


def test_hard_links_keep_the_old_contents(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.link(tmp_path / "file", tmp_path / "backup")
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "backup").read_text() == "old" and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(("path", "message"), [
    ("", "empty"), ("   ", "empty"), ("\n", "empty"), (None, "NoneType"), (3, "int"), (b"x", "bytes"), ("a\0b", "NUL"),
    ("new/", "name of a folder"), (".", "directory"), (Path(""), "directory"), ("..", "directory"),
])  # fmt: skip
def test_paths_that_name_no_file(path: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message), replacing(path):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named_and_a_long_name_is_a_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; make it first: .*gone'"):
        with replacing(tmp_path / "gone" / "file"):
            pytest.fail("the block ran")
    for name in ("x" * 255, "é" * 127):
        with replacing(tmp_path / name) as partial:
            partial.write_text("new")
        assert (tmp_path / name).read_text() == "new"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with replacing("~/file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(("text", "kind"), [
    (b'{"a": NaN}', "not JSON"), (b'{"a": [1, -Infinity]}', "not JSON"), (b'{"a": 1e999}', "not JSON"),
    (b'{"a": 1, "a": 2}', "key occurs twice"), (b'{"b": {"a": [1], "a": [2]}}', "key occurs twice"),
    (b"[" * 900, "not JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"), (b"\xff", "not JSON"), (b"", "not JSON"),
    (b"[" + b"[]," * 3000 + b"[]]", "too many values"), (b"[" + b"1," * 20_000 + b"1]", "too many values"),
    (b"[" + b"{}," * 1500 + b"{}]", "too many values"),
])  # fmt: skip
def test_json_that_is_refused(text: bytes, kind: str) -> None:
    with pytest.raises(UnreadableFile) as error:
        parse_json(text, most=1000)
    assert error.value.kind == kind and len(str(error.value)) < 300
    if b"a" in text and kind == "not JSON" and len(text) < 100:
        assert str(error.value).startswith("a = ")  # the key is named


def test_json_that_is_read(tmp_path: Path) -> None:
    repeated: list[str] = []
    assert parse_json(b'{"a": 1, "a": 1, "b": [1.5, -0.0]}') == {"a": 1, "b": [1.5, 0]}
    assert parse_json(b'{"a": 1, "a": 2}', repeated=repeated.append) == {"a": 2} and repeated == ["a"]
    (tmp_path / "file").write_text('{"x": 1}')
    assert read_object(tmp_path / "file", 100) == {"x": 1}
    (tmp_path / "file").write_text("[1]")
    with pytest.raises(UnreadableFile, match="it contains a list, not an object"):
        read_object(tmp_path / "file", 100)


def test_a_file_of_a_folder_is_inside_it(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    (home / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("x")
    (home / "file").write_text("x")
    for name, target in {"in": "file", "chain": "in", "out": outside / "secret", "out chain": "out", "folder out": outside,
                         "loop": "loop", "nothing": "gone", "device": "/dev/null"}.items():  # fmt: skip
        (home / name).symlink_to(target)
    os.mkfifo(home / "pipe")
    for name in ("file", "in", "chain"):
        assert file_in(home, name) == home / name
    (tmp_path / "link to home").symlink_to(home)  # the folder itself may be a link: its name comes from the user
    assert file_in(tmp_path / "link to home", "file").read_text() == "x"
    kinds = {"out": "outside the folder", "out chain": "outside the folder", "folder out/secret": "outside the folder",
             "loop": "missing file", "nothing": "missing file", "device": "not a file", "pipe": "not a file",
             "sub": "not a file",
             "../outside/secret": "bad file name", str(outside / "secret"): "bad file name", "": "bad file name",
             "a\0b": "bad file name", "\ud800": "missing file"}  # fmt: skip
    for name, kind in kinds.items():
        with pytest.raises(UnreadableFile) as error:
            file_in(home, name)
        assert error.value.kind == kind, name


def test_files_of_the_hubs_cache_are_links_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "1234", repository / "blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "file").symlink_to("../../blobs/hash")
    (snapshot / "sub" / "file").symlink_to("../../../blobs/hash")
    (snapshot / "escapes").symlink_to("../../blobs/../../secret")
    (blobs / "onward").symlink_to(tmp_path / "secret")
    (snapshot / "onward").symlink_to("../../blobs/onward")
    assert file_in(snapshot, "file").read_text() == file_in(snapshot / "sub", "file").read_text() == "x"
    for name in ("escapes", "onward"):
        with pytest.raises(UnreadableFile, match="it is a link to .*secret"):
            file_in(snapshot, name)


def test_a_pipe_that_takes_the_place_of_a_checked_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    regular = os.stat(tmp_path / "file")
    monkeypatch.setattr(Path, "stat", lambda self: regular)
    with pytest.raises(UnreadableFile, match="not a regular file"):
        read_limited(tmp_path / "pipe", 100)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"a": x, "b": x, "c": x[2:4], "d": x.view(2, 3).T, "e": torch.empty(0)}, {"format": "f"})
    with open_tensors(tmp_path / "file", "a saved test", "f") as (file, metadata):
        assert metadata == {"format": "f"} and torch.equal(file.get_tensor("d"), x.view(2, 3).T)
        assert torch.equal(file.get_tensor("c"), x[2:4]) and file.get_slice("b").get_shape() == [6]
    with pytest.raises(ValueError, match="a is on the meta device"):
        write_tensors(tmp_path / "other", {"a": torch.empty(3, device="meta")}, {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [
    b"", b"\1\2\3", (2**62).to_bytes(8, "little"), (30).to_bytes(8, "little") + b"{" * 30,
    (50_000).to_bytes(8, "little") + b"[" + b"[]," * 16_666 + b"]", (2).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (58).to_bytes(8, "little") + b'{"__metadata__": {"format": "f"}, "a": 1, "a": 1, "b": {}}',
    (33).to_bytes(8, "little") + b'{"__metadata__": {"format": "f"}}' + b"more",
])  # fmt: skip
def test_a_damaged_file_of_tensors_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UnreadableFile, match="file is not a (safetensors file|saved test)"):
        with open_tensors(tmp_path / "file", "a saved test", "f"):
            pytest.fail("it was opened")


def test_a_pipe_or_folder_is_no_file_of_tensors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(UnreadableFile), open_tensors(path, "a saved test", "f"):
            pytest.fail("it was opened")


@pytest.mark.parametrize("kind", ["cache", "routing"])
def test_a_cache_or_routing_never_replaces_weights(kind: str, tmp_path: Path) -> None:
    """Its own files of any version, and what is no safetensors file, are replaced as `open(path, "w")` would."""
    model = Qwen3_5MoeForCausalLM(small()).init_weights(seed=0)
    value = model.new_cache(1) if kind == "cache" else model(torch.tensor([[1, 2]]), output_routing=True).routing
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UnwritableFile, match="holds other tensors and is not replaced"):
        value.save(weights)
    assert weights.read_bytes() == before and len(list(weights.parent.iterdir())) == 2
    file = tmp_path / "own"
    for old in (b"", b"text", b"\x05\0\0\0\0\0\0\0{[}]!"):
        file.write_bytes(old)
        value.save(file)
        value.save(file)
        assert load_file(file)
