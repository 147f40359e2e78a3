"""Nothing is written that our reader refuses: a model changed by hand or wrapped is loaded again, or refused at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from qwen35moe.checkpoint import CheckpointError, save_model
from qwen35moe.models.text import Qwen3_5MoeTextModel
from tests.checkpoint.test_write import drawn, loaded, same

pytestmark = pytest.mark.usefixtures("quick_disk")


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replace_layer(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def share_norms(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight


def share_all_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm


def other_vocabulary(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(80, 30)


def add_bias(model: Any) -> None:
    model.model.layers[0].linear_attn.out_proj.bias = nn.Parameter(torch.zeros(30))


def with_lora(model: Any) -> None:
    old = model.model.layers[1].self_attn.q_proj
    wrapped = nn.Module()
    wrapped.base_layer, wrapped.lora_A = old, nn.Linear(3, 2, bias=False)  # the names that peft uses
    model.model.layers[1].self_attn.q_proj = wrapped


def weight_norm(model: Any) -> None:
    torch.nn.utils.weight_norm(model.model.layers[1].self_attn.q_proj)


def fewer_experts(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].detach().clone())


def offloaded(model: Any) -> None:
    model.model.norm.to("meta")


def sparse(model: Any) -> None:
    gate = model.model.layers[0].mlp.gate
    gate.weight = nn.Parameter(gate.weight.detach().float().to_sparse())


class Quantised(Tensor):
    """A tensor whose numbers are elsewhere, as torchao's are."""


def quantised(model: Any) -> None:
    proj = model.model.layers[1].self_attn.q_proj
    proj.weight = nn.Parameter(proj.weight.detach().as_subclass(Quantised))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a layer twice": (replace_layer, "shared: layers.0.linear_attn.A_log: shares its weight with layers.1.linear_attn.A_log"),
    "a parameter twice": (share_norms, "shared: layers.0.input_layernorm.weight: shares its weight with layers.1.input"),
    "two norms alike": (share_all_norms, "shared: layers.{0-1}.input_layernorm.weight|shared: layers.0.input_layernorm"),
    "fewer layers": (lambda model: model.model.layers.__delitem__(1), "missing: layers.1.self_attn.q_proj.weight: config"),
    "one more layer": (lambda model: model.model.layers.append(copy.deepcopy(model.model.layers[0])), "unexpected: layers.2."),
    "another vocabulary": (other_vocabulary, r"wrong shape: embed_tokens.weight: \[80, 30\], config describes \[71, 30\]"),
    "a bias": (add_bias, "unexpected: layers.0.linear_attn.out_proj.bias: config describes no such parameter"),
    "a parameter": (lambda m: m.model.norm.register_parameter("more", nn.Parameter(torch.ones(2))), "unexpected: norm.more"),
    "a buffer": (lambda m: m.model.norm.register_buffer("mean", torch.ones(2)), "buffer: model.norm.mean: it is a buffer"),
    "a module": (lambda m: setattr(m, "value_head", nn.Linear(2, 1)), "value_head.weight is not part of this architecture"),
    "no head": (lambda m: setattr(m, "lm_head", nn.Identity()), "missing: lm_head.weight"),
    "fewer experts": (fewer_experts, r"wrong shape: layers.0.mlp.experts.down_proj: \[3, .* describes \[5, "),
    "lora": (with_lora, "base_layer.weight: it is of an adapter: merge it"),
    "parametrization": (lambda m: parametrize.register_parametrization(m.model.norm, "weight", Twice()),
                        "norm.parametrizations.weight.original: it is of a parametrization"),
    "pruned": (lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.5), "lm_head.weight_mask: it is a mask of pruning"),
    "layers swapped": (lambda m: m.model.layers.insert(0, m.model.layers.pop(1)), "unexpected: layers.0.self_attn.q_proj"),
    "another norm": (lambda m: setattr(m.model, "norm", nn.LayerNorm(30).bfloat16()), "unexpected: norm.bias"),
    "weight_norm": (weight_norm, "it is of (weight_norm|a parametrization)"),
    "offloaded": (offloaded, "no values: model.norm.weight: it is on the meta device"),
    "sparse": (sparse, "wrong dtype: model.layers.0.mlp.gate.weight: torch.sparse_coo"),
    "integers": (lambda m: m.model.norm.register_parameter("weight", nn.Parameter(torch.ones(30).int(), False)), "torch.int32"),
    "quantised": (quantised, "no plain tensor: model.layers.1.self_attn.q_proj.weight: it is a Quantised"),
    "generation settings": (lambda m: setattr(m, "generation_config", {"x": {1, 2}}), "generation_config cannot be written"),
    "a setting of NaN": (lambda m: setattr(m, "generation_config", {"x": float("nan")}), "generation_config cannot be written"),
    "large settings": (lambda m: setattr(m, "generation_config", {"x": "y" * 2**20}), "at most 1048576 are read again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_could_not_be_loaded_again_is_refused(kind: str, tmp_path: Path) -> None:
    """The good checkpoint in the folder stays, byte for byte."""
    change, message = REFUSED[kind]
    model = drawn(1)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    change(model)
    for layout in ("grouped", "per_expert"):
        with pytest.raises(CheckpointError, match=message) as error:
            model.save_pretrained(tmp_path, layout=layout)
        assert len(str(error.value)) < 2000
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def rename(model: Any, config: Any) -> None:
    model.config = config
    model.model.config = config


def cut_layers(model: Any) -> None:
    del model.model.layers[1]
    rename(model, model.config.replace(layer_types=model.config.text_config.layer_types[:1]))


def larger_vocabulary(model: Any) -> None:
    for module, name in ((model.model, "embed_tokens"), (model, "lm_head")):
        old = getattr(module, name).weight
        getattr(module, name).weight = nn.Parameter(torch.cat([old, old[:9]]).detach())
    rename(model, model.config.replace(vocab_size=80))


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def compiled_layer(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)


def checkpointed_layer(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])


