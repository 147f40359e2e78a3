"""The cache as a value: growing and static, clone, snapshot, rollback, reorder, reading and writing, gradients.

What the laws of `test_laws.py` say about results at awkward cuts is not repeated here; this is about the object.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.cache import Cache
from tests import peer
from tests.peer import FULL, LINEAR, assert_close, odd_shape, relative_error

BOUND = 1e-5
LAST_BITS = 1e-13  # of float64, relative: keys of other strides, or none, are other products to a BLAS
CASE = odd_shape(
    8, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, linear_num_key_heads=2, linear_num_value_heads=4,
    num_attention_heads=6, num_key_value_heads=3, linear_conv_kernel_dim=3, attention_bias=False,
)
CACHES = pytest.mark.parametrize("max_length", [None, 40], ids=["growing", "static"])


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model


@pytest.fixture(scope="module")
def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def tokens(batch: int, length: int, salt: int = 0) -> Tensor:
    return CASE.ids(batch, length, salt)


@torch.no_grad()
def filled(model: Any, length: int = 9, *, batch: int = 2, max_length: int | None = None, record: int = 0) -> Cache:
    return model(tokens(batch, length), cache=model.new_cache(batch, max_length, record=record)).cache


def contents(cache: Cache) -> list[Tensor]:
    return [getattr(cache[i], name).clone() for i, kind in enumerate(CASE.text["layer_types"])
            for name in (("inputs", "memory") if kind == LINEAR else ("key", "value"))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def next_logits(model: Any, cache: Cache) -> Tensor:
    return model(tokens(cache.batch_size, 2, salt=9), cache=cache).logits


# ---------------------------------------------------------------------------------------------------- shape and size


@CACHES
def test_layers_are_read_by_name(model, max_length):
    cache, text = filled(model, max_length=max_length), CASE.text
    assert len(cache.layers) == 3 and cache.batch_size == 2 and cache.max_length == max_length
    assert cache.lengths.tolist() == [9, 9] and cache.lengths.dtype == torch.long
    channels = 2 * 2 * text["linear_key_head_dim"] + 4 * text["linear_value_head_dim"]
    assert cache[0].inputs.shape == (2, channels, 2)
    assert cache[0].memory.shape == (2, 4, text["linear_key_head_dim"], text["linear_value_head_dim"])
    assert cache[1].key.shape == cache[1].value.shape == (2, 9, 3, text["head_dim"])


def test_an_empty_cache_is_that_of_no_tokens(double):
    model = double
    cache = model.new_cache(2)
    assert cache.lengths.tolist() == [0, 0] and cache[1].key.shape[1] == 0
    assert (cache[0].memory == 0).all() and (cache[0].inputs == 0).all()
    ids = tokens(2, 5)
    with torch.no_grad():
        assert_close(model(ids, cache=cache).logits, model(ids).logits, LAST_BITS)


def test_no_cache_is_made_unless_one_is_given(model):
    with torch.no_grad():
        assert model(tokens(1, 3)).cache is None


def test_a_growing_cache_grows_by_doubling(model):
    """140 tokens one by one move the keys a few times, and hold at most twice what is needed."""
    cache, moves, place = model.new_cache(1), 0, None
    with torch.no_grad():
        for t in range(140):
            model(tokens(1, 1, salt=t), cache=cache, logits_to_keep=1)
            moves += cache[1].key.data_ptr() != place
            place = cache[1].key.data_ptr()
    assert moves <= 4 and cache[1].key.shape[1] == 140
    needed = 2 * cache[1].key.nbytes
    assert cache.nbytes <= 2 * needed + 40_000


def test_nbytes_counts_what_is_held(model):
    cache = model.new_cache(2, 40)
    heads, text = 4, CASE.text
    channels = 2 * 2 * text["linear_key_head_dim"] + heads * text["linear_value_head_dim"]
    attention = 2 * 2 * 40 * 3 * text["head_dim"] * 4
    linear = 2 * (channels * 2 + heads * text["linear_key_head_dim"] * text["linear_value_head_dim"]) * 4
    assert attention + 2 * linear <= cache.nbytes <= attention + 2 * linear + 100
    recording = filled(model, max_length=40, record=4)
    assert recording.nbytes > cache.nbytes


@pytest.mark.parametrize("record", [0, 3])
def test_a_static_cache_is_never_reallocated(model, record):
    """So that it can be captured in a CUDA graph: ragged prefill, decode, restore, rollback, reorder, assignment."""
    cache = model.new_cache(2, 40, record=record)

    def places() -> list[int]:
        return [getattr(cache[i], name).data_ptr() for i, kind in enumerate(CASE.text["layer_types"])
                for name in (("inputs", "memory") if kind == LINEAR else ("keys", "values"))]

    before = places()
    ids, mask = peer.padded([tokens(1, 9)[0], tokens(1, 4)[0]], "left")
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        assert places() == before, "prefill"
        model(tokens(2, 1), cache=cache)
        assert places() == before, "decode"
        late = torch.cat([mask, torch.ones(2, 1, dtype=torch.long), torch.tensor([[1] + [0] * 27, [1] * 28])], dim=1)
        model(tokens(2, 28), attention_mask=late, cache=cache)
        assert cache.lengths.tolist() == [11, 33]
        assert places() == before, "a ragged chunk whose columns reach past the end"
        if record:
            cache.rollback(2)
            assert places() == before, "rollback"
        point = cache.snapshot()
        model(tokens(2, 2), cache=cache)
        cache.restore(point)
        assert places() == before, "restore"
        cache.reorder([1, 0])
        assert places() == before, "reorder"
        for i, kind in enumerate(CASE.text["layer_types"]):
            for name in ("inputs", "memory") if kind == LINEAR else ("key", "value"):
                setattr(cache[i], name, torch.zeros_like(getattr(cache[i], name)))
        assert places() == before, "assignment"


def test_a_static_cache_too_short_is_refused_and_left_as_it_was(model):
    cache = filled(model, max_length=12)
    before = contents(cache)
    for more in (4, 40):
        with pytest.raises(ValueError, match=rf"{9 + more}.*12"):
            model(tokens(2, more), cache=cache)
        assert cache.lengths.tolist() == [9, 9] and same(contents(cache), before)
    with torch.no_grad():
        model(tokens(2, 3), cache=cache)
    assert cache.lengths.tolist() == [12, 12]
    with pytest.raises(ValueError, match="20.*12"):
        model(tokens(2, 20), cache=model.new_cache(2, 12))


def test_a_ragged_batch_may_fill_a_static_cache_to_the_brim(model):
    """Room is counted in tokens of the longest row, not in columns."""
    cache = model.new_cache(2, 10)
    with torch.no_grad():
        ids, mask = peer.padded([tokens(1, 9)[0], tokens(1, 2)[0]], "right")
        model(ids, attention_mask=mask, cache=cache)
        more = torch.cat([mask, torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1] * 8])], dim=1)
        model(tokens(2, 8), attention_mask=more, cache=cache)
    assert cache.lengths.tolist() == [10, 10]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "max_length": 0},
                                     {"batch_size": 2, "record": -1}], ids=str)
def test_impossible_caches_are_refused(model, options):
    with pytest.raises(ValueError, match="0|-1"):
        model.new_cache(**options)


def test_dtypes_follow_the_model(model):
    for dtype, wide in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cache = copy.deepcopy(model).to(dtype).new_cache(1)
        assert cache[1].key.dtype == cache[0].inputs.dtype == dtype and cache[0].memory.dtype == wide


# ---------------------------------------------------------------------------------------------------- clone, snapshot


@CACHES
@pytest.mark.parametrize("record", [0, 4])
def test_a_clone_shares_nothing(model, max_length, record):
    cache = filled(model, max_length=max_length, record=record)
    before, twin = contents(cache), cache.clone()
    next_logits(model, twin)
    for i in (0, 2):
        twin[i].memory.zero_()
    twin[1].key.zero_()
    assert same(contents(cache), before) and cache.lengths.tolist() == [9, 9]
    other = cache.clone()
    expected = next_logits(model, cache)
    assert torch.equal(next_logits(model, other), expected)
    if record:
        other.rollback(2)
        assert other.lengths.tolist() == [9, 9] and cache.lengths.tolist() == [11, 11]


@CACHES
def test_a_tree_of_snapshots(model, max_length):
    """Deeper points hold while only what lies behind them is written."""
    cache = filled(model, 3, max_length=max_length)
    trunk = cache.snapshot()
    with torch.no_grad():
        model(tokens(2, 4, salt=1), cache=cache)
        branch, at_branch = cache.snapshot(), contents(cache)
        model(tokens(2, 2, salt=2), cache=cache)
        cache.restore(branch)
        assert same(contents(cache), at_branch)
        model(tokens(2, 3, salt=3), cache=cache)
        cache.restore(branch)
        assert same(contents(cache), at_branch)
        cache.restore(trunk)
        cache.restore(branch)  # nothing was written in between: still good
        assert same(contents(cache), at_branch)


@CACHES
def test_a_snapshot_written_over_is_noticed(model, max_length):
    cache = filled(model, 3, max_length=max_length)
    trunk = cache.snapshot()
    with torch.no_grad():
        model(tokens(2, 4, salt=1), cache=cache)
        branch = cache.snapshot()
        cache.restore(trunk)
        model(tokens(2, 1, salt=2), cache=cache)  # over the branch's fourth slot
        before = contents(cache)
        with pytest.raises(ValueError, match="stale.*clone"):
            cache.restore(branch)
        assert same(contents(cache), before) and cache.lengths.tolist() == [4, 4]
        cache.restore(trunk)
        assert cache.lengths.tolist() == [3, 3]


@CACHES
def test_a_snapshot_survives_a_rollback_that_stops_at_it_or_returns_to_it(model, max_length):
    cache = filled(model, 3, max_length=max_length, record=6)
    with torch.no_grad():
        model(tokens(2, 2, salt=1), cache=cache)
        point, there = cache.snapshot(), contents(cache)
        model(tokens(2, 2, salt=2), cache=cache)
        cache.rollback(2)
        model(tokens(2, 3, salt=3), cache=cache)
        cache.restore(point)
        assert same(contents(cache), there)
        cache.rollback(1)
        cache.restore(point)  # rewound and not written on: still good, and good for further writes
        model(tokens(2, 3, salt=3), cache=cache)
        cache.restore(point)
        assert same(contents(cache), there)
        cache.rollback(1)
        model(tokens(2, 1, salt=3), cache=cache)
        with pytest.raises(ValueError, match="stale"):
            cache.restore(point)


def test_a_snapshot_of_another_cache_is_refused(model):
    one, other = filled(model), filled(model)
    with pytest.raises(ValueError, match="another cache"):
        other.restore(one.snapshot())


@CACHES
def test_snapshots_are_cheap_and_forgotten(model, max_length):
    """They share keys and values with the cache, and the cache keeps none of them alive."""
    import gc
    import weakref

    cache = filled(model, max_length=max_length)
    held = cache.nbytes
    points = [cache.snapshot() for _ in range(50)]
    keys = [layer.keys.data_ptr() for point in points for layer in point.layers if hasattr(layer, "keys")]
    assert len(set(keys)) == 1 and cache.nbytes == held
    ghost = weakref.ref(points[0])
    points.clear()
    gc.collect()
    assert ghost() is None


# ---------------------------------------------------------------------------------------------------- rollback


def test_rollback_refuses_what_it_cannot_do_exactly(model):
    cache = filled(model, 9, record=3)
    before = contents(cache)
    with torch.no_grad():
        plain = filled(model, 9)
    with pytest.raises(ValueError, match=r"4.*record"):
        plain.rollback(4)
    for wrong in (-1, torch.tensor([1, -2]), 1.5):
        with pytest.raises(ValueError):
            cache.rollback(wrong)
    with pytest.raises(ValueError, match="10.*9"):
        cache.rollback(10)
    with pytest.raises(ValueError):
        cache.rollback(torch.tensor([1, 1, 1]))
    assert same(contents(cache), before) and cache.lengths.tolist() == [9, 9]
    cache.rollback(0)
    cache.rollback(torch.tensor([0, 0]))
    assert same(contents(cache), before)


def test_the_last_record_tokens_can_always_be_taken_back(model):
    """However they came: one prefill, single tokens, chunks; over and over."""
    with torch.no_grad():
        for parts in ([150], [1] * 12, [70, 1, 1, 1], [3, 90, 2], [5, 66, 64, 1]):
            cache, seen = model.new_cache(2, record=4), tokens(2, sum(parts), salt=sum(parts))
            start = 0
            for n in parts:
                model(seen[:, start : start + n], cache=cache, logits_to_keep=1)
                start += n
            cache.rollback(min(4, start))
            expected = model(seen[:, : start - 4], cache=model.new_cache(2)).cache
            assert_close(next_logits(model, cache), next_logits(model, expected), BOUND)


def test_recording_is_bounded(model):
    """Not every token of a long conversation is kept: the recording's size does not grow with its length."""
    cache = model.new_cache(1, record=4)
    with torch.no_grad():
        sizes = []
        for t in range(240):
            model(tokens(1, 1, salt=t), cache=cache, logits_to_keep=1)
            sizes.append(cache.nbytes - 2 * cache[1].keys.nbytes)
    assert max(sizes[150:]) <= max(sizes[:150])


