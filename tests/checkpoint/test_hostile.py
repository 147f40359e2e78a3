"""Hostile files are refused before memory is allocated, in bounded time, with one clear message.

tests/checkpoint/test_headers.py has invalid headers and links. This file has whole checkpoints with wrong names and sizes,
and a fuzzer: a mutated folder either loads with the weights in the mutated files, or raises CheckpointError or ConfigError.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen35moe.checkpoint import CheckpointError, fill, headers, names, read_headers
from qwen35moe.checkpoint.problems import MAX_ROWS, nearest
from qwen35moe.config import ConfigError
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.support import peer
from tests.support.checkpoints import Tensors, per_expert, write
from tests.support.memory import memory_taken
from tests.support.peer import FULL, LINEAR, Case, odd_shape

MODEL = Qwen3_5MoeForCausalLM
CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def small() -> tuple[Case, Tensors]:
    case = odd_shape(41, num_hidden_layers=2, layer_types=[LINEAR, FULL], num_experts=3, num_experts_per_tok=2,
                     tie_word_embeddings=False)  # fmt: skip
    model = peer.ours(case)
    peer.draw(model, 2)
    return case, model.to(torch.bfloat16).state_dict()


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if memory is mapped, allocated or read for weights."""
    for name in ("map_file", "new_memory", "read_into", "view_of"):
        monkeypatch.setattr(fill, name, lambda *_, **__: pytest.fail("memory was allocated"))


