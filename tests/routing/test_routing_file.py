"""The routing file under edits: what is written is read again, what is damaged or absurd is refused at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35moe.routing import Routing
from qwen35moe.routing.file import FORMAT, read_metadata
from tests.support.memory import memory_taken

ROWS = torch.tensor([[[0, 1], [2, 3], [4, -1]]]).expand(2, -1, -1).contiguous()
GOOD = {"layers": [0, 1], "num_experts": 5, "shape": [1, 3], "open_ended": False}


def stored(path: Path, facts: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file({"indices": ROWS} if tensors is None else tensors, path, metadata={"format": FORMAT, "routing": text})
    return path


@pytest.mark.parametrize(("facts", "tensors"), [
    (GOOD | {"num_experts": 2**31 - 1}, {"indices": ROWS.to(torch.int8)}),
    (GOOD | {"num_experts": 2**15}, {"indices": ROWS.to(torch.int16)}),
    (GOOD | {"num_experts": 0}, {"indices": ROWS + 2**30}),  # the number of experts is unknown, an index is absurd
    (GOOD | {"num_experts": 4096, "layers": list(range(5000)), "shape": [1, 0]},
     {"indices": torch.zeros(5000, 0, 2, dtype=torch.int16)}),
])  # fmt: skip
def test_experts_beyond_all_memory_are_refused(facts: Any, tensors: Any, tmp_path: Path) -> None:
    """A few hundred bytes; statistics of such a routing would take gigabytes."""
    path, valid = stored(tmp_path / "r", facts, tensors), stored(tmp_path / "valid", GOOD)

    def refused() -> None:
        with pytest.raises(ValueError, match=r"experts in \d+ layers; layers x experts\^2 is at most"):
            Routing.load(path)

    assert memory_taken(refused, lambda: Routing.load(valid)) < 2**23


@pytest.mark.parametrize("text", [
    '{"layers": [0, 1], "num_experts": 5, "num_experts": 6, "shape": [1, 3], "open_ended": false}',
    '{"layers": [0, 1], "num_experts": NaN, "shape": [1, 3], "open_ended": false}',
    "[" * 500, '{"a":' * 500, "9" * 6000,
])  # fmt: skip
def test_strange_facts_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have exactly"):
        Routing.load(stored(tmp_path / "r", text))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    Routing(ROWS, layers=(0, 1), num_experts=5, shape=(1, 3)).save(tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    for cut in (0, 7, 8, 20, len(content) - 1):
        (tmp_path / "r").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="r is not a "):
            Routing.load(tmp_path / "r")
    (tmp_path / "r").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="r is not a safetensors file"):
        Routing.load(tmp_path / "r")
    with (tmp_path / "large").open("wb") as sparse:
        sparse.write(content)
        sparse.truncate(2**42)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "large", tmp_path / "pipe", tmp_path, tmp_path / "missing", ""):
        for read in (Routing.load, read_metadata):
            with pytest.raises(ValueError):
                read(path)


def test_what_the_reader_refuses_is_not_written(tmp_path: Path) -> None:
    good = dict(layers=(0, 1), num_experts=5, shape=(1, 3))
    weights = torch.ones(2, 3, 2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": weights.log() / 0}, "weights has numbers that are not finite"),
        ({"logits": torch.full((2, 3, 5), -torch.inf)}, "logits has numbers that are not finite"),
        ({"weights": weights.long()}, "weights is stored as torch.int64"),
        ({"mask": torch.ones(3)}, "mask is stored as torch.float32"),
        ({"logits": torch.zeros(2, 3, 7)}, "7. of 5 experts"),
        ({"num_experts": 4}, "expert 4, the experts are 0 ... 3"),
        ({"num_experts": 2**31}, "not numbers of layers, experts"),
        ({"num_experts": 2**20}, r"experts\^2 is at most"),
        ({"layers": (0, -1)}, "not numbers of layers"),
        ({"layers": (0, 2**40)}, "not numbers of layers"),
        ({"indices": ROWS - 1}, "expert -2"),
    ]
    for changes, message in cases:
        routing = Routing(**{"indices": ROWS, **good, **changes})
        with pytest.raises(ValueError, match=message):
            routing.save(tmp_path / "r")
    routing = Routing(ROWS, **good)
    strings: list[tuple[Any, str]] = [
        (3, "metadata are strings"), ("x" * 2**24, "at most 16777216 are read"), ("{" * 30_000, "more than 20000 objects"),
        ("\ud800", "cannot be saved"),
    ]
    for value, message in strings:
        with pytest.raises(ValueError, match=message):
            routing.save(tmp_path / "r", {"a": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("changes", [
    {}, {"num_experts": 0}, {"num_experts": 128}, {"num_experts": 129}, {"open_ended": True}, {"shape": None},
    {"layers": (7, 2**31 - 1)}, {"mask": torch.tensor([True, False, True])},
    {"weights": torch.rand(2, 3, 2).bfloat16().requires_grad_()}, {"logits": torch.zeros(2, 3, 5).double()},
    {"indices": ROWS[:, :0], "shape": (4, 0)}, {"indices": torch.full((2, 3, 2), -1)},
    {"indices": ROWS.int().mT.contiguous().mT},
])  # fmt: skip
def test_what_is_written_is_read_again(changes: dict[str, Any], tmp_path: Path) -> None:
    routing = Routing(**{"indices": ROWS, "layers": (0, 1), "num_experts": 5, "shape": (1, 3), **changes})
    routing.save(tmp_path / "r", {"text": "a {title}, [1]"})
    again = Routing.load(tmp_path / "r")
    assert read_metadata(tmp_path / "r") == {"text": "a {title}, [1]"}
    for name in ("layers", "num_experts", "shape", "open_ended"):
        assert getattr(again, name) == getattr(routing, name)
    for name in ("indices", "weights", "logits", "mask"):
        old, new = getattr(routing, name), getattr(again, name)
        assert (old is None) == (new is None) and (old is None or torch.equal(new.to(old.dtype), old))
    expected = torch.int16 if changes.get("num_experts", 0) > 128 else torch.int8
    assert load_file(tmp_path / "r")["indices"].dtype == expected


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    layers: Any = (numpy.int64(0), numpy.int32(3))
    Routing(ROWS, layers=layers, num_experts=int(numpy.int64(5)), shape=(1, 3)).save(tmp_path / "r")
    assert Routing.load(tmp_path / "r").layers == (0, 3)
