"""`qwen35moe adapter`: where every tensor of a LoRA adapter belongs, and experts in the other form with the same delta W."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35moe.checkpoint import CheckpointError
from qwen35moe.checkpoint.adapter_forms import convert_adapter, join, split
from qwen35moe.checkpoint.adapters import check_adapter, read_adapter
from qwen35moe.cli import main
from qwen35moe.config import Config
from tests.integrations.common import KINDS, tiny, tokens
from tests.support.configs import LINEAR, TINY
from tests.support.peer import relative_error

E, D, F = TINY["num_experts"], TINY["hidden_size"], TINY["moe_intermediate_size"]
RANK, ALPHA = 3, 5
PREFIX = "base_model.model.model."
MODEL = Config.from_dict(KINDS["experts"])
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "target_parameters": None}
Tensors = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attention() -> Tensors:
    name, rows = PREFIX + "layers.1.self_attn.q_proj", 2 * TINY["num_attention_heads"] * TINY["head_dim"]
    return {f"{name}.lora_A.weight": draw(RANK, D), f"{name}.lora_B.weight": draw(rows, RANK)}


def grouped(layer: int = 0) -> Tensors:
    """Both grouped parameters of a layer as peft saves them, column = rank * E + expert."""
    name = f"{PREFIX}layers.{layer}.mlp.experts"
    return {
        f"{name}.base_layer.lora_A.weight": draw(E * RANK, D, seed=layer),
        f"{name}.base_layer.lora_B.weight": draw(2 * F, RANK * E, seed=layer),
        f"{name}.lora_A.weight": draw(E * RANK, F, seed=layer),
        f"{name}.lora_B.weight": draw(D, RANK * E, seed=layer),
    }


def save(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def both(folder: Path) -> Path:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return save(folder, attention() | grouped(0) | grouped(1), target_parameters=names)


def deltas(folder: Path) -> dict[str, Tensor]:
    """(alpha / r) B A of each projection of each expert, written out for the two forms."""
    tensors, updates = load_file(folder / "adapter_model.safetensors"), {}
    for layer in (0, 1):
        name = f"{PREFIX}layers.{layer}.mlp.experts"
        for which, weight in ((".base_layer", "gate_up"), ("", "down")):
            if f"{name}{which}.lora_A.weight" not in tensors:
                continue
            a, b = (tensors[f"{name}{which}.lora_{x}.weight"].double() for x in "AB")
            rank = a.shape[0] // E
            for e in range(E):
                whole = b[:, torch.arange(rank) * E + e] @ a[e * rank : (e + 1) * rank] * ALPHA / RANK
                parts = {"gate_proj": whole[:F], "up_proj": whole[F:]} if weight == "gate_up" else {"down_proj": whole}
                updates |= {f"{layer}.{e}.{part}": value for part, value in parts.items()}
        for e in range(E):
            for part in ("gate_proj", "up_proj", "down_proj"):
                if f"{name}.{e}.{part}.lora_A.weight" in tensors:
                    a, b = (tensors[f"{name}.{e}.{part}.lora_{x}.weight"].double() for x in "AB")
                    updates[f"{layer}.{e}.{part}"] = b @ a * ALPHA / RANK
    return updates


def assert_same(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert own.keys() == expected.keys() and own
    for name, value in expected.items():
        assert relative_error(own[name], value) < 1e-12, name


# ------------------------------------------------------------------------------------------------------------- check


def run(*arguments: str) -> int:
    return main(["adapter", *arguments])


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_check_says_where_every_tensor_belongs(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = both(tmp_path / "adapter")
    checked = check_adapter(read_adapter(folder), MODEL)
    assert not checked.problems
    places = {landing.tensor.name: (landing.target, landing.form, landing.rank) for landing in checked.landings}
    experts = "layers.0.mlp.experts"
    assert places[f"{PREFIX}{experts}.base_layer.lora_B.weight"] == (f"{experts}.gate_up_proj", "grouped", RANK)
    assert places[f"{PREFIX}{experts}.lora_A.weight"] == (f"{experts}.down_proj", "grouped", RANK)
    assert places[PREFIX + "layers.1.self_attn.q_proj.lora_A.weight"] == ("layers.1.self_attn.q_proj.weight", "linear", RANK)
    assert run("check", str(folder), "--base", base, "--all") == 0
    page = capsys.readouterr().out
    assert all(name in page for name in places) and "10 tensors: 8 grouped, 2 linear" in page and "rank * E + expert" in page
    assert run("check", str(folder), "--base", base) == 0
    assert "layers.{0-1}.mlp.experts" in capsys.readouterr().out


def changed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): value for name, value in tensors.items()}


WRONG: dict[str, tuple[Callable[[], Tensors], str]] = {
    "no such module": (lambda: changed(attention(), "q_proj", "qkv_proj"), "lands nowhere"),
    "a layer too many": (lambda: changed(grouped(), "layers.0", "layers.7"), "lands nowhere"),
    "attention in a delta layer": (lambda: changed(attention(), "layers.1", "layers.0"), "lands nowhere"),
    "another width": (lambda: {n: v[:, :-1] if "lora_A" in n else v for n, v in attention().items()}, "wrong shape"),
    "ranks that differ": (lambda: {n: v[:-1] if "lora_A" in n else v for n, v in attention().items()}, "wrong shape"),
    "an expert too many": (lambda: {f"{PREFIX}layers.0.mlp.experts.{E}.up_proj.lora_{x}.weight": draw(*s)
                                    for x, s in (("A", (RANK, D)), ("B", (F, RANK)))}, "lands nowhere"),
    "experts of another model": (lambda: {n: v[: 4 * RANK] if "lora_A" in n else v[:, : 4 * RANK]
                                          for n, v in grouped().items()}, "wrong shape"),
    "half a pair": (lambda: changed(dict(list(attention().items())[:1]), "q_proj", "k_proj"), "half a pair"),
    "a bias": (lambda: attention() | {PREFIX + "layers.1.self_attn.q_proj.lora_B.bias": draw(8)}, "not supported"),
    "whole numbers": (lambda: {n: v.int() for n, v in changed(attention(), "q_proj", "v_proj").items()}, "wrong dtype"),
    "a whole weight": (lambda: {"base_model.model.score.weight": draw(2, D)}, "lands nowhere"),
    "tokens": (lambda: {PREFIX + "embed_tokens.token_adapter.trainable_tokens_delta": draw(2, D + 1)}, "lands nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_check_fails_where_a_tensor_belongs_nowhere(
    name: str, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, kind = WRONG[name]
    folder = save(tmp_path / "adapter", attention() | make())
    assert run("check", str(folder), "--base", base) == 1
    page = capsys.readouterr().out
    assert kind in page and "belong nowhere" in page
    with pytest.raises(CheckpointError, match=kind) as error:
        convert_adapter(folder, tmp_path / "new", MODEL, form="grouped")
    assert len(str(error.value)) < 2000 and not (tmp_path / "new").exists()


def test_other_tensors_that_belong_somewhere(tmp_path: Path) -> None:
    size = MODEL.text_config.vocab_size
    folder = save(tmp_path / "adapter", attention() | {
        "base_model.model.lm_head.weight": draw(size + 4, D),
        PREFIX + "embed_tokens.base_layer.weight": draw(size, D),
        PREFIX + "embed_tokens.lora_embedding_A": draw(RANK, size), PREFIX + "embed_tokens.lora_embedding_B": draw(D, RANK),
        PREFIX + "layers.1.self_attn.q_proj.lora_magnitude_vector": draw(192),
        PREFIX + "layers.0.linear_attn.conv1d.lora_A.weight": draw(186 * RANK, 4),
        PREFIX + "layers.0.linear_attn.conv1d.lora_B.weight": draw(1, 186 * RANK),
        PREFIX + "layers.0.mlp.gate.lora_A.weight": draw(RANK, D), PREFIX + "layers.0.mlp.gate.lora_B.weight": draw(E, RANK),
    })  # fmt: skip
    checked = check_adapter(read_adapter(folder), MODEL)
    assert not checked.problems and len(checked.landings) == 11
    forms = {landing.target: landing.form for landing in checked.landings if landing.kind in ("", "lora_A")}
    assert forms["layers.0.linear_attn.conv1d.weight"] == "grouped" and forms["lm_head.weight"] == "whole"


# ------------------------------------------------------------------------------------------------------------- convert


def test_both_forms_have_the_same_delta_w(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = both(tmp_path / "grouped")
    assert run("convert", str(folder), str(tmp_path / "apart"), "--base", base, "--to", "per_expert") == 0
    assert_same(deltas(tmp_path / "apart"), deltas(folder))
    names = set(load_file(tmp_path / "apart" / "adapter_model.safetensors"))
    assert f"{PREFIX}layers.1.mlp.experts.6.up_proj.lora_B.weight" in names and len(names) == 2 + 2 * E * 3 * 2
    assert run("convert", str(tmp_path / "apart"), str(tmp_path / "again"), "--base", base, "--to", "grouped") == 0
    first, again = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert "experts grouped" in capsys.readouterr().out


def test_the_two_orders_of_the_columns_of_lora_b(tmp_path: Path) -> None:
    """column = rank * E + expert (peft) or expert * r + rank: the same shape, and another delta W if they are mistaken."""
    folder = both(tmp_path / "rank")
    convert_adapter(folder, tmp_path / "expert", MODEL, form="grouped", write_order="expert")
    name = f"{PREFIX}layers.0.mlp.experts.lora_B.weight"
    by_rank, by_expert = (load_file(tmp_path / which / "adapter_model.safetensors")[name] for which in ("rank", "expert"))
    for e in range(E):
        for r in range(RANK):
            assert torch.equal(by_rank[:, r * E + e], by_expert[:, e * RANK + r])
    convert_adapter(tmp_path / "expert", tmp_path / "back", MODEL, form="grouped", order="expert")
    assert_same(deltas(tmp_path / "back"), deltas(folder))
    convert_adapter(tmp_path / "expert", tmp_path / "apart", MODEL, form="per_expert", order="expert")
    assert_same(deltas(tmp_path / "apart"), deltas(folder))
    convert_adapter(tmp_path / "expert", tmp_path / "mistaken", MODEL, form="per_expert")
    assert relative_error(deltas(tmp_path / "mistaken")["0.2.up_proj"], deltas(folder)["0.2.up_proj"]) > 0.1
    for order in ("rank", "expert"):
        a, b = draw(E * RANK, D), draw(F, RANK * E)
        assert all(torch.equal(x, y) for x, y in zip(join(split(a, b, E, order), order), (a, b), strict=True))


def test_swapped_axes_of_older_versions(tmp_path: Path) -> None:
    """lora_A [E r, out] and lora_B [in, r E]: delta W[e] = (B A)^T."""
    folder, new = both(tmp_path / "new"), {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        if "experts" in name and "lora_A" in name:
            other = load_file(folder / "adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
            pairs = [(b.T, a.T) for a, b in split(value, other, E, "rank")]
            new[name], new[name.replace("lora_A", "lora_B")] = join(pairs, "rank")
    old = save(tmp_path / "old", new)
    checked = check_adapter(read_adapter(old), MODEL)
    assert not checked.problems and {landing.form for landing in checked.landings} == {"swapped"}
    for form in ("grouped", "per_expert"):
        convert_adapter(old, tmp_path / form, MODEL, form=form)
        assert_same(deltas(tmp_path / form), deltas(folder))


def test_experts_with_different_matrices_ranks_and_scalings(tmp_path: Path) -> None:
    """gate and up of their own, one of another rank and alpha, one expert without: put side by side, with zeros."""
    name, tensors = f"{PREFIX}layers.1.mlp.experts", {}
    for e, part, rank in ((0, "gate_proj", 3), (0, "up_proj", 3), (2, "up_proj", 3), (3, "down_proj", 3), (4, "down_proj", 2)):
        out, inner = (D, F) if part == "down_proj" else (F, D)
        tensors[f"{name}.{e}.{part}.lora_A.weight"] = draw(rank, inner, seed=10 * e + len(part))
        tensors[f"{name}.{e}.{part}.lora_B.weight"] = draw(out, rank, seed=e)
    folder = save(tmp_path / "apart", tensors, rank_pattern={r"experts\.4\.down_proj": 2},
                  alpha_pattern={r"experts\.4\.down_proj": 7})  # fmt: skip
    convert_adapter(folder, tmp_path / "grouped", MODEL, form="grouped")
    settings = json.loads((tmp_path / "grouped" / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    key = r"layers\.1\.mlp\.experts\.gate_up_proj"
    assert settings["rank_pattern"][key] == 6 and settings["alpha_pattern"][key] == 10
    converted, expected = deltas(tmp_path / "grouped"), deltas(folder)
    expected["1.4.down_proj"] *= (7 / 2) / (ALPHA / RANK)
    for place, value in converted.items():
        if place in expected:
            assert relative_error(value, expected[place]) < 1e-6, place
        else:
            assert not value.any(), place


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["rank", "alpha"])
def test_converted_adapters_give_the_same_logits_in_peft(kind: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    from tests.integrations.test_peft import EXPERTS, adapted

    pattern = {"rank": {"rank_pattern": {".*experts.gate_up_proj": 5}}, "alpha": {"alpha_pattern": {".*experts.down_proj": 9}}}
    model = adapted(tiny(), target_modules=["q_proj", "gate_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"],
                    **pattern[kind])  # fmt: skip
    model.save_pretrained(tmp_path / "first")
    expected, last = model(tokens()).logits, tmp_path / "first"
    for form in ("per_expert", "grouped", "per_expert"):
        new = tmp_path / f"{last.name}-{form}"
        convert_adapter(last, new, MODEL, form=form)
        other, last = tiny(), new
        if form == "per_expert":
            other.unfuse_experts()
        assert not check_adapter(read_adapter(new), MODEL).problems
        loaded = peft.PeftModel.from_pretrained(other, new).eval()
        assert relative_error(loaded(tokens()).logits, expected) < 2e-5, form


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_untrusted(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(change: Callable[[Path], object], words: str) -> None:
        folder = both(tmp_path / words.replace(" ", "-").replace("/", "-"))
        change(folder)
        with pytest.raises(CheckpointError, match=words) as error:
            read_adapter(folder)
        assert len(str(error.value)) < 2000

    def header(folder: Path, text: bytes) -> None:
        (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    def pickle(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    def linked(folder: Path) -> None:
        (folder / "adapter_config.json").rename(tmp_path / "outside.json")
        os.symlink(tmp_path / "outside.json", folder / "adapter_config.json")

    huge = b'{"x": {"dtype": "F32", "shape": [4000000000, 4000000000], "data_offsets": [0, 64000000000000000000]}}'
    refused(lambda folder: header(folder, huge), "bad entry")
    refused(lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40), "bad header")
    refused(pickle, "pickles can run code")
    refused(linked, "outside the folder")
    refused(lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "valid adapter")
    refused(lambda folder: (folder / "adapter_config.json").unlink(), "missing file")
    refused(lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "only LORA adapters")
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_adapter(tmp_path / "nothing")
    folder = both(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is the adapter that is read"):
        convert_adapter(folder, folder, MODEL, form="grouped")
    assert run("check", str(folder)) == 2 and "--base" in capsys.readouterr().err
    for settings, words in (
        ({"alpha_pattern": {"(": 1}}, "regular expression"), ({"alpha_pattern": {"(a+)+": 1}}, "plain pattern"),
        ({"rank_pattern": [1]}, "must be an object"), ({"lora_alpha": "x"}, "must be a number"), ({"lora_alpha": 0}, "than 0"),
        ({"use_dora": True}, "use_dora"),
    ):  # fmt: skip
        wrong = save(tmp_path / "wrong", grouped(), **settings)
        with pytest.raises(CheckpointError, match=words):
            convert_adapter(wrong, tmp_path / "new", MODEL, form="per_expert")
    assert MODEL.text_config.layer_types[0] == LINEAR