def test_an_attention_only_model_rolls_back_without_recording():
    case = odd_shape(8, layer_types=[FULL, FULL], num_hidden_layers=2)
    model = peer.ours(case)
    peer.draw(model, 0)
    ids = case.ids(2, 9)
    with torch.no_grad():
        cache = model(ids, cache=model.new_cache(2)).cache
        cache.rollback(4)
        found = model(ids[:, 5:], cache=cache).logits
        assert_close(found, model(ids).logits[:, 5:], BOUND)


# ---------------------------------------------------------------------------------------------------- reorder


@CACHES
@pytest.mark.parametrize("record", [0, 4])
def test_reorder_permutes_and_repeats_rows(model, max_length, record):
    ids, mask = peer.padded([tokens(1, n, salt=n)[0] for n in (9, 4, 6)], "left")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, cache=model.new_cache(3, max_length, record=record)).cache
        kept = cache.clone()
        cache.reorder([2, 0, 2])
        assert cache.lengths.tolist() == [6, 9, 6]
        step = tokens(3, 1, salt=5)[:1].expand(3, 1)
        expected = model(step, cache=kept).logits[[2, 0, 2]]
        assert_close(model(step, cache=cache).logits, expected, BOUND)
        if record:
            cache.rollback(3)
            kept.rollback(3)
            assert_close(model(step, cache=cache).logits, model(step, cache=kept).logits[[2, 0, 2]], BOUND)


