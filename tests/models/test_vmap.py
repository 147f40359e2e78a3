"""torch.func on whole models: gradients of single rows and ensembles, against one row and one model at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from qwen35moe import Qwen3_5MoeForCausalLM
from tests.models.test_model import small
from tests.support.peer import assert_close

EXACT = 1e-10


def build(seed: int) -> Any:
    return Qwen3_5MoeForCausalLM(small()).init_weights(seed=seed).double().eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return build(0)


@pytest.fixture(scope="module", params=[7, 70])  # few assignments, and more than are worth a copy of their weights; two chunks
def ids(request: pytest.FixtureRequest) -> Tensor:
    return torch.randint(0, 59, (2, request.param), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"output_logits": False}], ids=["loss", "chunked loss"])
def test_gradients_of_single_rows(options: dict[str, Any], model: Any, ids: Tensor) -> None:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],), {"labels": row[None], **options}).loss

    actual = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for number, row in enumerate(ids):
        one = torch.autograd.grad(model(row[None], labels=row[None]).loss, list(model.parameters()), allow_unused=True)
        for name, gradient in zip(weights, one, strict=True):
            if gradient is not None and gradient.abs().max() > 0:
                assert_close(actual[name][number], gradient, EXACT, name)


def test_an_ensemble_and_rows_of_ids(model: Any, ids: Tensor) -> None:
    models = [model, build(1)]
    weights, buffers = stack_module_state(models)
    base = copy.deepcopy(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    bounds = torch.tensor([0, 4, ids.shape[1]])
    calls = {"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1], "cu_seqlens": bounds}
    for arguments in calls:
        outputs = vmap(lambda w, b, a=arguments: functional_call(base, (w, b), (), a).logits)(weights, buffers)
        for number, one in enumerate(models):
            valid = mask[: outputs.shape[1]].bool() if "attention_mask" in arguments else ...
            assert_close(outputs[number][valid], one(**arguments).logits[valid], EXACT)
    assert_close(vmap(lambda row: model(row[None]).logits[0])(ids), model(ids).logits, EXACT)
