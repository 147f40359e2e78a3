"""Selected layers, experts and parts: values of the full model, names of the smaller model, and no other byte is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe import taps
from qwen35moe.checkpoint import CheckpointError, fill, headers, transfer
from qwen35moe.checkpoint.selection import runs
from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel
from qwen35moe.routing import Routing
from tests.support import peer
from tests.support.checkpoints import LAYOUTS, Tensors, Whole, parts_of, per_expert, publish, write
from tests.support.peer import FULL, LINEAR, Case, odd_shape

MODEL = Qwen3_5MoeForCausalLM
PATTERN = [LINEAR, FULL, LINEAR, LINEAR, FULL]


@pytest.fixture(scope="module")
def five() -> tuple[Case, Any]:
    """A model of five layers and seven experts in bfloat16."""
    case = odd_shape(31, num_hidden_layers=5, layer_types=PATTERN, num_experts=7, num_experts_per_tok=2,
                     tie_word_embeddings=False)  # fmt: skip
    model = peer.ours(case)
    peer.draw(model, 9)
    return case, model.to(torch.bfloat16)


def folder_of(path: Path, five: tuple[Case, Any], layout: str, shards: int = 1) -> Path:
    case, model = five
    tensors = model.state_dict()
    return write(path, per_expert(tensors) if layout == "per_expert" else tensors, case.text, shards)


def expected(full: Tensors, layers: list[int], experts: dict[int, list[int]] | None) -> Tensors:
    """The smaller model's weights, selected from the full model's."""
    selected: Tensors = {}
    for name, value in full.items():
        if not name.startswith("model.layers."):
            selected[name] = value
            continue
        _, _, number, rest = name.split(".", 3)
        if int(number) not in layers:
            continue
        if experts is not None and (rest == "mlp.gate.weight" or rest.startswith("mlp.experts.")):
            value = torch.stack([value[expert] for expert in experts[int(number)]])
        selected[f"model.layers.{layers.index(int(number))}.{rest}"] = value
    return selected


def assert_equal(model: torch.nn.Module, wanted: Tensors) -> None:
    actual = model.state_dict()
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


CHOICES: dict[str, tuple[dict[str, Any], list[int], dict[int, list[int]] | None]] = {
    "the first": ({"layers": range(2)}, [0, 1], None),
    "one MoE layer": ({"layers": [3]}, [3], None),
    "in any order": ({"layers": iter([4, 1, 3])}, [1, 3, 4], None),
    "experts of all layers": ({"experts": range(3)}, [0, 1, 2, 3, 4], dict.fromkeys(range(5), [0, 1, 2])),
    "experts in another order": ({"experts": [6, 0, 1, 4], "layers": {2, 4}}, [2, 4], dict.fromkeys((2, 4), [6, 0, 1, 4])),
    "experts per layer": ({"experts": {1: [2, 3], 4: [6, 0]}, "layers": (1, 4)}, [1, 4], {1: [2, 3], 4: [6, 0]}),
    "tensors as numbers": ({"experts": torch.tensor([5, 2]), "layers": torch.arange(1, 3)}, [1, 2],
                           dict.fromkeys((1, 2), [5, 2])),
}  # fmt: skip


@pytest.mark.parametrize("how", ["map", "copy"])
@pytest.mark.parametrize("layout", ["grouped", "per_expert"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_selection_is_loaded_bit_for_bit(
    choice: str, layout: str, how: str, five: tuple[Case, Any], tmp_path: Path
) -> None:
    options, layers, experts = CHOICES[choice]
    if choice == "in any order":
        options = {"layers": iter([4, 1, 3])}
    model = MODEL.from_pretrained(folder_of(tmp_path / "full", five, layout, shards=2), weights=how, **options)
    wanted = expected(five[1].state_dict(), layers, experts)
    assert_equal(model, wanted)
    text = model.config.text_config
    assert text.num_hidden_layers == len(layers) and list(text.layer_types) == [PATTERN[layer] for layer in layers]
    assert text.num_experts == (7 if experts is None else len(experts[layers[0]]))
    assert model.model.source_layers == tuple(layers)
    # The model runs and can be saved, and the saved checkpoint loads without these options.
    with torch.no_grad():
        logits = model(five[0].ids()).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path / "small", layout=layout)
    again = MODEL.from_pretrained(tmp_path / "small", weights=how)
    assert_equal(again, wanted)
    with torch.no_grad():
        assert torch.equal(again(five[0].ids()).logits, logits)


def test_the_first_layers_compute_the_same_as_in_the_full_model(five: tuple[Case, Any], tmp_path: Path) -> None:
    model = MODEL.from_pretrained(folder_of(tmp_path, five, "grouped"), layers=range(3), weights="copy")
    ids = five[0].ids()
    with torch.no_grad():
        few = model(ids, output_hidden_states=True).hidden_states
        many = five[1](ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(few[:3], many[:3], strict=True))


def test_experts_in_another_order_are_the_same_model(five: tuple[Case, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, five, "grouped")
    order = [4, 2, 6, 0, 5, 1, 3]
    model = MODEL.from_pretrained(folder, experts=order, dtype=torch.float32)
    plain = MODEL.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        peer.assert_close(model(five[0].ids()).logits, plain(five[0].ids()).logits, 1e-5)


# ----------------------------------------------------------------------------------------------------- bytes read


class Bytes:
    """Records which bytes of which file were mapped, read or read ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, set[tuple[int, int]]] = {}
        view, exactly, ahead = fill.view_of, transfer.read_exactly, fill.ReadAhead
        open_maps: dict[int, str] = {}
        real_map = fill.map_file

        def map_file(file: Path) -> Any:
            mapped = real_map(file)
            open_maps[id(mapped)] = file.name
            self.kept.append(mapped)
            return mapped

        def view_of(mapped: Any, offset: int, shape: Any, dtype: torch.dtype) -> Any:
            count = int(torch.Size(shape).numel()) * dtype.itemsize
            if id(mapped) in open_maps:  # not new memory
                self.seen.setdefault(open_maps[id(mapped)], set()).add((offset, offset + count))
            return view(mapped, offset, shape, dtype)

        def read_exactly(descriptor: int, address: int, nbytes: int, offset: int) -> None:
            name = Path(f"/proc/self/fd/{descriptor}").resolve().name
            self.seen.setdefault(name, set()).add((offset, offset + nbytes))
            exactly(descriptor, address, nbytes, offset)

        def read_ahead(ranges: Any) -> Any:
            for file, begin, end in ranges:
                assert (begin, end) in self.seen[file.name]
            return ahead(ranges)

        self.kept: list[Any] = []
        read_ahead.possible = ahead.possible  # type: ignore[attr-defined]
        monkeypatch.setattr(fill, "map_file", map_file)
        monkeypatch.setattr(fill, "view_of", view_of)
        monkeypatch.setattr(transfer, "read_exactly", read_exactly)
        monkeypatch.setattr(fill, "ReadAhead", read_ahead)

    @property
    def total(self) -> int:
        return sum(end - begin for ranges in self.seen.values() for begin, end in ranges)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bytes]:
    yield Bytes(monkeypatch)


