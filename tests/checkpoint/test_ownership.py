"""Nothing is lost: a save replaces and deletes only what is provably of the checkpoint that lies in the folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen35moe.checkpoint import CheckpointError, folder, read_headers
from qwen35moe.checkpoint.convert import convert
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from qwen35moe.cli import main
from tests.checkpoint.test_replace import FORMS
from tests.checkpoint.test_write import drawn, files, loaded, same

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("quick_disk")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def model() -> Any:
    return drawn(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint of `write_tiny`."""
    path = tmp_path_factory.mktemp("small") / "checkpoint"
    write_tiny(path, tiny_config(layers=1, experts=2))
    return path


def index(path: Path, weight_map: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("size", FORMS)
def test_shards_that_no_index_lists_stay(size: str, model: Any, tmp_path: Path) -> None:
    """A download under way, a backup: whole shards, halves, shards of this library."""
    drawn(3).save_pretrained(tmp_path / "other", max_shard_size="27KB")
    saved = next(iter(sorted((tmp_path / "other").glob("model-00001-of-*.safetensors"))))
    kept = {saved.name: saved.read_bytes(), "model-00001-of-00003.safetensors": saved.read_bytes(),
            "model-00002-of-00003.safetensors": b"half a download", "model-2-00001-of-00009.safetensors": b"",
            "config.json.0123456789abcdef": b"{}", "config.json.bak": b"{}"}  # fmt: skip
    shutil.rmtree(tmp_path / "other")
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        model.save_pretrained(tmp_path, max_shard_size=FORMS[size])
        assert same(loaded(tmp_path), model)
        assert {name: content for name, content in contents(tmp_path).items() if name in kept} == kept


def test_an_index_that_names_other_files_deletes_none_of_them(model: Any, tmp_path: Path) -> None:
    """By name (notes, an adapter, a file of a subfolder or outside) or by contents (other tensors than the index says)."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    name = "model.embed_tokens.weight"
    save_file({name: torch.ones(3, 2)}, home / "adapter_model.safetensors")
    save_file({name: torch.ones(3, 2)}, home / "sub" / "model-00001-of-00002.safetensors")
    save_file({name: torch.ones(3, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: torch.ones(3, 2), "more": torch.ones(2)}, home / "model-00001-of-00002.safetensors")
    save_file({"other": torch.ones(2)}, home / "backup-00002-of-00002.safetensors")
    (home / "notes.txt").write_text("mine")
    (home / "x-00001-of-00001.safetensors").write_text("mine")
    os.mkfifo(home / "pipe-00001-of-00001.safetensors")
    names = ["adapter_model.safetensors", "sub/model-00001-of-00002.safetensors", "../model-00001-of-00002.safetensors",
             "model-00001-of-00002.safetensors", "backup-00002-of-00002.safetensors", "notes.txt",
             "x-00001-of-00001.safetensors", "pipe-00001-of-00001.safetensors", "missing-00001-of-00001.safetensors",
             str(tmp_path / "model-00001-of-00002.safetensors")]  # fmt: skip
    index(home, {f"model.layers.{number}.x": name for number, name in enumerate(names)} | {"model.norm.weight": names[3]})
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.name != INDEX and not path.is_dir()}
    for size in FORMS.values():
        model.save_pretrained(home, max_shard_size=size)
        assert same(loaded(home), model)
        assert {path: path.stat().st_ino for path in before} == before


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", b'{"model_type": "bert"}'), ("config.json", b'{"compilerOptions": {}}'), ("config.json", b"not JSON"),
    ("config.json", b"[1]"), ("model.safetensors", b"half a download"), ("model.safetensors", b""),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
    ("generation_config.json", b'{"temperature": 0.5}'), (INDEX, b"{}"),
    (INDEX, b'{"weight_map": {"bert.x": "a.safetensors"}}'),
])  # fmt: skip
@pytest.mark.parametrize("size", ["one file", "three shards"])
def test_files_of_no_checkpoint_are_refused_before_anything_is_written(
    size: str, name: str, content: bytes, tmp_path: Path
) -> None:
    model = drawn(1)
    model.generation_config = {"eos_token_id": 1}
    (tmp_path / name).write_bytes(content)
    if name == INDEX and size == "one file":
        model.save_pretrained(tmp_path)  # one file needs no index; the strange one stays
        assert same(loaded(tmp_path), model) and (tmp_path / INDEX).read_bytes() == content
        return
    with pytest.raises(CheckpointError, match=f"not of a checkpoint of this family(.|\n)*not replaced: {name}: "):
        model.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    assert contents(tmp_path) == {name: content}


def test_the_same_settings_in_another_form_are_replaced(tmp_path: Path) -> None:
    model = drawn(1)
    model.generation_config = {"eos_token_id": 1, "top_k": 5}
    (tmp_path / "generation_config.json").write_text('{"top_k":5,"eos_token_id":1}')
    model.save_pretrained(tmp_path)
    assert same(loaded(tmp_path), model)


def test_a_model_of_another_family_is_not_replaced(model: Any, tmp_path: Path) -> None:
    """Its tensor names may be those of this architecture; its config.json tells."""
    save_file({"model.embed_tokens.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        model.save_pretrained(tmp_path)
    save_file({"bert.embeddings.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="its tensors have no names of this architecture"):
        model.save_pretrained(tmp_path)
    assert before != contents(tmp_path) and files(tmp_path) == ["model.safetensors"]


STRANGE: dict[str, Callable[[Path, Path], object]] = {
    "pipe": lambda path, outside: os.mkfifo(path),
    "folder": lambda path, outside: path.mkdir(),
    "link out of the folder": lambda path, outside: path.symlink_to(outside),
    "link to nothing": lambda path, outside: path.symlink_to(outside.with_name("gone")),
    "link to a device": lambda path, outside: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "generation_config.json"])
def test_what_is_no_regular_file_stays(kind: str, name: str, tmp_path: Path) -> None:
    model = drawn(1)
    model.generation_config = {"eos_token_id": 1}
    home, outside = tmp_path / "home", tmp_path / "outside"
    model.save_pretrained(home)
    outside.write_text("{}")
    (home / name).unlink(missing_ok=True)
    STRANGE[kind](home / name, outside)
    before = contents(home), (home / name).lstat().st_ino
    with pytest.raises(CheckpointError, match=f"not replaced: {name}: "):
        model.save_pretrained(home, max_shard_size="27KB")
    assert (contents(home), (home / name).lstat().st_ino) == before and outside.read_text() == "{}"


@pytest.mark.parametrize("door", ["save_pretrained", "tiny", "convert"])
def test_every_door_checks_the_path_and_what_lies_there(
    door: str, model: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "save_pretrained": model.save_pretrained,
        "tiny": lambda path: write_tiny(path, tiny_config(layers=1, experts=2)),
        "convert": lambda path: convert(small, path),
    }
    call = calls[door]
    shutil.copytree(small, tmp_path / "good")
    monkeypatch.chdir(tmp_path / "good")
    before = contents(tmp_path / "good")
    for path in ("", " ", "\t", None, 3, b"x", "a\0b"):
        with pytest.raises(ValueError, match="path"):
            call(path)
    for path in (".", "./", Path(""), Path(".")):
        with pytest.raises(CheckpointError, match="is the current folder, which holds a checkpoint.*give the folder's name"):
            call(path)
    with pytest.raises(CheckpointError, match="is a file"):
        call("config.json")
    assert contents(tmp_path / "good") == before
    call(tmp_path / "good")  # its full name
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    call(".")
    assert (tmp_path / "empty" / "config.json").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    call("~/new/")
    assert (tmp_path / "new" / "config.json").exists() and files(tmp_path / "empty").count("~") == 0
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"port": 80}')
    with pytest.raises(CheckpointError, match="not replaced: config.json"):
        call(tmp_path / "project")
    assert contents(tmp_path / "project") == {"config.json": b'{"port": 80}'}


def test_the_commands_refuse_an_empty_target(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tiny", ""]) == main(["convert", str(small), ""]) == 2
    assert capsys.readouterr().err.count("the path is empty") == 2 and files(tmp_path) == []


def test_converted_side_files_replace_those_of_a_checkpoint_only(small: Path, tmp_path: Path, caplog: Any) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(small, source)
    for name, content in {"README.md": "theirs", "chat_template.jinja": "new", "LICENSE": "x"}.items():
        (source / name).write_text(content)
    target.mkdir()
    (target / "tokenizer.json").write_text("of another model")
    with pytest.raises(CheckpointError, match="not replaced: tokenizer.json: there is no checkpoint beside it"):
        convert(source, target)
    assert contents(target) == {"tokenizer.json": b"of another model"}
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())  # the same contents: nothing is lost
    (target / "README.md").write_text("mine")
    convert(source, target)
    (target / "chat_template.jinja").write_text("old")
    convert(source, target)
    assert (target / "README.md").read_text() == "mine" and (target / "chat_template.jinja").read_text() == "new"
    assert (target / "LICENSE").read_text() == "x" and "README.md is not copied: the target has" in caplog.text


# -------------------------------------------------------------------------------------------- permissions, litter


def test_permissions_are_kept(model: Any, tmp_path: Path) -> None:
    def modes(path: Path) -> dict[str, int]:
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}

    model.save_pretrained(tmp_path / "new")
    usual = stat.S_IMODE((tmp_path / "new" / "config.json").stat().st_mode)
    assert set(modes(tmp_path / "new").values()) == {usual} and usual & 0o600 == 0o600
    for file in (tmp_path / "new").iterdir():
        file.chmod(0o600)
    for size in ("27KB", "8KB", "5GB"):  # private weights stay private, whatever the names of their files
        model.save_pretrained(tmp_path / "new", max_shard_size=size)
        kept = {name: mode for name, mode in modes(tmp_path / "new").items() if name != INDEX}
        assert set(kept.values()) == {0o600} and (size == "5GB" or len(kept) > 3)


def test_a_save_that_fails_removes_the_folders_it_made(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.Replacement, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "a" / "b" / "c")
    assert files(tmp_path) == []


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["rename", "replace", "unlink"])
@pytest.mark.parametrize("size", ["one file", "three shards"])
def test_an_interrupt_at_any_call_leaves_a_whole_checkpoint_and_the_next_save_no_litter(
    call: str, size: str, tmp_path: Path
) -> None:
    """Interrupted before and after each call in turn (a KeyboardInterrupt runs the cleanup, unlike a kill)."""
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path / "old", max_shard_size="27KB")
    original = getattr(os, call)
    for at in range(40):
        path, count = tmp_path / str(at), 0
        shutil.copytree(tmp_path / "old", path)

        def counted(*args: Any, at: int = at, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at // 2 + 1 and at % 2 == 0:
                raise KeyboardInterrupt
            value = original(*args, **kwargs)
            if count == at // 2 + 1:
                raise KeyboardInterrupt
            return value

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder.os, call, counted)
            try:
                second.save_pretrained(path, max_shard_size=FORMS[size])
            except KeyboardInterrupt:
                pass
        if count < at // 2 + 1:
            break
        saved = loaded(path, weights="copy")
        assert same(saved, first) or same(saved, second)
        second.save_pretrained(path, max_shard_size=FORMS[size])
        expected = ["config.json", *(f.name for f in read_headers(path).files), *([INDEX] if size != "one file" else [])]
        assert same(loaded(path), second) and files(path) == sorted(expected)


def test_directories_that_look_like_those_of_a_save_stay(model: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    home = tmp_path / "home"
    (home / ".saving-notes").mkdir(parents=True)
    (home / ".saving-notes" / "file").write_text("mine")
    (home / ".saving-abcdefgh").symlink_to(outside)
    (home / ".saving-file").write_text("mine")
    (home / ".saving-killed00" / "sub").mkdir(parents=True)  # what is no work of a save stays in it
    for name in (".of-qwen35moe", "model.safetensors", "sub/file"):
        (home / ".saving-killed00" / name).write_text("x")
    model.save_pretrained(home)
    assert (outside / "file").exists() and (home / ".saving-notes" / "file").exists() and (home / ".saving-file").exists()
    assert (home / ".saving-killed00" / "sub" / "file").exists()
    assert not (home / ".saving-killed00" / "model.safetensors").exists()


def test_a_journal_deletes_no_file_that_is_not_the_one_it_lists(model: Any, tmp_path: Path) -> None:
    """A copied folder has other inodes; a name may lead outside."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    home = tmp_path / "home"
    model.save_pretrained(home)
    (home / "notes").write_text("mine")
    killed = home / ".saving-abcdefgh"
    killed.mkdir()
    (killed / ".of-qwen35moe").write_text("x")
    status = victim.stat()
    real = [status.st_ino, status.st_size, status.st_mtime_ns]
    claims = {"notes": [1, 2, 3], "../victim": real, str(victim): real, "config.json": 5}
    (killed / ".moves.json").write_text(json.dumps(claims))
    model.save_pretrained(home)
    assert victim.exists() and (home / "notes").exists() and not killed.exists() and same(loaded(home), model)


def test_two_threads_load_and_save_the_same_folder(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(4):
                if number == 0:
                    model.save_pretrained(tmp_path, max_shard_size="27KB")
                    continue
                try:
                    assert same(loaded(tmp_path, weights=("map", "copy")[number % 2]), model)
                except CheckpointError as error:
                    assert "replaced by another checkpoint" in str(error)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and same(loaded(tmp_path), model)
