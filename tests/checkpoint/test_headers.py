"""Headers are untrusted: every invalid header or index is detected, and all problems are reported at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen35moe.checkpoint import CheckpointError, Problem, headers, names, read_headers
from qwen35moe.checkpoint.problems import MAX_ROWS, fold, ranges, shown


def safetensors(entries: dict[str, Any] | bytes, data: int | bytes = 0, length: int | None = None) -> bytes:
    """The bytes of a file with this header, valid or not."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    body = data if isinstance(data, bytes) else bytes(data)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def single(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def sharded(folder: Path, weight_map: dict[str, Any], **shards: dict[str, Any]) -> Path:
    """Shards a, b, ... (tensors of one float each) and an index with this weight_map."""
    for name, tensors in shards.items():
        save_file({key: torch.ones(1) * value for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def problems_of(folder: Path) -> list[Problem]:
    with pytest.raises(CheckpointError) as caught:
        read_headers(folder)
    return list(caught.value.problems)


def test_a_file_of_the_safetensors_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_headers(tmp_path)
    assert header.metadata == {"format": "pt"} and header.files == (tmp_path / "model.safetensors",)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        actual = header.tensors[name]
        assert actual.shape == tuple(tensor.shape) and actual.nbytes == tensor.nbytes and actual.numel == tensor.numel()
        if tensor.numel():
            raw = bytearray(content[actual.offset : actual.offset + actual.nbytes])
            assert torch.equal(torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape), tensor)
    assert header.nbytes == sum(tensor.nbytes for tensor in tensors.values())


INVALID = {
    "shorter than a header": (b"\1\2\3", "bad header", "3"),
    "empty": (b"", "bad header", "file of 0"),
    "header longer than the file": (safetensors({}, length=999), "bad header", "999 bytes of header"),
    "header beyond the limit": (safetensors({}, length=2**63), "bad header", "at most 100000000"),
    "not JSON": (safetensors(b'{"a": '), "not JSON", ""),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not JSON", "utf-8"),
    "nested too deep": (safetensors(b"[" * 200_000), "not JSON", ""),
    "a number of many digits": (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON", ""),
    "a list": (safetensors(b"[]"), "not a JSON object", ""),
    "metadata that are not a map of strings": (safetensors({"__metadata__": {"a": 1}}), "bad header", "__metadata__"),
    "an entry that is not an object": (safetensors({"a": 3}), "bad entry", "its keys must be"),
    "an entry with an extra key": (safetensors({"a": entry([1], 0, 4) | {"x": 1}}, 4), "bad entry", "its keys must be"),
    "an unknown dtype": (safetensors({"a": entry([1], 0, 4, "F33")}, 4), "bad entry", "F33"),
    "a dtype that is not a string": (safetensors({"a": entry([1], 0, 4, ["F32"])}, 4), "bad entry", "unknown dtype"),
    "a negative size": (safetensors({"a": entry([-1], 0, 4)}, 4), "bad entry", "shape"),
    "a size that is a boolean": (safetensors({"a": entry([True], 0, 4)}, 4), "bad entry", "shape"),
    "a size that is a fraction": (safetensors({"a": entry([1.0], 0, 4)}, 4), "bad entry", "shape"),
    "a size beyond all memory": (safetensors({"a": entry([2**40, 2**40], 0, 4)}, 4), "bad entry", "takes"),
    "offsets backwards": (safetensors({"a": entry([1], 4, 0)}, 4), "bad entry", "data_offsets"),
    "negative offsets": (safetensors({"a": entry([1], -4, 0)}, 4), "bad entry", "data_offsets"),
    "three offsets": (safetensors({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 8]}}, 8), "bad entry", "data_off"),
    "fewer bytes than the shape takes": (safetensors({"a": entry([3], 0, 4)}, 4), "bad entry", "takes 12"),
    "half a byte": (safetensors({"a": entry([3], 0, 1, "F4")}, 1), "bad entry", "1 bytes"),
    "an overlap": (safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12), "overlaps", "ends at 8"),
    "the same bytes twice": (safetensors({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8), "overlaps", ""),
    "a hole": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12), "hole before", "begins at byte 8"),
    "a hole at the start": (safetensors({"a": entry([1], 4, 8)}, 8), "hole before", "begins at byte 4"),
    "bytes after the last tensor": (safetensors({"a": entry([1], 0, 4)}, 9), "bad header", "5 bytes after"),
    "data cut off": (safetensors({"a": entry([4], 0, 16)}, 15), "cut off", "the file has"),
    "data far beyond the file": (safetensors({"a": entry([2**50], 0, 2**52)}, 4), "cut off", "the header describes"),
    "a name twice": (safetensors(b'{"a": {}, "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', 4),
                     "name occurs twice", ""),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "not downloaded",
                             "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_header_is_reported(case: str, tmp_path: Path) -> None:
    content, kind, detail = INVALID[case]
    problems = problems_of(single(tmp_path, content))
    assert any(problem.kind == kind and detail in problem.detail for problem in problems), problems
    assert len(problems) == 1, problems


