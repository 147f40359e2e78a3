"""cache/static.py and models/static_step.py: a decode step of fixed shape against the ordinary one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import Config, Qwen3_5ForCausalLM
from qwen35moe.cache import static
from qwen35moe.models.static_step import StaticStep
from tests.cache.common import BOUND, CASE, LAST_BITS, tokens
from tests.models import test_vision_language as vision_language
from tests.support import peer
from tests.support.peer import FULL, LINEAR, odd_shape, relative_error


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "SMALLEST", 12)


def prefilled(model: Any, lengths: list[int], room: int = 40) -> Any:
    """A static cache after a prefill of rows of these lengths, padded on the left."""
    cache, width = model.new_cache(len(lengths), room), max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    model(tokens(len(lengths), width), attention_mask=mask.long(), cache=cache)
    return cache


def ordinary(model: Any, cache: Any, token: Tensor, active: Tensor) -> Tensor:
    """The ordinary step: rows that are not active are padding."""
    past = torch.arange(cache.seen) >= cache.seen - cache.lengths[:, None]
    return model(token[:, None], attention_mask=torch.cat([past, active[:, None]], 1).long(), cache=cache).logits[:, -1]


def assert_same_cache(actual: Any, expected: Any, bound: float) -> None:
    assert actual.seen == expected.seen and actual._longest == expected._longest
    assert torch.equal(actual.lengths, expected.lengths)
    assert actual._common_length in (None, *actual.lengths.tolist())
    for a, b in zip(actual._layers, expected._layers, strict=True):
        for name in a.names:
            x, y = getattr(a, name), getattr(b, name)
            for row, length in enumerate(expected.lengths.tolist()):
                cut = slice(length) if name in ("key", "value") else slice(None)
                assert relative_error(x[row, cut], y[row, cut]) <= bound, name
    for row, length in enumerate(expected.lengths.tolist()):
        assert torch.equal(actual._ids[row, :length], expected._ids[row, :length])


@pytest.mark.parametrize("lengths", [[9], [5, 9, 7]], ids=["one row", "ragged"])
@torch.no_grad()
def test_it_computes_the_ordinary_step_across_buckets(double: Any, lengths: list[int]) -> None:
    """Rows of other lengths, the buckets 12, 24 and 40, and rows that end: row 0 from step 6 on, row 1 in step 8 alone."""
    expected, actual = prefilled(double, lengths), prefilled(double, lengths)
    step, used = StaticStep(double, actual), set()
    for t in range(18):
        token = CASE.ids(len(lengths), 1, salt=t)[:, 0]
        active = torch.ones(len(lengths), dtype=torch.bool)
        if len(lengths) > 1:
            active[0], active[1] = t < 6, t != 8
        used.add(step.prepare()[0])
        step.token.copy_(token)
        step.active.copy_(active)
        logits, whole = step(), ordinary(double, expected, token, active)
        assert relative_error(logits[active], whole[active]) <= LAST_BITS
    step.settle()
    assert used == {12, 24, 40}
    assert_same_cache(actual, expected, LAST_BITS)


@torch.no_grad()
def test_in_float32_and_after_other_operations(model: Any) -> None:
    """Between steps: a prefill of more tokens, a snapshot that is restored, a reorder, an edit, a clone, saving."""
    caches = prefilled(model, [6, 4]), prefilled(model, [6, 4])
    expected, actual = caches
    step, every = StaticStep(model, actual), torch.ones(2, dtype=torch.bool)

    def both(salt: int) -> None:
        token = CASE.ids(2, 1, salt=salt)[:, 0]
        step.token.copy_(token)
        assert relative_error(step(frozen=False), ordinary(model, expected, token, every)) <= BOUND
        assert_same_cache(actual, expected, BOUND)

    both(0)
    snapshots = [cache.snapshot() for cache in caches]
    both(1)
    for cache in caches:
        model(tokens(2, 3, salt=5), cache=cache)
    both(2)
    for cache, snapshot in zip(caches, snapshots, strict=True):
        cache.restore(snapshot)
    both(3)
    for cache in caches:
        cache.reorder([1, 0])
        cache[0].recurrent_state.mul_(0.5)
    both(4)
    assert_same_cache(actual.clone(), expected.clone(), BOUND)
    both(5)


@torch.no_grad()
def test_values_that_were_rolled_back_and_are_not_finite_do_not_reach_a_row(model: Any) -> None:
    cache, good = prefilled(model, [7, 3]), prefilled(model, [7, 3])
    snapshot = cache.snapshot()
    for layer in cache._layers:
        for tensor in layer.tensors():
            if tensor.dim() == 4 and tensor.shape[1] == 40:
                tensor[1, 3:7] = torch.nan
    cache.restore(snapshot)
    step, other = StaticStep(model, cache), StaticStep(model, good)
    assert torch.equal(step(), other())


@pytest.mark.parametrize("dense", [False, True], ids=["MoE", "dense"])
@torch.no_grad()
def test_after_an_image_positions_go_on_from_the_rotary_offset(dense: bool) -> None:
    """The multimodal class; as a dense model the text of one."""
    if dense:
        text = {name: value for name, value in vision_language.TEXT.items() if "expert" not in name and "moe" not in name}
        text |= {"model_type": "qwen3_5_text", "intermediate_size": 20}
        made: Any = Qwen3_5ForCausalLM(Config.from_dict(text)).init_weights(seed=4).double().eval()
        inputs = {"input_ids": CASE.ids(1, 6) % 48}
    else:
        made, inputs = copy.deepcopy(vision_language.model()).double(), vision_language.row(0)
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    caches = [made.new_cache(1, 60) for _ in range(2)]
    for cache in caches:
        made(**inputs, cache=cache)
    assert dense or int(caches[0].rope_delta) < 0
    step = StaticStep(made, caches[0])
    for t in range(3):
        token = torch.tensor([7 + t])
        step.token.copy_(token)
        whole = made(token[:, None], cache=caches[1]).logits[:, -1]
        assert relative_error(step(frozen=False), whole) <= LAST_BITS
        assert_same_cache(*caches, LAST_BITS)


@torch.no_grad()
def test_what_it_cannot_do_names_the_way_out(model: Any) -> None:
    for cache, message in ((model.new_cache(2), "no max_length"), (model.new_cache(2, 9, record=3), "record=3")):
        with pytest.raises(ValueError, match=f"static cache without record, this one has {message}"):
            StaticStep(model, cache)
    cache = prefilled(model, [9, 5], room=10)
    step = StaticStep(model, cache)
    step.active.copy_(torch.tensor([False, True]))
    for _ in range(5):  # the longest row is not active
        step()
    assert cache.lengths.tolist() == [9, 10]
    with pytest.raises(ValueError, match=r"would hold 11 tokens, the cache has room for 10: make one with new_cache\(2, max"):
        step()


@torch.no_grad()
def test_one_graph_for_prefill_and_one_for_all_steps_of_a_bucket() -> None:
    torch._dynamo.reset()
    case = odd_shape(8, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_experts=3, num_experts_per_tok=2)
    made, graphs = peer.ours(case), []
    peer.draw(made, 0)

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    caches = [made.new_cache(2, 16) for _ in range(2)]
    prefill = torch.compile(made, fullgraph=True, backend=backend)
    for cache, run in zip(caches, (prefill, made), strict=True):
        run(case.ids(2, 9), cache=cache)
    assert len(graphs) == 1
    steps = [StaticStep(made, cache) for cache in caches]
    runs = torch.compile(steps[0].run, fullgraph=True, backend=backend), steps[1].run
    for t in range(3):
        logits = []
        for step, run in zip(steps, runs, strict=True):
            step.token.copy_(case.ids(2, 1, salt=t)[:, 0])
            logits.append(run(step.prepare()[0]).clone())
            static.advance(step.cache, frozen=False)
        assert relative_error(*logits) <= BOUND
        assert len(graphs) == 2, "one for the bucket of 12 positions"
    torch._dynamo.reset()
