"""models/packed_weights.py: a packed model computes as the plain one; what needs plain weights gets them or is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qwen35moe
from qwen35moe import Qwen3_5MoeForCausalLM, backends
from qwen35moe.models import packed_weights
from qwen35moe.models.expert_activations import expert_activations
from qwen35moe.ops.cpu import packed_weight
from qwen35moe.ops.cpu.packed_weight import PackedWeight, refusal
from tests.models import test_vision_language
from tests.models.test_model import small
from tests.support.memory import LAG, anonymous_growth, memory_taken, peak_growth
from tests.support.peer import assert_close

pytestmark = pytest.mark.skipif(refusal(torch.float32) is not None, reason=str(refusal(torch.float32)))

IDS = torch.randint(0, 59, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of small models are packed too, from 200 numbers on."""
    monkeypatch.setattr(packed_weights, "SMALL", 200)


def build(**changes: Any) -> Any:
    return Qwen3_5MoeForCausalLM(small(**changes)).init_weights(seed=3).eval()


def packed() -> Any:
    model = build()
    model.pack_weights()
    return model


def values(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert type(value) is Tensor and torch.equal(value, expected[name]), name


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def test_a_packed_model_computes_as_the_plain_one_and_is_unpacked_exactly() -> None:
    model = build()
    for name in ("model.norm.weight", "lm_head.weight"):
        model.get_parameter(name).requires_grad_(False)
    before, trained = values(model), {name: p.requires_grad for name, p in model.named_parameters()}
    truth, plain = logits(copy.deepcopy(model).double()), logits(model)
    result = model.pack_weights()
    names = [name for name, weight in model.named_parameters() if isinstance(weight, PackedWeight)]
    assert "lm_head.weight" in names and "model.layers.0.mlp.experts.gate_up_proj" in names
    assert result.weights == len(names) and result.matrices == len(names) + 2 * 2 * (5 - 1)
    assert result.nbytes == sum(before[name].nbytes for name in names)
    assert repr(result).startswith(f"packed {len(names)} weights ({result.matrices} matrices, ")
    assert "left plain: " in repr(result) and "fewer than 200 numbers" in repr(result)
    assert f"packed weights: {len(names)}\n" in repr(model) and "intermediate_size=10, packed)" in repr(model)
    assert_close(logits(model), truth, 1e-5)
    with backends.ran() as ran:
        cache = model.new_cache(2)
        with torch.no_grad():
            model(IDS[:, :-1], cache=cache)
            step = model(IDS[:, -1:], cache=cache).logits
    assert_close(step, truth[:, -1:], 1e-5)
    assert ran.counts["experts", "sorted"] == 4
    with torch.no_grad():
        assert_close(model(IDS, logits_to_keep=1).logits, truth[:, -1:], 1e-5)
    again = model.pack_weights()
    assert (again.weights, again.matrices, again.nbytes) == (0, 0, 0)
    undone = model.unpack_weights()
    assert undone.done == "unpacked" and undone.nbytes == result.nbytes
    assert (undone.weights, undone.matrices) == (result.weights, result.matrices)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert_equal(values(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert torch.equal(logits(model), plain) and "packed" not in repr(model)
    assert model.unpack_weights().weights == 0


def test_large_matrices_run_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "SMALL", 1 << 18)
    sizes: dict[str, Any] = dict(hidden_size=600, shared_expert_intermediate_size=440)
    model = build(**sizes, num_hidden_layers=1, layer_types=["linear_attention"])
    result = model.pack_weights()
    assert result.weights == 3 and dict(result.left) == {"fewer than 262,144 numbers in a matrix": 9}
    with backends.ran() as ran:
        logits(model)
    assert ran.counts["linear", "packed"] == 3


def test_no_more_than_one_layer_is_stored_twice() -> None:
    """The plain weights are gone, each before the next but one is packed."""
    model = build()
    alive = [weakref.ref(p) for name, p in model.named_parameters() if "experts." in name or name == "lm_head.weight"]
    pack, counts = packed_weight.pack, []

    def counted(weight: Tensor, trainable: bool = False) -> Any:
        counts.append(sum(reference() is not None for reference in alive))
        return pack(weight, trainable)

    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_weights, "pack", counted)
        model.pack_weights()
    assert all(reference() is None for reference in alive)
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1


def test_saving_writes_the_same_files(tmp_path: Path) -> None:
    model = build()
    for layout in ("grouped", "per_expert"):
        model.save_pretrained(tmp_path / f"plain {layout}", layout=layout)
    before, twin = values(model), packed()
    for layout in ("grouped", "per_expert"):
        twin.save_pretrained(tmp_path / f"packed {layout}", layout=layout)
        one, other = (tmp_path / f"{kind} {layout}" for kind in ("plain", "packed"))
        assert [file.name for file in sorted(one.iterdir())] == [file.name for file in sorted(other.iterdir())]
        for folder in (one, other):
            assert_equal(values(Qwen3_5MoeForCausalLM.from_pretrained(folder)), before)
        assert (one / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    assert len(packed_weights.packed_weights(twin)) > 10
    twin.save_pretrained(tmp_path / "values", state_dict=twin.state_dict())
    assert_equal(values(Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "values")), before)


def test_state_dicts_have_plain_weights() -> None:
    model, before = packed(), values(build())
    assert_equal(dict(model.state_dict()), before)
    assert_equal(dict(model.lm_head.state_dict()), {"weight": before["lm_head.weight"]})
    assert_equal(dict(model.model.layers[1].mlp.experts.state_dict(prefix="x.")), {
        f"x.{name}": before[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")
    })  # fmt: skip
    assert model.num_parameters() == build().num_parameters()
    model.unpack_weights()
    assert not any(module._state_dict_hooks for module in model.modules())


REFUSED: dict[str, Any] = {
    "load_state_dict": lambda model: model.load_state_dict(build().state_dict()),
    "the head's load_state_dict": lambda model: model.lm_head.load_state_dict({"weight": torch.zeros(59, 24)}),
    "bfloat16": lambda model: model.to(torch.bfloat16), "double": lambda model: model.double(),
    "meta": lambda model: model.to("meta"), "a layer": lambda model: model.model.layers[1].mlp.shared_expert.double(),
    "unfuse_experts": lambda model: model.unfuse_experts(), "place": lambda model: model.place("cpu"),
    "init_weights": lambda model: model.init_weights(seed=4), "requires_grad_": lambda model: model.requires_grad_(True),
    "share_memory": lambda model: model.share_memory(),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(70),
    "backward": lambda model: model(IDS, labels=IDS).loss.backward(),
    "compile": lambda model: torch.compile(model, backend="eager")(IDS),
    "export": lambda model: torch.export.export(model, (IDS,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_plain_weights_is_refused(name: str) -> None:
    """With the way out, and before anything changes."""
    model = packed()
    before = values(model)
    with pytest.raises(Exception, match=r"unpack_weights\(\)"):
        REFUSED[name](model)
    if name not in ("init_weights", "requires_grad_"):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert_equal(values(model), before)
    model.unpack_weights()
    REFUSED[name](model) if name not in ("compile", "export") else None


def test_calls_that_change_no_weight_are_allowed() -> None:
    model = packed()
    expected, count = logits(model), len(packed_weights.packed_weights(model))
    model.to("cpu").float().to(torch.float32).train().eval().requires_grad_(False)
    assert len(packed_weights.packed_weights(model)) == count and torch.equal(logits(model), expected)
    model.unpack_weights()
    assert model.lm_head.weight.requires_grad


def test_copies_and_pickles_are_packed() -> None:
    model = packed()
    expected, before = logits(model), values(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(packed_weights.packed_weights(twin)) == len(packed_weights.packed_weights(model))
        assert_close(logits(twin), expected, 1e-6)
        twin.unpack_weights()
        assert_equal(values(twin), before)
    assert packed_weights.packed_weights(model)


def test_outputs_of_a_forward_with_a_graph() -> None:
    """Without torch.no_grad() a packed model gives the same logits and loss; only the backward is refused."""
    model = packed()
    with torch.no_grad():
        expected = model(IDS, labels=IDS)
    out = model(IDS, labels=IDS)
    short = model(IDS, labels=IDS, output_logits=False)
    assert_close(out.logits, expected.logits, 1e-5)
    assert_close(out.loss, expected.loss, 1e-5)
    assert_close(short.loss, expected.loss, 1e-5)
    with pytest.raises(ValueError, match="no gradient through packed weights"):
        short.loss.backward()


def test_taps_and_interventions() -> None:
    plain, model = build(), packed()
    records: list[Any] = []
    for one in (plain, model):
        with torch.no_grad(), expert_activations(one) as recorded:
            one(IDS)
        records.append(recorded)
    for a, b in zip(*records, strict=True):
        assert (a.layer, a.expert, a.tokens.tolist()) == (b.layer, b.expert, b.tokens.tolist())
        assert_close(b.outputs, a.outputs, 1e-5)
    patch = {"layers.1.mlp.expert_act": lambda x: 2 * x}
    with qwen35moe.taps.patch(plain, patch):
        expected = logits(plain)
    with qwen35moe.taps.patch(model, patch):
        assert_close(logits(model), expected, 1e-5)


def test_hooks_on_a_packed_linear() -> None:
    plain, model = build(), packed()
    for one in (plain, model):
        one.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        one.lm_head.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    assert_close(logits(model), logits(plain), 1e-5)


def test_a_counter_of_operations_counts_packed_products() -> None:
    counts = []
    for model in (build(), packed()):
        with FlopCounterMode(display=False) as counter:
            logits(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_what_stays_plain() -> None:
    """A head that shares the embedding, subclasses, unfused experts: counted by the reason."""

    class Other(nn.Linear):
        pass

    model = build(tie_word_embeddings=True)
    model.model.layers[0].mlp.shared_expert.up_proj.__class__ = Other
    model.unfuse_experts()
    left = dict(model.pack_weights().left)
    assert left["shared with another module, as a head with the embedding"] == 1
    assert left["of Other, a subclass of nn.Linear"] == 1
    assert left["unfused experts: model.fuse_experts() first"] == 2 * 5 * 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.fuse_experts()
    assert model.pack_weights().weights == 4
    assert_close(logits(model), logits(build(tie_word_embeddings=True)), 1e-5)


def test_a_head_in_a_narrower_dtype_stays_plain() -> None:
    model = build()
    model.lm_head.half()
    expected = logits(model)
    assert model.pack_weights().left["a head in a narrower dtype than the model's"] == 1
    assert_close(logits(model), expected, 1e-5)


def test_packing_refuses_what_it_would_lose() -> None:
    model = build()
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match=r"gradients.*zero_grad\(\)"):
        model.pack_weights()
    model.zero_grad()
    model.double()
    with pytest.raises(ValueError, match=r"oneDNN packs float32, bfloat16 and float16, the weights are float64"):
        model.pack_weights()
    assert not packed_weights.packed_weights(model)
    for dtype in (torch.bfloat16, torch.float16):
        if refusal(dtype) is not None:
            with pytest.raises(ValueError, match=r"on this processor.*dtype=torch.float32"):
                build().to(dtype).pack_weights()


def test_a_multimodal_model_with_its_tower() -> None:
    plain, model = test_vision_language.model(), test_vision_language.model()
    model.pack_weights()
    names = [name for name, weight in model.named_parameters() if isinstance(weight, PackedWeight)]
    assert any(".visual.blocks." in name and "fc1" in name for name in names) and any(".merger." in name for name in names)
    inputs = test_vision_language.batch()
    with torch.no_grad():
        assert_close(model(**inputs).logits, plain(**inputs).logits, 1e-5)
    model.unpack_weights()
    assert_equal(values(model), values(plain))


def test_loading_packed(tmp_path: Path) -> None:
    model, inputs = build(), {"weights": "packed"}
    model.save_pretrained(tmp_path)
    before = values(model)
    loaded = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, **inputs)
    assert "packed" in str(loaded.loading_report) and packed_weights.packed_weights(loaded)
    assert_close(logits(loaded), logits(model), 1e-5)
    assert_equal(values(loaded), before)
    loaded.unpack_weights()
    assert_equal(values(loaded), before)
    part = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, layers=[1], experts=[4, 0, 2], **inputs)
    assert_equal(values(part), values(Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, layers=[1], experts=[4, 0, 2])))
    refused: dict[str, dict[str, Any]] = {"some of this model are on meta": {"device": "meta"}}
    refused["oneDNN packs"] = {"dtype": torch.float64}
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, **arguments, **inputs)
    with pytest.raises(ValueError, match="'packed'"):
        Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, weights="packd")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize(("how", "growth"), [("packed", anonymous_growth), ("packed", peak_growth), ("map", anonymous_growth)])
def test_memory_of_packing(how: str, growth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed weights and less than a layer: mapped files are read weight by weight, and their pages given back."""
    monkeypatch.setattr(packed_weights, "SMALL", 1 << 16)
    sizes: dict[str, Any] = dict(hidden_size=520, moe_intermediate_size=260, num_experts=11)
    sizes |= dict(num_hidden_layers=3, layer_types=["linear_attention"] * 3)
    build(**sizes).save_pretrained(tmp_path / "large")
    build().save_pretrained(tmp_path / "small")
    layer = 11 * 3 * 520 * 260 * 4

    def load() -> Any:
        model = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "large", weights=how)
        if how == "map":
            model.pack_weights()
        assert len(packed_weights.packed_weights(model)) == 6
        return model

    def rehearsal() -> Any:
        return Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "small", weights="packed")

    taken = memory_taken(load, rehearsal, growth)
    assert 3 * layer - LAG <= taken <= 4 * layer + 8e6