def test_several_problems_are_reported_together(tmp_path: Path) -> None:
    wrong = {"a": entry([-1], 0, 4), "b": entry([2], 0, 4), "c": entry([1], 0, 4, "?")}
    assert {problem.subject for problem in problems_of(single(tmp_path, safetensors(wrong, 4)))} == {"a", "b", "c"}


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": 1}, b={"y": 2})
    header = read_headers(folder)
    assert {name: t.file.name for name, t in header.tensors.items()} == {"x": "a.safetensors", "y": "b.safetensors"}


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    weight_map = {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors", "w": "gone.safetensors"}
    problems = problems_of(sharded(tmp_path, weight_map, a={"x": 1, "y": 2, "extra": 3}, b={"y": 2}))
    assert {(problem.kind, problem.subject) for problem in problems} == {
        ("index and shard disagree", "y"),  # also in a.safetensors
        ("index and shard disagree", "extra"),
        ("index and shard disagree", "z"),
        ("missing file", "gone.safetensors"),
    }


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", '"x"'])
def test_an_invalid_index_is_reported(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert problems_of(tmp_path)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    text = '{"weight_map": {"x": "gone.safetensors", "x": "a.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert problems_of(tmp_path)[0] == Problem("name occurs twice", "x", "in model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "", "a/../../out.safetensors", "x\0y", ".."])
def test_an_index_may_not_point_outside(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "out.safetensors")
    (tmp_path / "inside").mkdir()
    problems = problems_of(sharded(tmp_path / "inside", {"x": name}))
    assert [problem.kind for problem in problems] == ["bad file name"]


@pytest.mark.parametrize("form", ["file", "folder", "index", "single", "loop", "fifo"])
def test_a_link_may_not_point_outside(form: str, tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    sharded(outside, {"x": "a.safetensors"}, a={"x": 1})
    if form == "file":
        sharded(inside, {"x": "a.safetensors"})
        (inside / "a.safetensors").symlink_to(outside / "a.safetensors")
    elif form == "folder":
        sharded(inside, {"x": "sub/a.safetensors"})
        (inside / "sub").symlink_to(outside)
    elif form == "index":
        (inside / "model.safetensors.index.json").symlink_to(outside / "model.safetensors.index.json")
    elif form == "single":
        (inside / "model.safetensors").symlink_to(outside / "a.safetensors")
    elif form == "loop":
        (inside / "model.safetensors").symlink_to(inside / "model.safetensors")
    else:
        os.mkfifo(inside / "model.safetensors")  # opening it would wait forever
    expected = {"loop": "missing file", "fifo": "not a file"}.get(form, "outside the folder")
    assert [problem.kind for problem in problems_of(inside)] == [expected]


def test_links_of_the_hub_cache_and_inside_the_folder_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, blobs / "deadbeef")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/deadbeef"))
    assert list(read_headers(snapshot).tensors) == ["x"]
    (tmp_path / "data").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "data" / "weights")
    (tmp_path / "model.safetensors").symlink_to("data/weights")
    assert list(read_headers(tmp_path).tensors) == ["x"]


def test_the_single_file_takes_precedence_over_an_index(tmp_path: Path) -> None:
    """As in transformers; an interrupted save may leave the index."""
    sharded(tmp_path, {"x": "a.safetensors"}, a={"x": 1})
    save_file({"y": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_headers(tmp_path).tensors) == ["y"]


def test_errors_list_the_files_of_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder .*nowhere"):
        read_headers(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="it contains nothing"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="pickles .*Convert them to safetensors files"):
        read_headers(tmp_path)


def test_an_index_of_pickles_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x02.")
    assert problems_of(sharded(tmp_path, {"x": "x.bin"}))[0].kind == "bad header"


def test_no_memory_is_allocated_for_sizes_in_a_header(tmp_path: Path) -> None:
    """A header of 2 ** 60 bytes is refused by comparing it with the file; reading it would end the process."""
    single(tmp_path, safetensors({}, length=2**60))
    assert problems_of(tmp_path)[0].kind == "bad header"


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.", "",
                                    "model.language_model.language_model.language_model."])  # fmt: skip