def share_storage(model: Any) -> None:
    """Two parameters that are views of one memory are two parameters."""
    both = torch.randn(2, 30).to(torch.bfloat16)
    for row, layer in zip(both, model.model.layers, strict=True):
        layer.input_layernorm.weight = nn.Parameter(row)


ACCEPTED: dict[str, Callable[[Any], object]] = {
    "fewer layers, config too": cut_layers,
    "another vocabulary, config too": larger_vocabulary,
    "tied by hand": tie,
    "compiled": compiled_layer,
    "checkpointed": checkpointed_layer,
    "storage shared": share_storage,
    "frozen": lambda model: model.requires_grad_(False),
    "a buffer that is not saved": lambda m: m.model.norm.register_buffer("mean", torch.ones(2), persistent=False),
    "unfused": lambda model: model.unfuse_experts(),
    "negated view": lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch._neg_view(m.model.norm.weight.detach()))),
    "quantisation described": lambda m: rename(m, m.config.replace(quantization_config={"quant_method": "fp8"})),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_model_that_is_saved_is_loaded_again(kind: str, tmp_path: Path) -> None:
    model = drawn(1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    ACCEPTED[kind](model)
    if kind not in ("compiled", "checkpointed", "unfused"):
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    for layout in ("grouped", "per_expert"):
        model.save_pretrained(tmp_path / layout, layout=layout)
        again = loaded(tmp_path / layout).state_dict()
        assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
        assert "quantization_config" not in json.loads((tmp_path / layout / "config.json").read_text())


def test_a_compiled_model_saves_itself(tmp_path: Path) -> None:
    model = drawn(1)
    torch.compile(model).save_pretrained(tmp_path)
    assert same(loaded(tmp_path), model)


def test_a_class_of_the_user_is_compared_with_the_configuration(tmp_path: Path) -> None:
    class Mine(Qwen3_5MoeTextModel):
        def __init__(self, config: Any, extra: int) -> None:
            super().__init__(config)
            self.extra = extra

    base = drawn(1).model
    model: Any = Mine(base.config, 3).to(torch.bfloat16)
    model.load_state_dict(base.state_dict())
    model.save_pretrained(tmp_path)
    assert same(Qwen3_5MoeTextModel.from_pretrained(tmp_path), base)
    del model.layers[1]
    with pytest.raises(CheckpointError, match="missing: layers.1"):
        model.save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------ state_dict=


@pytest.mark.parametrize("tied", [False, True])
def test_gathered_weights_are_saved_in_place_of_the_models(tied: bool, tmp_path: Path) -> None:
    model = drawn(1, tie_word_embeddings=tied)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    with pytest.raises(CheckpointError, match="pass state_dict="):
        model.save_pretrained(tmp_path)
    for number, prefix in enumerate(("", "_orig_mod.", "module.")):
        path = tmp_path / str(number)
        save_model(model, path, state_dict={prefix + name: value for name, value in weights.items()})
        again = loaded(path)
        assert again.config.text_config.tie_word_embeddings == tied
        assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    one_name = {name: value for name, value in weights.items() if name != "lm_head.weight" or not tied}
    save_model(model, tmp_path / "one", state_dict=one_name)
    assert torch.equal(loaded(tmp_path / "one").lm_head.weight, weights["lm_head.weight"])
    for wrong, message in (
        ({**weights, "model.norm.weight": torch.ones(3)}, "wrong shape: norm.weight"),
        ({name: value for name, value in weights.items() if "norm" not in name}, "missing: "),
        ({**weights, "v_head.weight": torch.ones(3)}, "v_head.weight is not part of this architecture"),
        ({**weights, "model.norm.weight": None}, "no tensor: model.norm.weight: it is NoneType"),
        ({**weights, "module.model.norm.weight": weights["model.norm.weight"]}, "twice"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_model(model, tmp_path / "wrong", state_dict=wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    assert not dist.is_initialized(), "an earlier test left a process group behind"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_refused_and_its_gathered_weights_are_saved(process_group: None, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = drawn(1), drawn(1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(CheckpointError, match="sharded: model.embed_tokens.weight: it is a DTensor: gather the weights"):
        model.save_pretrained(tmp_path)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path, state_dict=weights)
    assert same(loaded(tmp_path), plain)


@pytest.mark.parametrize("what", ["linears", "experts"])
def test_a_model_quantised_by_torchao_is_refused(what: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = drawn(1, torch.float32)
    if what == "experts":
        model.unfuse_experts()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and (
        what == "linears" or ".experts." in name))  # fmt: skip
    with pytest.raises(CheckpointError, match="no plain tensor: .*: save the model before it is quantised"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_offloaded_by_accelerate_is_refused_and_gathered(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    model, plain = drawn(1), drawn(1)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(CheckpointError, match="meta device"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=get_state_dict_offloaded_model(model))
    assert same(loaded(tmp_path), plain)