def test_reorder_changes_the_number_of_rows_of_a_growing_cache_only(model):
    cache = filled(model)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.batch_size == 3 and next_logits(model, cache).shape[0] == 3
    static = filled(model, max_length=20)
    with pytest.raises(ValueError, match="2.*3"):
        static.reorder([0, 1, 1])
    for wrong in ([0, 2], [-1, 0], [[0, 1]]):
        with pytest.raises(ValueError, match="0 ... 1"):
            static.reorder(wrong)


# ---------------------------------------------------------------------------------------------------- reading, writing


@CACHES
def test_layers_are_written_by_name(double, max_length):
    model = double
    cache, other = filled(model, max_length=max_length), filled(model, max_length=max_length)
    ids = tokens(2, 9, salt=4)
    with torch.no_grad():
        source = model(ids, cache=model.new_cache(2)).cache
        for i, kind in enumerate(CASE.text["layer_types"]):
            for name in ("inputs", "memory") if kind == LINEAR else ("key", "value"):
                setattr(cache[i], name, getattr(source[i], name))
        assert same(contents(cache), contents(source))
        found, expected = next_logits(model, cache), next_logits(model, source)
        assert_close(found, expected, LAST_BITS)
        assert torch.equal(found, expected) or max_length is not None  # a static cache has strides of its own
        assert not relative_error(next_logits(model, other), found) <= 1e-3