@pytest.mark.parametrize("how", ["map", "copy"])
@pytest.mark.parametrize("layout", ["grouped", "per_expert"])
@pytest.mark.parametrize("options", [{}, {"layers": [1, 3]}, {"experts": [5, 1, 2]}, {"layers": [4], "experts": {4: [0, 6]}}])
def test_only_selected_bytes_are_read(
    options: dict[str, Any], layout: str, how: str, five: tuple[Case, Any], tmp_path: Path, counted: Bytes
) -> None:
    """Every stored byte of the parameters once, and no other byte."""
    model = MODEL.from_pretrained(folder_of(tmp_path, five, layout, shards=3), weights=how, **options)
    assert counted.total == sum(parameter.nbytes for parameter in model.parameters())
    ranges = sorted((file, *pair) for file, pairs in counted.seen.items() for pair in pairs)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(ranges, ranges[1:], strict=False))


def test_fp8_bytes_are_read_once_with_their_scales(tmp_path: Path, counted: Bytes) -> None:
    layout = LAYOUTS["3.6 MoE, FP8"]
    folder, full = publish(tmp_path, layout)
    header = headers.read_headers(folder)
    model = MODEL.from_pretrained(folder, layers=[1], experts=[3, 0])
    names = [name for name in header.tensors if ".layers.1." in name and not name.startswith("mtp.")]
    names = [name for name in names if ".experts." not in name or ".experts.0." in name or ".experts.3." in name]
    names += ["lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"]
    router = header.tensors["model.language_model.layers.1.mlp.gate.weight"].nbytes
    assert counted.total == sum(header.tensors[name].nbytes for name in names) - router * 3 // 5
    up = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(up, full["layers.1.mlp.experts.gate_up_proj"][[3, 0]])


