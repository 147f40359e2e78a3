"""torch.func over a whole model in float64: vmap over rows equals the batch, grad and jvp equal autograd. Checks read the
values of all calls of vmap, and nothing of tensors that hold no values.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.backends.values import unbatched, values_known
from tests.models.test_model import small
from tests.models.test_vision_language import model as multimodal
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

BOUND = 1e-12  # relative, float64: the same sums in another order
LONG_BOUND = 1e-10  # of gradients of 70 tokens
B, T = 3, 7
SHAPE: dict[str, Any] = dict(layer_types=[LINEAR, FULL], num_hidden_layers=2, tie_word_embeddings=False)
CASES = {"moe": odd_shape(23, num_experts=5, num_experts_per_tok=2, **SHAPE), "dense": odd_shape(23, dense=True, **SHAPE)}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    models = {name: peer.ours(case, dtype=torch.float64) for name, case in CASES.items()}
    for model in models.values():
        peer.draw(model, 5)
    return models


@pytest.fixture
def model(models: dict[str, Any]) -> Any:
    return models["moe"]


def rows(model: Any) -> Tensor:
    return torch.randint(model.config.vocab_size, (B, T), generator=peer.generator(3))


def mapped(model: Any, *batches: Tensor, names: tuple[str, ...] = (), in_dims: Any = 0, **given: Any) -> Any:
    """vmap over the rows of input_ids and of the named arguments, each a call of one row: the logits."""
    def one(row: Tensor, *others: Tensor) -> Tensor:
        arguments = {name: other[None] for name, other in zip(names, others, strict=True)}
        return functional_call(model, dict(model.named_parameters()), (row[None],), arguments | given).logits[0]

    return vmap(one, in_dims)(*batches)


@pytest.mark.parametrize("kind", CASES)
def test_vmap_over_rows_equals_the_batch(models: dict[str, Any], kind: str) -> None:
    ids = rows(models[kind])
    assert_close(mapped(models[kind], ids), models[kind](ids).logits, BOUND)
    assert_close(mapped(models[kind], ids.T, in_dims=1), models[kind](ids).logits, BOUND)


def test_vmap_over_rows_of_a_multimodal_model() -> None:
    """Rows of text. A placeholder without its image, and images, are refused."""
    model = copy.deepcopy(multimodal()).double()
    ids = torch.randint(3, 9, (B, T), generator=peer.generator(3))
    assert_close(mapped(model, ids), model(ids).logits, BOUND)
    ids[1, 2] = model.config.image_token_id
    with pytest.raises(ValueError, match="the input holds 1 image placeholders, the 0 images given make 0 tokens"):
        mapped(model, ids)
    grid = torch.tensor([[1, 2, 2]])
    with pytest.raises(ValueError, match=r"images and videos cannot be placed under torch\.vmap"):
        mapped(model, ids, mm_encoder_outputs={"image": torch.zeros(1, model.config.hidden_size)}, image_grid_thw=grid)


@pytest.mark.parametrize("lengths", [(T, T, T), (5, 7, 3)], ids=["full", "padded"])
def test_vmap_over_masks_and_positions(model: Any, lengths: tuple[int, ...]) -> None:
    ids = rows(model)
    mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()  # padding on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.arange(B)[:, None]  # every row from its own position
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    actual = mapped(model, ids, mask, positions, names=("attention_mask", "position_ids"))
    assert_close(actual * mask[..., None], expected * mask[..., None], BOUND)


def test_vmap_over_models(model: Any) -> None:
    """An ensemble: one call with stacked parameters."""
    ids, names = rows(model), dict(model.named_parameters())
    stacked = {name: torch.stack([value, 0.9 * value]) for name, value in names.items()}
    actual = vmap(lambda parameters: functional_call(model, parameters, (ids,)).logits)(stacked)
    for i in range(2):
        one = {name: value[i] for name, value in stacked.items()}
        assert_close(actual[i], functional_call(model, one, (ids,)).logits, BOUND)


def test_gradients_of_single_rows(model: Any) -> None:
    """vmap(grad): the gradient of each row's loss, which autograd gives row by row."""
    ids, parameters = rows(model), {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss

    per_row = vmap(grad(loss), (None, 0))(parameters, ids)
    for i in range(B):
        expected = torch.autograd.grad(model(ids[i : i + 1], labels=ids[i : i + 1]).loss, tuple(model.parameters()))
        for (name, actual), gradient in zip(per_row.items(), expected, strict=True):
            assert_close(actual[i], gradient, BOUND, name)


def test_grad_and_jvp_equal_autograd(model: Any) -> None:
    ids, parameters = rows(model), {name: value.detach() for name, value in model.named_parameters()}
    along = {name: peer.randn(*value.shape, seed=i) for i, (name, value) in enumerate(parameters.items())}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (ids,), {"labels": ids, "output_router_logits": True}).loss

    expected = torch.autograd.grad(model(ids, labels=ids, output_router_logits=True).loss, tuple(model.parameters()))
    actual = grad(loss)(parameters)
    for (name, gradient), wanted in zip(actual.items(), expected, strict=True):
        assert_close(gradient, wanted, BOUND, name)
    value, slope = jvp(loss, (parameters,), (along,))[:2]
    assert_close(value, loss(parameters), BOUND)
    assert_close(slope, sum((along[name] * gradient).sum() for name, gradient in actual.items()), 1e-10)


