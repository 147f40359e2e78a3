"""The cache's file: what is written is read again under every edit, what is damaged or contradicts itself is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35moe import Cache
from tests.cache.common import tokens
from tests.support import peer
from tests.support.memory import memory_taken

Tensors = dict[str, Tensor]
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def filled(model: Any, max_length: int | None = None) -> Cache:
    """Two rows of 3 and 5 tokens."""
    cache = model.new_cache(2, max_length)
    with torch.no_grad():
        model(tokens(2, 5), attention_mask=MASK, cache=cache)
    return cache


def next_logits(model: Any, cache: Cache) -> Tensor:
    with torch.no_grad():
        return model(tokens(cache.batch_size, 1, salt=3), cache=cache.clone()).logits


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> tuple[Path, Tensors, dict[str, str]]:
    path = tmp_path / "cache"
    filled(model).save(path)
    with safe_open(path, "pt") as file:
        return path, load_file(path), file.metadata()


def first(tensors: Tensors, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def changed(**more: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, numbers: numbers.update(more)


def replaced(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, numbers: dict[str, Any]) -> None:
        name = first(tensors, end)
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def both(lengths: list[int]) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, numbers: dict[str, Any]) -> None:
        tensors["lengths"], numbers["lengths"] = torch.tensor(lengths), lengths

    return edit


def put(tensors: Tensors, **more: Tensor) -> None:
    tensors.update(more)


DAMAGED: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "25 GB of room": (changed(max_length=10**8), "max_length = 100000000 is not a number 1 ... 1048576"),
    "no room": (changed(max_length=0), "max_length = 0"),
    "room for fewer tokens": (changed(max_length=4), "max_length = 4, its longest row has 5"),
    "room of another type": (changed(max_length="9"), "max_length = '9'"),
    "negative columns": (changed(seen=-3), "seen = -3"),
    "too few columns": (changed(seen=4), "seen = 4 columns, its longest row has 5"),
    "a true column": (changed(seen=True), "seen = True"),
    "a fraction": (changed(record=1.5), "record = 1.5"),
    "a common length": (changed(common_length=3), r"common_length = 3, the lengths are \[3, 5\]"),
    "an unknown number": (changed(common=3), "its numbers must be exactly"),
    "a missing number": (lambda tensors, numbers: numbers.pop("seen"), "its numbers must be exactly"),
    "lengths swapped": (replaced("lengths", lambda t: t.flip(0)), r"lengths \[5, 3\], in the metadata \[3, 5\]"),
    "a negative length": (both([-3, 5]), r"lengths \[-3, 5\] are not a list of numbers"),
    "lengths beyond the keys": (both([3, 6]), "seen = 5 columns, its longest row has 6"),
    "lengths beyond the keys and columns": (lambda t, n: (both([3, 6])(t, n), n.update(seen=9)), "describe .*, 6"),
    "one row too few": (both([5]), "describe"),
    "lengths in another dtype": (replaced("lengths", torch.Tensor.int), "lengths is .2. torch.int32"),
    "no lengths": (lambda tensors, numbers: tensors.pop("lengths"), "lacks lengths"),
    "no ids": (lambda tensors, numbers: tensors.pop("ids"), "lacks ids"),
    "ids of -2": (replaced("ids", lambda t: t - 2 - t.min()), "ids has -2"),
    "no keys": (lambda tensors, numbers: tensors.pop(first(tensors, ".key")), r"lacks layers.\d.key, which layer_types\["),
    "one more tensor": (lambda tensors, numbers: put(tensors, more=torch.ones(1)), "does not have: .'more'"),
    "one more layer": (lambda tensors, numbers: put(tensors, **{"layers.99.key": torch.ones(1)}), "layers.99.key"),
    "NaN state": (replaced(".recurrent_state", lambda t: t * math.nan), "recurrent_state has numbers that are not finite"),
    "infinite key": (replaced(".key", lambda t: t / 0), "key has numbers that are not finite"),
    "keys in float64": (replaced(".key", torch.Tensor.double), "torch.float64"),
    "values in bfloat16": (replaced(".value", torch.Tensor.bfloat16), "torch.bfloat16"),
    "state in bfloat16": (replaced(".recurrent_state", torch.Tensor.bfloat16), "recurrent_state is .* torch.bfloat16"),
    "keys in integers": (replaced(".key", torch.Tensor.long), "torch.int64"),
    "keys of another shape": (replaced(".key", lambda t: t[:, :, :1]), "key is "),
    "state transposed": (replaced(".recurrent_state", lambda t: t.mT), "recurrent_state is "),
    "a scalar state": (replaced(".conv_state", lambda t: t.flatten()[0]), r"conv_state is \[\] "),
    "half a rotary offset": (lambda tensors, numbers: put(tensors, rope_delta=torch.zeros(2).long()), "lacks rope_delta_since"),
    "an offset before the start": (
        lambda t, n: put(t, rope_delta=torch.tensor([0, -6]), rope_delta_since=torch.zeros(2).long()), "negative position"),
    "an offset of the future": (
        lambda t, n: put(t, rope_delta=torch.zeros(2).long(), rope_delta_since=torch.tensor([4, 0])), "beyond the lengths"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_contradicts_itself_is_refused(kind: str, model: Any, saved: Any) -> None:
    path, tensors, metadata = saved
    change, message = DAMAGED[kind]
    numbers = json.loads(metadata["numbers"])
    change(tensors, numbers)
    save_file(tensors, path, metadata | {"numbers": json.dumps(numbers)})
    with pytest.raises(ValueError, match=message) as error:
        Cache.load(path, model.config)
    assert not isinstance(error.value, json.JSONDecodeError) and len(str(error.value)) < 2000


@pytest.mark.parametrize("numbers", ["", "[]", "[1]", "{", "null", '{"seen": NaN}', "[" * 5000, "x" * 1000])
def test_numbers_that_are_none_are_refused(numbers: str, model: Any, saved: Any) -> None:
    path, tensors, metadata = saved
    save_file(tensors, path, metadata | {"numbers": numbers})
    with pytest.raises(ValueError, match="its numbers must be exactly"):
        Cache.load(path, model.config)
    save_file(tensors, path, {"format": metadata["format"]})
    with pytest.raises(ValueError, match="its numbers must be exactly"):
        Cache.load(path, model.config)


def test_no_memory_is_taken_for_a_file_that_is_refused(model: Any, saved: Any) -> None:
    path, tensors, metadata = saved
    good = path.with_name("good")
    save_file(tensors, good, metadata)
    numbers = json.loads(metadata["numbers"])
    save_file(tensors, path, metadata | {"numbers": json.dumps(numbers | {"max_length": 10**8})})

    def refused() -> None:
        with pytest.raises(ValueError, match="max_length"):
            Cache.load(path, model.config)

    assert memory_taken(refused, lambda: Cache.load(good, model.config)) < 2**23


def test_room_beyond_the_memory_is_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(model, max_length=1000).save(tmp_path / "cache")
    monkeypatch.setattr("qwen35moe.cache.file.available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"max_length = 1000 takes \d+ bytes, 10000 are available"):
        Cache.load(tmp_path / "cache", model.config)


def test_a_damaged_file_is_refused(model: Any, saved: Any, tmp_path: Path) -> None:
    path, _, _ = saved
    content = path.read_bytes()
    for changed in (content[:0], content[:7], content[:100], content[:-1], content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            Cache.load(path, model.config)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, tmp_path / "missing", "", "/dev/zero"):
        with pytest.raises(ValueError):
            Cache.load(other, model.config)


# --------------------------------------------------------------------------------------------- what is written is read


def drop_the_longest(model: Any, cache: Cache) -> None:
    cache.reorder([0])


def dropped_and_continued(model: Any, cache: Cache) -> None:
    cache.reorder([0, 0, 0])
    with torch.no_grad():
        model(tokens(3, 2, salt=5), cache=cache)


def rolled_back(model: Any, cache: Cache) -> None:
    cache.record = 4
    with torch.no_grad():
        model(tokens(2, 3, salt=5), cache=cache)
    cache.rollback(torch.tensor([1, 3]))


def edited(model: Any, cache: Cache) -> None:
    for layer in cache.layers:
        for name in layer.state.names:
            setattr(layer, name, getattr(layer, name).double() * 0.5)  # in the cache's dtype again


def shared(model: Any, cache: Cache) -> None:
    """Two layers with one tensor."""
    layers = [layer for layer in cache.layers if "recurrent_state" in layer.state.names]
    layers[-1].recurrent_state = layers[0].recurrent_state


EDITS: dict[str, Callable[[Any, Cache], object]] = {
    "nothing": lambda model, cache: None,
    "the longest row dropped": drop_the_longest,
    "rows repeated": dropped_and_continued,
    "rolled back by row": rolled_back,
    "states edited": edited,
    "states shared": shared,
    "an offset of positions": lambda model, cache: cache.set_next_positions(cache.lengths - 2),
    "restored": lambda model, cache: cache.restore(cache.snapshot()),
    "cloned": lambda model, cache: cache.clone(),
}  # fmt: skip


OF_ROWS = ("the longest row dropped", "rows repeated", "rolled back by row")  # a static cache keeps its rows


@pytest.mark.parametrize(("edit", "max_length"), [
    (edit, room) for edit in EDITS for room in (None, 20) if room is None or edit not in OF_ROWS
])  # fmt: skip
def test_a_cache_is_read_again_after_every_edit(edit: str, max_length: int | None, model: Any, tmp_path: Path) -> None:
    cache = filled(model, max_length)
    EDITS[edit](model, cache)
    cache.save(tmp_path / "cache")
    again = Cache.load(tmp_path / "cache", model.config)
    assert torch.equal(again.lengths, cache.lengths) and again.seen == cache.seen and again.max_length == max_length
    assert torch.equal(next_logits(model, again), next_logits(model, cache))
    again.save(tmp_path / "twice")
    first, second = (load_file(tmp_path / name) for name in ("cache", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_caches_of_every_dtype_and_an_empty_one(dtype: torch.dtype, model: Any, tmp_path: Path) -> None:
    cache = Cache(model.config, 3, dtype=dtype)
    cache.save(tmp_path / "cache")
    again = Cache.load(tmp_path / "cache", model.config)
    assert again.dtype == dtype and again.lengths.tolist() == [0, 0, 0] and again.batch_size == 3


def test_a_cache_that_could_not_be_read_again_is_not_written(model: Any, tmp_path: Path) -> None:
    def broken(change: Callable[[Cache], object]) -> Cache:
        cache = filled(model)
        change(cache)
        return cache

    def nan(cache: Cache) -> None:
        layer = next(layer for layer in cache.layers if "recurrent_state" in layer.state.names)
        layer.recurrent_state = layer.recurrent_state * math.nan

    cases: list[tuple[Cache, str]] = [
        (broken(nan), "recurrent_state has numbers that are not finite"),
        (broken(lambda cache: setattr(cache, "_lengths", torch.tensor([3, 9]))), "seen = 5"),
        (broken(lambda cache: setattr(cache, "seen", -1)), "seen = -1"),
        (broken(lambda cache: cache.reorder([])), "are not a list of numbers"),
        (Cache(model.config, 1, max_length=2**20 + 1), "max_length = 1048577 is not a number 1 ... 1048576"),
    ]
    for cache, message in cases:
        with pytest.raises(ValueError, match=message):
            cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == []


def test_another_configuration_is_refused_with_both_shapes(saved: Any) -> None:
    path, _, _ = saved
    other = peer.ours(peer.odd_shape(8, layer_types=[peer.LINEAR, peer.FULL, peer.FULL], num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"layers\.\d\.\w+"):
        Cache.load(path, other.config)