def test_grouped_fp8_experts_can_be_selected(tmp_path: Path) -> None:
    folder, full = publish(tmp_path, LAYOUTS["FP8, experts grouped"])
    model = MODEL.from_pretrained(folder, experts=[4, 1, 2])
    for layer in (0, 1):
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
            actual = model.get_parameter(f"model.layers.{layer}.{name}")
            assert torch.equal(actual, full[f"layers.{layer}.{name}"][[4, 1, 2]])


def test_files_without_selected_tensors_are_not_opened_and_may_be_missing(five: tuple[Case, Any], tmp_path: Path) -> None:
    case, model = five
    folder = folder_of(tmp_path, five, "grouped")
    index: dict[str, str] = {}
    for layer in range(5):  # a file per layer
        (tmp_path / str(layer)).mkdir()
        own = {name: value for name, value in model.state_dict().items() if f".layers.{layer}." in name}
        write(tmp_path / str(layer), own, {})
        index |= dict.fromkeys(own, f"layer{layer}.safetensors")
        (tmp_path / str(layer) / "model.safetensors").rename(folder / f"layer{layer}.safetensors")
    rest = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    write(folder, rest, case.text)
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    index |= dict.fromkeys(rest, "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_equal(MODEL.from_pretrained(folder), model.state_dict())
    for layer in (0, 3):
        (folder / f"layer{layer}.safetensors").unlink()
    (folder / "layer4.safetensors").write_bytes(b"not a safetensors file")
    small = MODEL.from_pretrained(folder, layers=[1, 2])
    assert_equal(small, expected(model.state_dict(), [1, 2], None))
    assert small.loading_report.files == 3
    others = sum(f".layers.{layer}." in name for name in index for layer in (0, 3, 4))
    assert small.loading_report.left_out == {"layers and experts that were not selected": others}
    with pytest.raises(CheckpointError, match="missing file: layer3.safetensors"):
        MODEL.from_pretrained(folder, layers=[1, 3])


def test_a_layer_of_full_size_maps_only_its_own_bytes(tmp_path: Path, counted: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5-35B-A3B in a sparse file of 72 GB; one layer of 1.6 GB and the parts outside the layers are mapped."""
    config = Config.preset("35b-a3b")
    at, entries = 0, {}
    for tensor in config.tensor_shapes(mtp=True, mtp_experts="per_expert"):
        size = torch.Size(tensor.shape).numel() * (4 if tensor.dtype == "F32" else 2)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert at == 71_903_655_008
    monkeypatch.setattr(fill, "available_memory", lambda: 0)  # no reading ahead
    model = MODEL.from_pretrained(tmp_path, layers=[3])
    layer = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    assert 1.6e9 < layer < 1.8e9 and model.loading_report.copied == model.loading_report.stacked == 0
    assert counted.total == layer + 2 * 248320 * 2048 * 2 + 2048 * 2
    fewer = MODEL.from_pretrained(tmp_path, layers=[3], experts=range(32, 64))
    assert fewer.model.layers[0].mlp.experts.gate_up_proj.shape == (32, 1024, 2048)
    assert fewer.loading_report.mapped == model.loading_report.mapped  # a range of experts lies in one piece


# ------------------------------------------------------------------------------------------------- layer numbers


def test_routing_and_named_values_keep_the_checkpoints_layer_numbers(five: tuple[Case, Any], tmp_path: Path) -> None:
    model = MODEL.from_pretrained(folder_of(tmp_path, five, "grouped"), layers=[1, 3])
    ids = five[0].ids()
    with torch.no_grad(), taps.record(model, "layers.*.mlp.indices") as seen:
        out = model(ids, output_routing=True)
        again = model(ids, routing=out.routing, output_routing=True)
        decided: list[int] = []

        def decide(layer: int, logits: torch.Tensor) -> torch.Tensor:
            decided.append(layer)
            return torch.zeros(logits.shape[0], 1, dtype=torch.long)

        model(ids, routing=decide)
        batch = model(ids, routing=out.routing.to_batch(), output_routing=True).routing
    assert out.routing.layers == batch.layers == (1, 3) and decided == [1, 3]
    assert list(seen) == ["layers.1.mlp.indices", "layers.3.mlp.indices"]
    assert torch.equal(seen.all("layers.3.mlp.indices")[0], out.routing.indices[1])
    assert torch.equal(again.logits, out.logits) and torch.equal(batch.indices, out.routing.indices)
    one = Routing(out.routing.indices[1:], layers=(3,))
    with torch.no_grad():
        assert torch.equal(model(ids, routing=one, output_routing=True).routing.indices[1], out.routing.indices[1])
    with pytest.raises(ValueError, match=r"the routing holds layer 0, the model has the layers \[1, 3\]"):
        model(ids, routing=Routing(out.routing.indices[1:], layers=(0,)))
    with pytest.raises(ValueError, match="layers.0.mlp.output.*matches no named value"):
        taps.record(model, "layers.0.mlp.output")


# -------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("parts", [{"text"}, {"text", "mtp"}, {"text", "vision"}, ["mtp", "vision", "text"]])
def test_parts_of_a_class_that_has_them(parts: Any, tmp_path: Path) -> None:
    folder, full = publish(tmp_path, LAYOUTS["3.5 MoE, bf16"])
    model = Whole.from_pretrained(folder, parts=parts, layers=[1], experts=[2, 4])
    actual = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    part_of = {"visual": "vision", "mtp": "mtp"}
    kept = [name for name in full if not name.startswith("layers.0.") and part_of.get(name.split(".")[0], "text") in parts]
    assert actual.keys() == {name.replace("layers.1.", "layers.0.") if name.startswith("layers.") else name for name in kept}
    for name in kept:
        value = full[name][[2, 4]] if ".experts." in name or name.endswith("mlp.gate.weight") else full[name]
        assert torch.equal(actual[name.replace("layers.1.", "layers.0.") if name.startswith("layers.") else name], value)
    assert "mtp" in parts or Whole.from_pretrained(folder).state_dict().keys().isdisjoint({"mtp.fc.weight"})


def test_the_mtp_heads_experts_can_be_selected_separately(tmp_path: Path) -> None:
    folder, full = publish(tmp_path, LAYOUTS["3.5 MoE, bf16"])
    ids = {0: [2, 4], 1: [0, 1], "mtp": [3, 1]}
    model = Whole.from_pretrained(folder, parts={"text", "mtp"}, experts=ids)
    name = "mtp.layers.0.mlp.experts.down_proj"
    assert torch.equal(model.get_parameter(name), full[name][[3, 1]])
    del ids["mtp"]
    with pytest.raises(ValueError, match="none for the MTP head: add {'mtp': ids}"):
        Whole.from_pretrained(folder, parts={"text", "mtp"}, experts=ids)


def test_text_classes_have_the_part_text(five: tuple[Case, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, five, "grouped")
    assert_equal(MODEL.from_pretrained(folder, parts={"text"}), five[1].state_dict())
    assert len(Qwen3_5MoeTextModel.from_pretrained(folder, parts="text", layers=[2]).layers) == 1


# ------------------------------------------------------------------------------------------------------- errors


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a layer beyond": ({"layers": [1, 5]}, r"layers= names layer 5; the checkpoint has layers 0 \.\.\. 4"),
    "a negative layer": ({"layers": [-1]}, r"layer -1; the checkpoint has layers 0 \.\.\. 4"),
    "a layer twice": ({"layers": [1, 1]}, "layers= names 1 twice"),
    "no layer": ({"layers": []}, "layers= is empty"),
    "a number for layers": ({"layers": 3}, r"layers=3 must be a list of numbers"),
    "a word for layers": ({"layers": "3"}, r"layers='3' must be a list of numbers"),
    "a fraction": ({"layers": [1.5]}, "a whole number, not 1.5"),
    "true": ({"layers": [True]}, "a whole number, not True"),
    "an expert beyond": ({"experts": [0, 7]}, r"experts= names expert 7; the checkpoint has experts 0 \.\.\. 6"),
    "an expert twice": ({"experts": [3, 3, 1]}, "experts= names 3 twice"),
    "fewer than top-k": ({"experts": [3]}, "names 1 experts; a token uses num_experts_per_tok = 2"),
    "different numbers": ({"experts": {0: [1, 2], 1: [1, 2, 3]}, "layers": [0, 1]}, r"names \[2, 3\] experts: .* the same"),
    "no ids at all": ({"experts": {}}, "names no experts"),
    "a layer without ids": ({"experts": {0: [1, 2]}}, r"no ids for the layers \[1, 2, 3, 4\]"),
    "ids for a layer left out": ({"experts": {0: [1, 2], 1: [1, 2]}, "layers": [0]},
                                 r"ids for the layers \[1\], which are not loaded"),
    "a wrong expert of one layer": ({"experts": {0: [1, 9]}, "layers": [0]}, r"experts\[0\] names expert 9"),
    "an unknown part": ({"parts": {"text", "audio"}}, "must be a set of one or more of 'text', 'vision', 'mtp'"),
    "no part": ({"parts": ()}, "must be a set of one or more of"),
    "a part without a module": ({"parts": {"text", "vision", "mtp"}},
                                "mtp, vision, for which Qwen3_5MoeForCausalLM has no module; it has text"),
    "a part that is always there": ({"parts": {"mtp"}}, "mtp, for which Qwen3_5MoeForCausalLM has no module"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_the_valid_choices(what: str, five: tuple[Case, Any], tmp_path: Path) -> None:
    options, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        MODEL.from_pretrained(folder_of(tmp_path, five, "grouped", shards=2), **options)


def test_a_dense_checkpoint_has_no_experts_to_select(tmp_path: Path) -> None:
    folder, full = publish(tmp_path, LAYOUTS["3.5 dense, untied"])
    with pytest.raises(ValueError, match="experts= needs a mixture of experts, and this checkpoint is dense"):
        Qwen3_5ForCausalLM.from_pretrained(folder, experts=[0, 1])
    model = Qwen3_5ForCausalLM.from_pretrained(folder, layers=[1])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, full["layers.1.mlp.down_proj.weight"])
    with pytest.raises(ValueError, match="leaves out text, which Whole always has"):
        Whole.from_pretrained(publish(tmp_path / "moe", LAYOUTS["3.6 MoE, bf16"])[0], parts={"mtp"})


def test_missing_tensors_have_the_checkpoints_numbers(five: tuple[Case, Any], tmp_path: Path) -> None:
    case, model = five
    missing = ("layers.4.self_attn.o_proj.weight", "layers.4.mlp.experts.6.up_proj.weight")
    tensors = {name: value for name, value in per_expert(model.state_dict()).items() if not name.endswith(missing)}
    folder = write(tmp_path, tensors, case.text)
    assert MODEL.from_pretrained(folder, layers=[0, 1]) is not None
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(folder, layers=[0, 4], experts=[6, 2])
    assert {(problem.kind, problem.subject) for problem in caught.value.problems} == {
        ("missing", name) for name in missing}  # fmt: skip


def test_consecutive_rows_are_one_range() -> None:
    assert runs([3, 4, 5, 1, 2, 0]) == [(3, 6), (1, 3), (0, 1)]


def test_the_parts_of_a_layout() -> None:
    assert parts_of(LAYOUTS["3.8 text only"]) == {"text", "mtp"}
