"""A new checkpoint replaces an old one: the folder is never half old and half new, whatever interrupts the save."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen35moe.checkpoint import CheckpointError, folder, read_headers
from tests.checkpoint.test_write import drawn, files, in_child, loaded, same

FORMS = {"one file": "5GB", "three shards": "27KB", "many shards": "8KB"}
pytestmark = pytest.mark.usefixtures("quick_disk")


# ------------------------------------------------------------------------------------------- replacing a checkpoint


def shards(path: Path) -> int:
    return len(read_headers(path).files)


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_a_new_checkpoint_replaces_the_old_one(old: str, new: str, tmp_path: Path) -> None:
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[old])
    others = {"tokenizer.json": "{}", "README.md": "mine", "adapter_model.safetensors": "x", "notes/a.txt": "b"}
    (tmp_path / "notes").mkdir()
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    for model in (second, first, second):  # over files of the same and of other names
        model.save_pretrained(tmp_path, max_shard_size=FORMS[new])
        assert same(loaded(tmp_path), model)
    assert {name: (tmp_path / name).read_text() for name in others} == others
    weights = [name for name in files(tmp_path) if name.startswith("model")]
    index = [] if new == "one file" else ["model.safetensors.index.json"]
    assert sorted(weights) == sorted([file.name for file in read_headers(tmp_path).files] + index)
    assert set(files(tmp_path)) == {*weights, "config.json", *(name.partition("/")[0] for name in others)}


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    drawn(1).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for size in ("5GB", "27KB", "5GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert same(loaded(tmp_path), model)


def test_links_of_a_hub_cache_are_replaced_and_not_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    first, second = drawn(1), drawn(2)
    first.save_pretrained(snapshot)
    for name in files(snapshot):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    before = {name: (blobs / name).read_bytes() for name in files(blobs)}
    assert same(loaded(snapshot), first)
    second.save_pretrained(snapshot)
    assert same(loaded(snapshot), second)
    assert {name: (blobs / name).read_bytes() for name in files(blobs)} == before


def test_generation_settings_are_written_or_kept(tmp_path: Path) -> None:
    model = drawn()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    model.save_pretrained(tmp_path)
    assert loaded(tmp_path).generation_config == {"temperature": 0.5}
    model.generation_config = {"eos_token_id": [1, 2]}
    model.save_pretrained(tmp_path)
    assert loaded(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def test_two_saves_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    drawn(1).save_pretrained(tmp_path)
    with folder.replacing(tmp_path, b"{}", 0), pytest.raises(CheckpointError, match="another save"):
        drawn(2).save_pretrained(tmp_path)
    assert same(loaded(tmp_path), drawn(1))
    drawn(2).save_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------- interrupted replacements


STEPS = ("replace", "rename", "unlink", "fsync", "rmdir")


class Killer:
    """Counts the calls that change a folder and kills the process, without cleanup, before call number `at`."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0
        self.originals = {name: getattr(os, name) for name in STEPS}

    def __enter__(self) -> Killer:
        for name in STEPS:
            setattr(os, name, self._counted(self.originals[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return original(*args, **kwargs)

        return call


def save_and_die(model: Any, path: Path, size: str, at: int) -> None:
    with Killer(at):
        model.save_pretrained(path, max_shard_size=size)


def outcome_of(path: Path, *models: nn.Module) -> int:
    """The index of the model in the folder; it must be one of them, whole."""
    saved = loaded(path, weights="copy")
    return next(n for n, model in enumerate(models) if same(saved, model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("old", ["one file", "three shards"])
@pytest.mark.parametrize("new", ["one file", "three shards"])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(old: str, new: str, tmp_path: Path) -> None:
    """Killed before each step in turn. The models differ in num_experts, so weights and config.json must belong together.

    After every kill the folder loads as one of the two; the next save over it works and leaves no other file.
    """
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path / "old", max_shard_size=FORMS[old])
    outcomes, status, at = [], -1, 0
    while status != 0:
        path = tmp_path / str(at)
        shutil.copytree(tmp_path / "old", path)
        status = in_child(lambda at=at, path=path: save_and_die(second, path, FORMS[new], at))
        assert status in (0, -signal.SIGKILL)
        outcomes.append(outcome_of(path, first, second))
        if at % 3 == 0:
            second.save_pretrained(path, max_shard_size=FORMS[old])
            assert outcome_of(path, first, second) == 1
            index = [] if old == "one file" else ["model.safetensors.index.json"]
            assert files(path) == sorted(["config.json", *index, *(f.name for f in read_headers(path).files)])
        at += 1
    assert outcomes == sorted(outcomes), "the old checkpoint came back after the new one"
    assert outcomes.count(0) >= 5 and outcomes.count(1) >= 5 and len(outcomes) >= 11, outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_save_into_a_new_folder_leaves_no_wrong_checkpoint(tmp_path: Path) -> None:
    model = drawn(2)
    for at in range(0, 20, 2):
        path = tmp_path / str(at)
        assert in_child(lambda at=at, path=path: save_and_die(model, path, "27KB", at)) in (0, -signal.SIGKILL)
        try:
            assert outcome_of(path, model) == 0
        except CheckpointError as error:
            assert "neither" in str(error) or "no folder" in str(error)
        model.save_pretrained(path)
        assert files(path) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")
@pytest.mark.parametrize("form", ["one file", "three shards"])
def test_everything_is_flushed_before_the_commit(
    form: str, tmp_path: Path, quick_disk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the call that commits the new checkpoint, all of its files and their names have been flushed."""
    first, second = drawn(1), drawn(2)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[form])
    quick_disk.clear()
    flushed: list[list[str]] = []
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        flushed.append([Path(name).name for name in quick_disk])
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    second.save_pretrained(tmp_path, max_shard_size=FORMS[form])
    commit, rename_config = flushed[0], flushed[1]
    files = ["model.safetensors"] if form == "one file" else [f.name for f in read_headers(tmp_path).files]
    index = [] if form == "one file" else ["model.safetensors.index.json"]
    expected = [*files, *index, f"config.json.{read_headers(tmp_path).save_id}"]
    assert sorted(commit[:-1]) == sorted(expected) and commit[-1] == tmp_path.name
    assert rename_config[-1] == tmp_path.name and len(rename_config) > len(commit)


def test_a_pending_config_json_is_read_only_while_a_save_is_unfinished(tmp_path: Path) -> None:
    model = drawn(1)
    model.save_pretrained(tmp_path)
    header = read_headers(tmp_path)
    assert folder.config_file(header) == tmp_path / "config.json"
    pending = tmp_path / f"config.json.{header.save_id}"
    pending.write_text((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text("{}")
    assert folder.config_file(header) == pending and same(loaded(tmp_path), model)
    pending.unlink()
    (tmp_path / "config.json.0123456789abcdef").write_text("{}")  # of other weights
    assert folder.config_file(header) == tmp_path / "config.json"


def test_a_config_json_changed_by_hand_is_not_undone_by_an_unfinished_save(tmp_path: Path) -> None:
    """The id in the old weights always differs from that of the pending configuration, even if the configurations are equal."""
    model = drawn(1)
    model.save_pretrained(tmp_path)
    edited = json.loads((tmp_path / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    old = read_headers(tmp_path).save_id
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.os, "replace", interrupt)
        patch.setattr(folder.Replacement, "abandon", lambda self: None)
        model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("config.json.*"))) == 1 and read_headers(tmp_path).save_id == old
    assert loaded(tmp_path).config.text_config.rms_norm_eps == 1e-3


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", FORMS)
@pytest.mark.parametrize("call", ["write", "replace", "rename", "fsync"])
def test_an_error_while_saving_leaves_the_old_checkpoint_and_no_other_file(
    call: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "the disk failed")

    if call == "rename" and size == "one file":
        call = "replace"  # a single file is not moved before the commit
    monkeypatch.setattr(*((folder.Replacement, "write") if call == "write" else (folder.os, call)), fail)
    with pytest.raises(OSError, match="the disk failed"):
        second.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    monkeypatch.undo()
    assert same(loaded(tmp_path), first)
    if call != "replace":  # there the commit fails, and moved files stay until the next save
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    second.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    assert same(loaded(tmp_path), second)


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(1)
    first.save_pretrained(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="saving needs .* bytes beside the old files, 10 are free") as error:
        drawn(2).save_pretrained(tmp_path)
    assert error.value.errno == errno.ENOSPC and files(tmp_path) == before
    assert same(loaded(tmp_path), first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a forked process")
def test_a_disk_that_fills_up_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The operating system limits files to 10 KB: a real short write, then a real error."""
    first, second = drawn(1), drawn(2)
    first.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def save() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            second.save_pretrained(tmp_path)
        except OSError as error:
            return error.errno == errno.EFBIG
        return False

    assert in_child(save) == 0
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_read_only_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(1)
    first.save_pretrained(tmp_path)

    def read_only(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(folder.tempfile, "mkdtemp", read_only)
    with pytest.raises(PermissionError, match="read-only"):
        drawn(2).save_pretrained(tmp_path)
    assert same(loaded(tmp_path), first)
