"""models/outputs.py: `ModelOutput` as code written for transformers, accelerate, DDP and torch.export uses one."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.models.outputs import NAMES, LossOutput, ModelOutput
from tests.models.test_model import small

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen3_5MoeForCausalLM(small()).init_weights().eval()


@pytest.fixture(params=["logits", "loss alone"])
def out(request: pytest.FixtureRequest, model: Any) -> ModelOutput:
    with torch.no_grad():
        return model(IDS, labels=IDS, output_logits=request.param == "logits", output_hidden_states=True, use_cache=True)


def test_the_output_is_an_ordered_dict_of_its_results(model: Any) -> None:
    out = model(IDS, labels=IDS, use_cache=True, output_hidden_states=True, output_router_logits=True, output_attentions=True)
    assert isinstance(out, dict) and isinstance(out, OrderedDict)
    # the order of transformers' MoeCausalLMOutputWithPast, then this library's own
    names = ["loss", "aux_loss", "logits", "past_key_values", "hidden_states", "attentions", "router_logits", "load_imbalance"]
    assert list(out) == list(out.keys()) == names and len(out) == 8
    assert out[0] is out.loss is out["loss"] and out[:2] == (out.loss, out.aux_loss) and out[-1] is out.load_imbalance
    assert out.to_tuple() == tuple(out.values()) == tuple(value for _, value in out.items())
    assert "loss" in out and "routing" not in out and out.routing is None and out.get("routing", 3) == 3
    with pytest.raises(KeyError, match="'routing' is not in this output, which has loss, aux_loss"):
        out["routing"]
    with pytest.raises(AttributeError):
        _ = out.losses


def test_the_first_value_is_the_loss_the_logits_or_the_hidden_states(model: Any) -> None:
    with torch.no_grad():
        assert model(IDS, labels=IDS)[0].dim() == 0
        assert model(IDS)[0].shape == (1, 8, 59)
        assert model.model(IDS, output_router_logits=True)[0].shape == (1, 8, 24)
    assert model.training is False
    loss, logits = model(IDS, labels=IDS).to_tuple()
    loss.backward()
    assert logits.shape == (1, 8, 59) and model.lm_head.weight.grad is not None
    model.zero_grad(set_to_none=True)


def test_without_logits_only_reading_the_attribute_warns(model: Any) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(IDS, labels=IDS, output_logits=False)
        assert type(out) is LossOutput and list(out) == ["loss"] and "logits" not in out
        assert "logits" not in repr(out) and dict(out) == {"loss": out.loss} and out == copy.copy(out)
        pytree.tree_map(torch.neg, out)
        assert torch.allclose(out.loss, model(IDS, labels=IDS).loss)
    with pytest.warns(UserWarning, match="output_logits=False"):
        assert out.logits is None
    with pytest.raises(ValueError, match="labels"):
        model(IDS, output_logits=False)


def test_equality_compares_values(model: Any) -> None:
    with torch.no_grad():
        one, same, other = model(IDS, output_hidden_states=True), model(IDS, output_hidden_states=True), model(IDS + 1)
    assert one == same and one != other and one != dict(one) and not one == model(IDS)
    changed = copy.deepcopy(one)
    changed.hidden_states[1][0, 3, 5] += 1e-3
    assert changed != one
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_results_are_assigned_in_their_order(model: Any) -> None:
    with torch.no_grad():
        out = model(IDS)
    out.loss = torch.tensor(2.0)
    assert list(out) == ["loss", "logits"] and out[0] is out.loss
    out["extra"] = 5
    out.aux_loss = torch.tensor(1.0)
    assert list(out) == ["loss", "aux_loss", "logits", "extra"]
    out.loss = None
    assert out[0] is out.aux_loss and out.loss is None
    assert ModelOutput(logits=1, loss=None, aux_loss=2).to_tuple() == (2, 1)


def test_repr_fits_one_screen(out: ModelOutput) -> None:
    lines = repr(out).splitlines()
    assert len(lines) == len(out) + 2 and all(len(line) < 130 for line in lines)
    assert "hidden_states=3 x [1, 8, 24] float32" in repr(out) and f"loss={out.loss.item():.6g}" in repr(out)
    assert "[] float32" in repr(ModelOutput(loss=torch.empty((), device="meta")))


def test_copies(out: ModelOutput) -> None:
    plain = ModelOutput({name: value for name, value in out.items() if name != "past_key_values"})
    for twin in (copy.copy(plain), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), plain.copy()):
        assert type(twin) is ModelOutput and twin == plain and list(twin) == list(plain)
    assert type(pickle.loads(pickle.dumps(out))) is type(out) and list(copy.deepcopy(out)) == list(out)


def test_the_output_is_a_pytree(out: ModelOutput) -> None:
    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == (6 if type(out) is ModelOutput else 5)  # loss, [logits], cache, three hidden states
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out) and list(again) == list(out) and again.loss is out.loss
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths[0] == "['loss']" and paths[-1] == "['hidden_states'][2]"

    class Own(ModelOutput):
        pass

    doubled = pytree.tree_map(lambda x: 2 * x, Own(loss=torch.ones(())))
    assert type(doubled) is Own and doubled.loss == 2


def test_accelerate_ddp_and_fsdp_walk_over_it(out: ModelOutput) -> None:
    from accelerate.utils import convert_to_fp32, find_batch_size, send_to_device
    from torch.distributed.utils import _apply_to_tensors
    from torch.nn.parallel.distributed import _find_tensors

    half = ModelOutput(loss=torch.ones((), dtype=torch.bfloat16), hidden_states=(torch.ones(2, 3).bfloat16(),))
    for wide in (convert_to_fp32(half), _apply_to_tensors(torch.Tensor.float, half), send_to_device(half, "cpu").copy()):
        assert type(wide) is ModelOutput and wide.hidden_states[0].shape == (2, 3) and list(wide) == list(half)
    assert convert_to_fp32(half).loss.dtype == torch.float32
    assert type(send_to_device(out, "cpu")) is type(out) and find_batch_size(ModelOutput(logits=torch.ones(3, 2))) == 3
    assert len(list(_find_tensors(half))) == 2
    parallel = type(out)((name, out[name]) for name in out)  # nn.parallel.gather
    assert parallel == out and type(parallel) is type(out)


def test_a_model_is_exported_with_its_output(model: Any) -> None:
    exported = torch.export.export(model, (IDS,), {"labels": IDS}).module()
    with torch.no_grad():
        actual, expected = exported(IDS, labels=IDS), model(IDS, labels=IDS)
    assert type(actual) is ModelOutput and actual == expected


def test_hidden_states_attentions_and_routing_keep_their_names(model: Any) -> None:
    with torch.no_grad():
        out = model(IDS, output_routing=True, output_attentions=True)
        body = model.model(IDS, output_router_logits=True)
    assert set(out) == {"logits", "attentions", "routing"} and set(NAMES) >= set(out) | set(body)
    assert list(body) == ["last_hidden_state", "router_logits", "load_imbalance", "balancing_loss"]
    assert isinstance(body.balancing_loss, Tensor)