def rewrite(file: Path, change: Any) -> None:
    """Replace the header of a file by `change` of it; the data stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = change(json.loads(content[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("wrong", "right"), [
    ("model.layers.1.self_attn.q_porj.weight", "layers.1.self_attn.q_proj.weight"),
    ("model.layers.0.linear_attn.A_Log", "layers.0.linear_attn.A_log"),
    ("model.layers.0.mlp.experts.gate_up_proj.weight", "layers.0.mlp.experts.gate_up_proj"),
    ("model.layers.1.mlp.shared_experts.up_proj.weight", "layers.1.mlp.shared_expert.up_proj.weight"),
    ("model.embed_token.weight", "embed_tokens.weight"),
])  # fmt: skip
def test_errors_suggest_the_closest_valid_name(
    wrong: str, right: str, small: tuple[Case, Tensors], tmp_path: Path, no_memory: None
) -> None:
    case, tensors = small
    folder = write(tmp_path, {wrong if name == f"model.{right}" else name: value for name, value in tensors.items()}, case.text)
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(folder)
    assert {(problem.kind, problem.subject) for problem in caught.value.problems} == {("missing", right), ("unexpected", wrong)}
    pattern = right.replace(".0.", ".N.").replace(".1.", ".N.")
    assert f"{pattern} is missing and has a similar name" in str(caught.value)


def test_many_and_long_misspelt_names_take_little_time() -> None:
    start = time.process_time()
    wrong = [f"model.layers.{n}.mlp.experts.{e}.up_prj.weight" for n in range(100) for e in range(500)]
    right = [f"layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(100) for e in range(500)]
    closest = nearest(wrong, right)
    assert set(closest.values()) == {"layers.N.mlp.experts.N.up_proj.weight"} and len(closest) == len(wrong)
    assert nearest(["x" * 10**6 + str(n) for n in range(3)], ["x" * 10**6]) != {}
    assert len(nearest([f"strange{chr(97 + n)}" for n in range(26)], ["strange"])) <= MAX_ROWS
    assert time.process_time() - start < 2


def test_a_tensor_stored_twice_is_reported(
    small: tuple[Case, Tensors], tmp_path: Path, no_memory: None
) -> None:
    case, tensors = small
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = write(tmp_path, tensors | {name.replace("model.", "model.language_model."): tensors[name]}, case.text)
    with pytest.raises(CheckpointError, match="stored twice: model.*layers.1.self_attn.k_proj.weight: also as model"):
        MODEL.from_pretrained(folder)
    folder = write(tmp_path / "shards", tensors, case.text, shards=2)
    one, two = sorted(folder.glob("*.safetensors"))
    both = {name: tensors[name] for file in (one, two) for name in _header(file)} | {name: tensors[name]}
    for file in (one, two):
        write(tmp_path / "tmp", {n: both[n] for n in {*_header(file), name}}, {})
        shutil.move(tmp_path / "tmp" / "model.safetensors", file)
    with pytest.raises(CheckpointError, match=f"index and shard disagree: {name}"):
        MODEL.from_pretrained(folder)


def _header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


# ----------------------------------------------------------------------------------------------------------- sizes


def test_a_wrong_dtype_is_reported(small: tuple[Case, Tensors], tmp_path: Path, no_memory: None) -> None:
    """A wrong dtype of another width does not fit the size; one of equal width is refused if no weight can have it."""
    case, tensors = small
    name = "model.layers.1.self_attn.k_proj.weight"
    for dtype, kind in (("I16", "wrong dtype"), ("F32", "bad entry"), ("F8_E4M3", "bad entry"), ("BOOL", "bad entry")):
        file = write(tmp_path, tensors, case.text) / "model.safetensors"
        rewrite(file, lambda entries, dtype=dtype: entries | {name: entries[name] | {"dtype": dtype}})
        with pytest.raises(CheckpointError) as caught:
            MODEL.from_pretrained(tmp_path)
        assert {(problem.kind, problem.subject) for problem in caught.value.problems} == {(kind, name)}


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**63 - 1] * 64, [0, 2**62], [2**32, 2**32, 0]])
def test_shapes_that_overflow_are_reported(
    shape: list[int], small: tuple[Case, Tensors], tmp_path: Path, no_memory: None
) -> None:
    case, tensors = small
    name = "model.norm.weight"
    file = write(tmp_path, tensors, case.text) / "model.safetensors"
    rewrite(file, lambda entries: entries | {name: entries[name] | {"shape": shape}})
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        MODEL.from_pretrained(tmp_path)


BOMBS = {
    "tensors": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' +
                           b',"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' * 1_000_000 + b"}",
    "lists": b'{"a":[' + b"[]," * 10_000_000 + b"[]]}",
    "objects": b'{"a":[' + b"{}," * 10_000_000 + b"{}]}",
    "numbers": b'{"a":[' + b"1.5," * 10_000_000 + b"1]}",
    "deep": b"[" * 50_000_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("where", ["header", "index"])
def test_json_bombs_are_refused(kind: str, where: str, small: tuple[Case, Tensors], tmp_path: Path) -> None:
    """JSON that would take gigabytes is refused by counting, before parsing: no memory beyond that of the text."""
    case, tensors = small
    folder = write(tmp_path, tensors, case.text, shards=2)
    text = BOMBS[kind]
    if where == "index":
        (folder / "model.safetensors.index.json").write_bytes(text)
    else:
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    valid_folder = write(tmp_path / "valid", tensors, case.text, shards=2)

    def refused() -> None:
        start = time.process_time()
        with pytest.raises(CheckpointError, match="too many tensors"):
            MODEL.from_pretrained(folder)
        assert time.process_time() - start < 2

    assert memory_taken(refused, lambda: MODEL.from_pretrained(valid_folder)) < 3 * len(text)


def test_many_tensors_are_read_in_bounded_time(
    small: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = small
    count = 30_000
    entries = {f"model.layers.{n // 100}.mlp.experts.{n % 100}.x": {"dtype": "I8", "shape": [1], "data_offsets": [n, n + 1]}
               for n in range(count)}  # fmt: skip
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    (tmp_path / "config.json").write_text(json.dumps(case.text))
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(tmp_path)
    assert sum(problem.kind == "unexpected" for problem in caught.value.problems) == count
    assert len(str(caught.value).splitlines()) <= 22 and time.process_time() - start < 5
    monkeypatch.setattr(headers, "MAX_TENSORS", 150)  # of all shards together
    folder = write(tmp_path / "many", {f"x{n}": torch.ones(1) for n in range(200)}, {}, shards=2)
    with pytest.raises(CheckpointError, match="too many tensors: model-0000.-of-00002.safetensors: more than 150 in all"):
        read_headers(folder)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10_000, "layer_types": None},
    {"vocab_size": 2**31 - 1, "hidden_size": 2**15},
    {"num_experts": 2**31 - 1},
    {"moe_intermediate_size": 2**31 - 1, "num_experts": 10**6},
    {"num_attention_heads": 2**31 - 1, "num_key_value_heads": 1},
    {"linear_num_value_heads": 10**9, "linear_num_key_heads": 1},
    {"linear_conv_kernel_dim": 2**31 - 1},
    {"max_position_embeddings": 2**53},
])  # fmt: skip
def test_configurations_of_absurd_size_are_refused(change: dict[str, Any], small: tuple[Case, Tensors], tmp_path: Path) -> None:
    case, tensors = small
    folder = write(tmp_path, tensors, {key: value for key, value in (case.text | change).items() if value is not None})
    valid_folder = write(tmp_path / "valid", tensors, case.text)

    def load() -> None:
        start = time.process_time()
        if "max_position_embeddings" in change:
            assert MODEL.from_pretrained(folder) is not None  # limits the rotary tables, which are made on demand
        else:
            with pytest.raises((CheckpointError, ConfigError)):
                MODEL.from_pretrained(folder)
        assert time.process_time() - start < 3

    assert memory_taken(load, lambda: MODEL.from_pretrained(valid_folder)) < 16 * 2**20


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**5, b'{"hidden_size": ' + b"9" * 10**6 + b"}", b"\xff\xfe", b"",
                                  b'{"num_hidden_layers": NaN}', b"null", b"[1, 2]"])  # fmt: skip
def test_an_invalid_configuration_is_refused(text: bytes, small: tuple[Case, Tensors], tmp_path: Path, no_memory: None) -> None:
    case, tensors = small
    (write(tmp_path, tensors, case.text) / "config.json").write_bytes(text)
    with pytest.raises(ConfigError):
        MODEL.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------ the fuzzer


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.integers(), st.sampled_from([2**31, 2**53, 2**63, 10**30]), st.floats(),
    st.text(max_size=5), st.just([]), st.just({}), st.lists(st.integers(0, 9), max_size=3), st.just("../config.json"),
    st.sampled_from([*headers._BITS, "model.norm.weight", "gptq", "\ud800", "a\0b"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def valid(small: tuple[Case, Tensors]) -> Iterator[list[tuple[Path, dict[str, bytes]]]]:
    """Folders of several layouts with their contents."""
    case, tensors = small
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        fp8: Tensors = {}
        for name, value in per_expert(tensors).items():
            if ".mlp.experts." in name:
                fp8 |= {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.25).bfloat16()}
            else:
                fp8[name] = value
        folders = [write(home / "one", tensors, case.text), write(home / "shards", per_expert(tensors), case.text, shards=2),
                   write(home / "fp8", fp8, case.text)]  # fmt: skip
        yield [(folder, {file.name: file.read_bytes() for file in folder.iterdir()}) for folder in folders]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*path, key))


def mutate(value: Any, data: st.DataObject) -> Any:
    """A JSON value with one part replaced, deleted, renamed, or swapped."""
    value = copy.deepcopy(value)
    *path, last = data.draw(st.sampled_from([place for place in places(value) if place]))
    parent = value
    for key in path:
        parent = parent[key]
    how = data.draw(st.sampled_from(["junk", "junk", "swap", "delete", "rename", "nudge"]))
    if how == "delete":
        del parent[last]
    elif how == "rename" and isinstance(parent, dict):
        new = data.draw(st.sampled_from([str(last) + "x", str(last)[:-1], f"model.{last}", "", "layers.0"]))
        parent[new] = parent.pop(last)
    elif how == "nudge" and isinstance(parent[last], int):
        parent[last] += data.draw(st.sampled_from([-1, 1, 2, 8]))
    elif how == "swap":
        other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else list(range(len(parent)))))
        parent[last], parent[other] = parent[other], parent[last]
    else:
        parent[last] = data.draw(JUNK)
    return value


def mutated(content: bytes, data: st.DataObject) -> bytes:
    """A safetensors file with another header, other bytes in it, or another length."""
    length = int.from_bytes(content[:8], "little")
    how = data.draw(st.sampled_from(["header", "header", "header", "bytes", "length", "cut"]))
    if how == "header":
        text = json.dumps(mutate(json.loads(content[8 : 8 + length]), data)).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    if how == "bytes":
        at = data.draw(st.integers(0, length + 7))
        return content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    if how == "length":
        return data.draw(st.integers(0, 2**64 - 1) | st.integers(length - 9, length + 9)).to_bytes(8, "little") + content[8:]
    return content[: data.draw(st.integers(0, len(content) - 1))]


def expected_weights(folder: Path) -> Tensors:
    """The parameters by canonical name, read by the definition of the format, experts stacked."""
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name == "__metadata__":
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            dtype = CODES.get(entry["dtype"], torch.float8_e4m3fn)
            value = torch.frombuffer(bytearray(content[begin:end]), dtype=dtype) if end > begin else torch.empty(0)
            tensors[str(names.canonical(name))] = value.view(entry["shape"])
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(name)
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = (tensors[weight].float() * scale.float()).to(torch.bfloat16)
    for layer in range(2):
        module = f"layers.{layer}.mlp.experts"
        if f"{module}.0.up_proj.weight" in tensors:
            singles = [[tensors.pop(f"{module}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(3)]
            tensors[f"{module}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in singles])
            tensors[f"{module}.down_proj"] = torch.stack([down for _, _, down in singles])
    return tensors


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_mutation_loads_exactly_or_raises_a_clear_error(
    valid: list[tuple[Path, dict[str, bytes]]], data: st.DataObject
) -> None:
    folder, contents = data.draw(st.sampled_from(valid))
    name = data.draw(st.sampled_from(sorted(contents)))
    if name.endswith(".json"):
        changed = json.dumps(mutate(json.loads(contents[name]), data)).encode()
    else:
        changed = mutated(contents[name], data)
    (folder / name).write_bytes(changed)
    try:
        model = MODEL.from_pretrained(folder, weights=data.draw(st.sampled_from(["map", "copy"])))
        expected = expected_weights(folder)
        for key, value in model.state_dict().items():
            key = key.removeprefix("model.")
            if key == "lm_head.weight" and key not in expected:
                key = "embed_tokens.weight"
            assert torch.equal(value, expected[key].to(value.dtype)), key
    except (CheckpointError, ConfigError) as error:
        message = str(error).replace("\n", " ")
        assert message.isprintable() and len(message) < 20_000
    finally:
        (folder / name).write_bytes(contents[name])