def test_a_value_of_another_shape_is_refused(model):
    cache = filled(model)
    for layer, name in ((0, "memory"), (0, "inputs"), (1, "key"), (1, "value")):
        before = getattr(cache[layer], name)
        with pytest.raises(ValueError, match=str(list(before.shape)).replace("[", r"\[").replace("]", r"\]")):
            setattr(cache[layer], name, before[:1])
        assert getattr(cache[layer], name).shape == before.shape


def test_saving_needs_the_same_configuration(model, tmp_path):
    filled(model).save(tmp_path / "cache.safetensors")
    other = peer.ours(odd_shape(8, layer_types=[LINEAR, FULL, FULL], num_hidden_layers=3))
    with pytest.raises(ValueError):
        Cache.load(tmp_path / "cache.safetensors", other.config.text_config)


# ---------------------------------------------------------------------------------------------------- gradients


def test_gradients_flow_through_a_growing_cache(model):
    """A prefix and the rest, differentiated together, give the gradients of the whole. Within the bound."""
    ids = tokens(2, 12)
    cotangent = torch.randn((2, 12, CASE.text["vocab_size"]), generator=peer.generator(0))

    def gradients(parts: list[int], detach: bool = False) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        cache, loss, start = model.new_cache(2), torch.zeros(()), 0
        for n in parts:
            span = slice(start, start + n)
            loss = loss + (model(ids[:, span], cache=cache).logits * cotangent[:, span]).sum()
            start += n
        loss.backward()
        return peer.gradients(model)

    whole = gradients([12])
    for parts in ([5, 7], [1, 1, 10], [4, 4, 3, 1]):
        peer.assert_all_close(gradients(parts), whole, BOUND, str(parts))