def test_wrong_values_are_refused_under_vmap(model: Any) -> None:
    """In a single call of vmap too; nothing is read from one call for another."""
    ids, ones = rows(model), torch.ones(B, T, dtype=torch.long)
    changed = ids.clone()
    changed[1, 4] = model.config.vocab_size
    with pytest.raises(ValueError, match=f"token id {model.config.vocab_size} is outside the vocabulary"):
        mapped(model, changed)
    with pytest.raises(ValueError, match=f"label {model.config.vocab_size} is neither -100"):
        mapped(model, ids, changed, names=("labels",))
    mask = ones.clone()
    mask[2, 3:] = 2
    with pytest.raises(ValueError, match="attention_mask holds ones for tokens and zeros for padding"):
        mapped(model, ids, mask, names=("attention_mask",))
    restarting = torch.arange(T).repeat(B, 1)
    restarting[0, 5:] = torch.arange(2)
    with pytest.raises(ValueError, match=r"position_ids pack documents, which torch\.vmap cannot derive: give cu_seqlens"):
        mapped(model, ids, restarting, names=("position_ids",))
    bounds = torch.tensor([[0, 2, T], [0, 3, T], [0, 4, T]])
    with pytest.raises(ValueError, match=r"cu_seqlens differ between the calls of torch\.vmap"):
        vmap(lambda row, bounds: model(row[None], cu_seqlens=bounds).logits)(ids, bounds)


def test_documents_of_every_row_alike_under_vmap(model: Any) -> None:
    ids, bounds = rows(model), torch.tensor([0, 2, T])
    expected = torch.cat([model(row[None], cu_seqlens=bounds).logits for row in ids])
    assert_close(mapped(model, ids, cu_seqlens=bounds), expected, BOUND)


def test_forced_routing_under_vmap(model: Any) -> None:
    ids = rows(model)
    chosen = torch.rand(B, T, 2, 5, generator=peer.generator(4)).argsort(-1)[..., :2]
    chosen[1, 2] = -1  # left to the router
    actual = mapped(model, ids, chosen, names=("routing",))
    assert_close(actual, model(ids, routing=chosen).logits, BOUND)
    chosen[2, 0, 1] = 3  # twice
    with pytest.raises(ValueError, match="has an expert twice"):
        mapped(model, ids, chosen, names=("routing",))


def test_fake_and_meta_tensors(model: Any) -> None:
    """Shapes without values: no check reads any."""
    shape = (B, T, model.config.vocab_size)
    mask, positions = torch.ones(B, T, dtype=torch.long), torch.arange(T).expand(B, T)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        arguments = {"attention_mask": fake.from_tensor(mask), "position_ids": fake.from_tensor(positions)}
        assert model(fake.from_tensor(rows(model)), **arguments).logits.shape == shape
    meta = type(model)(model.config).to("meta")
    ids, mask, positions = (x.to("meta") for x in (rows(model), mask, positions))
    out = meta(ids, attention_mask=mask, position_ids=positions, labels=mask)
    assert out.logits.shape == shape and out.loss.is_meta


def test_values_known() -> None:
    plain = torch.arange(6).view(2, 3)
    assert values_known(plain) and unbatched(plain) is plain and not values_known(plain.to("meta"))
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((values_known(x), unbatched(x)))
        return x.sum()

    vmap(look, in_dims=1)(plain)
    vmap(grad(look))(plain.double())
    grad(look)(plain.double())
    assert [known for known, _ in seen] == [False, False, True]
    assert torch.equal(seen[0][1], plain) and torch.equal(seen[1][1], plain.double())


def test_two_names_of_the_bounds_where_no_value_is_known(model: Any, fresh_dynamo: None) -> None:
    """transformers' collator passes cu_seq_lens_q and cu_seq_lens_k: equal tensors, compared when a compiled graph runs."""
    ids, bounds = rows(model)[:1], torch.tensor([0, 3, T])
    expected = model(ids, cu_seqlens=bounds).logits

    def call(ids: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return model(ids, cu_seq_lens_q=one, cu_seq_lens_k=other, max_length_q=T, max_length_k=T).logits

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(ids, bounds, bounds.clone()), expected, BOUND)
        with pytest.raises(RuntimeError, match="got cu_seq_lens_k that differ: give cu_seqlens"):
            compiled(ids, bounds, torch.tensor([0, 4, T]))
    assert_close(vmap(lambda row: call(row[None], bounds, bounds.clone())[0])(ids), expected, BOUND)
    with pytest.raises(ValueError, match="cu_seq_lens_k=.* mean the same"):
        vmap(lambda row: call(row[None], bounds, torch.tensor([0, 4, T])))(ids)


def built(seed: int) -> Any:
    return Qwen3_5MoeForCausalLM(small()).init_weights(seed=seed).double().eval()


@pytest.fixture(scope="module")
def small_model() -> Any:
    return built(0)


@pytest.fixture(scope="module", params=[7, 70])  # few assignments, and more than are worth a copy of their weights; two chunks
def long_rows(request: pytest.FixtureRequest) -> Tensor:
    return torch.randint(0, 59, (2, request.param), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"output_logits": False}], ids=["loss", "chunked loss"])
def test_gradients_of_long_rows(options: dict[str, Any], small_model: Any, long_rows: Tensor) -> None:
    model, ids = small_model, long_rows
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],), {"labels": row[None], **options}).loss

    actual = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for number, row in enumerate(ids):
        one = torch.autograd.grad(model(row[None], labels=row[None]).loss, list(model.parameters()), allow_unused=True)
        for name, gradient in zip(weights, one, strict=True):
            if gradient is not None and gradient.abs().max() > 0:
                assert_close(actual[name][number], gradient, LONG_BOUND, name)


def test_an_ensemble_and_long_rows(small_model: Any, long_rows: Tensor) -> None:
    model, ids = small_model, long_rows
    models = [model, built(1)]
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
            assert_close(outputs[number][valid], one(**arguments).logits[valid], LONG_BOUND)
    assert_close(vmap(lambda row: model(row[None]).logits[0])(ids), model(ids).logits, LONG_BOUND)