def test_every_wrapper_of_the_text_model_is_removed(prefix: str) -> None:
    assert names.canonical(prefix + "layers.3.mlp.gate.weight") == "layers.3.mlp.gate.weight"
    assert names.canonical(prefix + "embed_tokens.weight") == "embed_tokens.weight"
    assert names.canonical(prefix + "lm_head.weight") == "lm_head.weight"


def test_other_parts_and_unknown_names() -> None:
    for name in ("model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias", "vision_tower.blocks.0.norm1.bias",
                 "model.language_model.visual.blocks.0.norm1.bias"):  # fmt: skip
        assert names.canonical(name) == "visual.blocks.0.norm1.bias"
    assert names.canonical("mtp.layers.0.input_layernorm.weight") == "mtp.layers.0.input_layernorm.weight"
    for name in ("base_model.model.layers.0.x", "transformer.h.0.w", "layers", "", "model.", "modell.norm.weight"):
        assert names.canonical(name) is None


def test_published_names() -> None:
    assert names.published("layers.3.x", multimodal=True) == "model.language_model.layers.3.x"
    assert names.published("layers.3.x", multimodal=False) == "model.layers.3.x"
    for multimodal in (True, False):
        assert names.published("lm_head.weight", multimodal=multimodal) == "lm_head.weight"
        assert names.published("mtp.fc.weight", multimodal=multimodal) == "mtp.fc.weight"
        assert names.published("visual.pos_embed.weight", multimodal=multimodal) == "model.visual.pos_embed.weight"


def test_expert_names() -> None:
    assert names.grouped_experts("layers.3.mlp.experts.gate_up_proj") == (
        "layers.3.mlp.experts", ("gate_proj", "up_proj"))  # fmt: skip
    assert names.grouped_experts("layers.3.mlp.shared_expert.gate_proj.weight") is None
    assert names.expert_of("mtp.layers.0.mlp.experts.17.up_proj.weight") == ("mtp.layers.0.mlp.experts", 17, "up_proj")
    for rest in ("07.up_proj.weight", "1.up_proj.weight_scale_inv", "up_proj.weight", f"{'9' * 5000}.up_proj.weight"):
        assert names.expert_of(f"layers.3.mlp.experts.{rest}") is None


# ------------------------------------------------------------------------------------------------------------ report


def test_problems_that_differ_in_a_number_are_one_row() -> None:
    many = [Problem("missing", f"layers.{n}.mlp.experts.{e}.up_proj.weight") for n in (0, 1, 2, 5) for e in range(3)]
    many.append(Problem("missing", "layers.7.norm.weight", "[3]"))
    assert fold(many) == [
        "missing: layers.{0-2,5}.mlp.experts.{0-2}.up_proj.weight (12 tensors)",
        "missing: layers.7.norm.weight: [3]",
    ]
    assert ranges([5, 3, 4, 9, 9]) == "{3-5,9}"
    assert ranges(range(0, 40, 2)) == "{0,2,4,6,8,10,12,...,38}"


def test_a_long_report_is_cut_and_the_error_has_all_problems() -> None:
    many = [Problem("unexpected", f"name{chr(65 + n)}.weight") for n in range(26)]
    error = CheckpointError("bad", many)
    assert len(str(error).splitlines()) == 1 + MAX_ROWS + 1 and "6 more rows" in str(error)
    assert len(error.problems) == 26


def test_names_from_files_are_made_safe_to_print() -> None:
    assert shown("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert shown("\ud800") == "\\ud800"
    assert len(shown("x" * 10_000)) < 300
    assert "\x1b" not in str(CheckpointError("bad", [Problem("unexpected", "layers.1.\x1b[2J*")]))


def test_every_dtype_of_the_format_has_its_size() -> None:
    """Compared with the library's own table, for all dtypes of torch."""
    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
             torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
             torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"}  # fmt: skip
    for dtype, code in codes.items():
        assert headers._BITS[code] == 8 * dtype.itemsize, code
