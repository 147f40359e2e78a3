"""The cache as an object: growing and static, read and assigned by name, saved, differentiated.

`tests/models/test_laws.py` checks the model's results with a cache at awkward cuts.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.cache import Cache
from tests.cache.common import BOUND, CACHES, CASE, LAST_BITS, contents, filled, next_logits, same, tokens
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape, relative_error

# ---------------------------------------------------------------------------------------------------- shape and size


@CACHES
def test_layers_are_read_by_name(model, max_length):
    cache, text = filled(model, max_length=max_length), CASE.text
    assert len(cache.layers) == 3 and cache.batch_size == 2 and cache.max_length == max_length
    assert cache.lengths.tolist() == [9, 9] and cache.lengths.dtype == torch.long
    channels = 2 * 2 * text["linear_key_head_dim"] + 4 * text["linear_value_head_dim"]
    assert cache[0].conv_state.shape == (2, channels, 2)
    assert cache[0].recurrent_state.shape == (2, 4, text["linear_key_head_dim"], text["linear_value_head_dim"])
    assert cache[1].key.shape == cache[1].value.shape == (2, 9, 3, text["head_dim"])


def test_an_empty_cache_is_zero_and_changes_nothing(double):
    model = double
    cache = model.new_cache(2)
    assert cache.lengths.tolist() == [0, 0] and cache[1].key.shape[1] == 0
    assert (cache[0].recurrent_state == 0).all() and (cache[0].conv_state == 0).all()
    ids = tokens(2, 5)
    with torch.no_grad():
        assert_close(model(ids, cache=cache).logits, model(ids).logits, LAST_BITS)


def test_without_a_cache_none_is_returned(model):
    with torch.no_grad():
        assert model(tokens(1, 3)).cache is None


def test_a_growing_cache_grows_by_doubling(model):
    """140 tokens one by one reallocate the keys a few times, and take at most twice the memory that is needed."""
    cache, reallocations, address = model.new_cache(1), 0, None
    with torch.no_grad():
        for t in range(140):
            model(tokens(1, 1, salt=t), cache=cache, logits_to_keep=1)
            reallocations += cache[1].key.data_ptr() != address
            address = cache[1].key.data_ptr()
    assert reallocations <= 4 and cache[1].key.shape[1] == 140
    needed = 2 * cache[1].key.nbytes
    assert cache.nbytes <= 2 * needed + 40_000


def test_nbytes_counts_every_tensor(model):
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
    """A CUDA graph can capture it: ragged prefill, decode, restore, rollback, reorder, assignment."""
    cache = model.new_cache(2, 40, record=record)

    def addresses() -> list[int]:
        return [getattr(cache[i], name).data_ptr() for i, kind in enumerate(CASE.text["layer_types"])
                for name in (("conv_state", "recurrent_state") if kind == LINEAR else ("key_buffer", "value_buffer"))]

    before = addresses()
    ids, mask = peer.padded([tokens(1, 9)[0], tokens(1, 4)[0]], "left")
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        assert addresses() == before, "prefill"
        model(tokens(2, 1), cache=cache)
        assert addresses() == before, "decode"
        late = torch.cat([mask, torch.ones(2, 1, dtype=torch.long), torch.tensor([[1] + [0] * 27, [1] * 28])], dim=1)
        model(tokens(2, 28), attention_mask=late, cache=cache)
        assert cache.lengths.tolist() == [11, 33]
        assert addresses() == before, "a ragged chunk whose columns reach past the end"
        if record:
            cache.rollback(2)
            assert addresses() == before, "rollback"
        snapshot = cache.snapshot()
        model(tokens(2, 2), cache=cache)
        cache.restore(snapshot)
        assert addresses() == before, "restore"
        cache.reorder([1, 0])
        assert addresses() == before, "reorder"
        for layer in cache.layers:
            for name in layer.names:
                setattr(layer, name, torch.zeros_like(getattr(layer, name)))
        assert addresses() == before, "assignment"


def test_more_tokens_than_a_static_cache_holds_raise_and_change_nothing(model):
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


def test_a_ragged_batch_may_fill_a_static_cache(model):
    """The limit counts tokens of the longest row, not columns."""
    cache = model.new_cache(2, 10)
    with torch.no_grad():
        ids, mask = peer.padded([tokens(1, 9)[0], tokens(1, 2)[0]], "right")
        model(ids, attention_mask=mask, cache=cache)
        more = torch.cat([mask, torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1] * 8])], dim=1)
        model(tokens(2, 8), attention_mask=more, cache=cache)
    assert cache.lengths.tolist() == [10, 10]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "max_length": 0},
                                     {"batch_size": 2, "record": -1}], ids=str)
def test_wrong_sizes_raise(model, options):
    with pytest.raises(ValueError, match="0|-1"):
        model.new_cache(**options)


def test_dtypes_follow_the_model(model):
    for dtype, wide in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cache = copy.deepcopy(model).to(dtype).new_cache(1)
        assert cache[1].key.dtype == cache[0].conv_state.dtype == dtype and cache[0].recurrent_state.dtype == wide


# ---------------------------------------------------------------------------------------------------- assignment, saving


@CACHES
def test_layers_are_assigned_by_name(double, max_length):
    model = double
    cache, other = filled(model, max_length=max_length), filled(model, max_length=max_length)
    ids = tokens(2, 9, salt=4)
    with torch.no_grad():
        source = model(ids, cache=model.new_cache(2)).cache
        for layer, other_layer in zip(cache.layers, source.layers, strict=True):
            for name in layer.names:
                setattr(layer, name, getattr(other_layer, name))
        assert same(contents(cache), contents(source))
        actual, expected = next_logits(model, cache), next_logits(model, source)
        assert_close(actual, expected, LAST_BITS)
        assert torch.equal(actual, expected) or max_length is not None  # a static cache has strides of its own
        assert not relative_error(next_logits(model, other), actual) <= 1e-3


def test_a_value_of_another_shape_raises(model):
    cache = filled(model)
    for layer, name in ((0, "recurrent_state"), (0, "conv_state"), (1, "key"), (1, "value")):
        before = getattr(cache[layer], name)
        with pytest.raises(ValueError, match=str(list(before.shape)).replace("[", r"\[").replace("]", r"\]")):
            setattr(cache[layer], name, before[:1])
        assert getattr(cache[layer], name).shape == before.shape


def test_loading_needs_the_same_configuration(model, tmp_path):
    filled(model).save(tmp_path / "cache.safetensors")
    other = peer.ours(odd_shape(8, layer_types=[LINEAR, FULL, FULL], num_hidden_layers=3))
    with pytest.raises(ValueError):
        Cache.load(tmp_path / "cache.safetensors", other.config.text_config)


# ---------------------------------------------------------------------------------------------------- gradients


def test_gradients_flow_through_a_growing_cache(model):
    """A prefix and the rest, differentiated together, give the gradients of the whole within the bound."""
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


def test_a_parameter_may_be_the_initial_recurrent_state(model):
    """Its gradient agrees with finite differences."""
    double = copy.deepcopy(model).double()
    ids = tokens(1, 5)
    state = torch.nn.Parameter(0.1 * torch.randn(double.new_cache(1)[0].recurrent_state.shape, dtype=torch.float64))
    direction = torch.randn(state.shape, generator=peer.generator(1), dtype=torch.float64)

    def loss(state: Tensor) -> Tensor:
        cache = double.new_cache(1)
        cache[0].recurrent_state = state
        return double(ids, cache=cache).logits.square().sum()

    loss(state).backward()
    assert state.grad is not None
    with torch.no_grad():
        step = 1e-5
        slope = (loss(state + step * direction) - loss(state - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((state.grad * direction).sum().item(), rel=1e-6)


def test_inference_after_a_forward_with_gradients_does_not_change_them(model):
    """A growing cache is written under no_grad between a forward and its backward."""
    ids = tokens(2, 6)
    cache = model.new_cache(2)
    model.zero_grad(set_to_none=True)
    loss = model(ids, cache=cache).logits.square().sum()
    with torch.no_grad():
        model(tokens(2, 3, salt=1), cache=cache)
    loss.backward()
    gradients = peer.gradients(model)
    model.zero_grad(set_to_none=True)
    model(ids).logits.square().sum().backward()
    peer.assert_all_close(gradients, peer.gradients(model), BOUND)


def test_a_static_cache_with_gradients_raises(model):
    cache = model.new_cache(2, 40)
    with pytest.raises(ValueError, match="static.*no_grad"):
        model(tokens(2, 3), cache=cache)
    assert cache.lengths.tolist() == [0, 0]
    assert (cache[0].recurrent_state == 0).all() and (cache[1].key_buffer == 0).all()


@CACHES
def test_a_forward_that_fails_leaves_the_cache_unchanged(model, max_length):
    """An interruption after the last layer."""
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


def test_the_repr_has_rows_room_and_lengths(model):
    text = repr(filled(model, max_length=40))
    assert "2 rows" in text and "40" in text and "[9, 9]" in text