def test_a_parameter_may_be_the_initial_memory(model):
    """Its gradient is that of finite differences."""
    double = copy.deepcopy(model).double()
    ids = tokens(1, 5)
    memory = torch.nn.Parameter(0.1 * torch.randn(double.new_cache(1)[0].memory.shape, dtype=torch.float64))
    key = torch.randn(memory.shape, generator=peer.generator(1), dtype=torch.float64)

    def value(memory: Tensor) -> Tensor:
        cache = double.new_cache(1)
        cache[0].memory = memory
        return double(ids, cache=cache).logits.square().sum()

    value(memory).backward()
    assert memory.grad is not None
    with torch.no_grad():
        step = 1e-5
        slope = (value(memory + step * key) - value(memory - step * key)) / (2 * step)
    assert slope.item() == pytest.approx((memory.grad * key).sum().item(), rel=1e-6)


def test_inference_after_a_forward_with_gradients_leaves_them_right(model):
    """A growing cache written under no_grad after a differentiated forward must not spoil its backward."""
    ids = tokens(2, 6)
    cache = model.new_cache(2)
    model.zero_grad(set_to_none=True)
    loss = model(ids, cache=cache).logits.square().sum()
    with torch.no_grad():
        model(tokens(2, 3, salt=1), cache=cache)
    loss.backward()
    found = peer.gradients(model)
    model.zero_grad(set_to_none=True)
    model(ids).logits.square().sum().backward()
    peer.assert_all_close(found, peer.gradients(model), BOUND)


def test_a_static_cache_carries_no_gradient_and_says_so(model):
    cache = model.new_cache(2, 40)
    with pytest.raises(ValueError, match="static.*no_grad"):
        model(tokens(2, 3), cache=cache)
    assert cache.lengths.tolist() == [0, 0]
    assert (cache[0].memory == 0).all() and (cache[1].keys == 0).all()


@CACHES
def test_a_forward_that_fails_leaves_the_cache_as_it_was(model, max_length):
    """An interruption in the last layer: nothing half done."""
    cache = filled(model, max_length=max_length)
    before = contents(cache)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.norm.register_forward_hook(fail)
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(tokens(2, 4), cache=cache)
    finally:
        handle.remove()
    assert cache.lengths.tolist() == [9, 9] and same(contents(cache), before)
    assert torch.equal(next_logits(model, cache), next_logits(model, filled(model, max_length=max_length)))


def test_the_repr_says_what_it_holds(model):
    text = repr(filled(model, max_length=40))
    assert "2 rows" in text and "40" in text and "[9, 9]" in text
