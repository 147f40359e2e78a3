"""rollback and reorder."""

from __future__ import annotations

import pytest
import torch

from tests.cache.common import BOUND, CACHES, contents, filled, next_logits, same, tokens
from tests.support import peer
from tests.support.peer import FULL, assert_close, odd_shape

# ---------------------------------------------------------------------------------------------------- rollback


def test_a_rollback_that_cannot_be_exact_raises(model):
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


def test_a_list_of_numbers_is_by_row_as_a_tensor_is(model):
    by_list, by_tensor = filled(model, 9, record=3), filled(model, 9, record=3)
    by_list.rollback([1, 3])
    by_tensor.rollback(torch.tensor([1, 3]))
    for cache in (by_list, by_tensor):
        assert cache.lengths.tolist() == [8, 6] and cache.seen == 9 and cache.start().tolist() == [8, 6]
    assert same(contents(by_list), contents(by_tensor))


def test_the_last_record_tokens_can_always_be_rolled_back(model):
    """After one prefill, single tokens, and chunks of all sizes."""
    with torch.no_grad():
        for parts in ([150], [1] * 12, [70, 1, 1, 1], [3, 90, 2], [5, 66, 64, 1]):
            cache, ids = model.new_cache(2, record=4), tokens(2, sum(parts), salt=sum(parts))
            start = 0
            for n in parts:
                model(ids[:, start : start + n], cache=cache, logits_to_keep=1)
                start += n
            cache.rollback(min(4, start))
            expected = model(ids[:, : start - 4], cache=model.new_cache(2)).cache
            assert_close(next_logits(model, cache), next_logits(model, expected), BOUND)


def test_recording_is_bounded(model):
    """The size of the recorded tokens does not grow with the length of the conversation."""
    cache = model.new_cache(1, record=4)
    with torch.no_grad():
        sizes = []
        for t in range(240):
            model(tokens(1, 1, salt=t), cache=cache, logits_to_keep=1)
            sizes.append(cache.nbytes - 2 * cache[1].key_buffer.nbytes)
    assert max(sizes[150:]) <= max(sizes[:150])


def test_an_attention_only_model_rolls_back_without_recording():
    case = odd_shape(8, layer_types=[FULL, FULL], num_hidden_layers=2)
    model = peer.ours(case)
    peer.draw(model, 0)
    ids = case.ids(2, 9)
    with torch.no_grad():
        cache = model(ids, cache=model.new_cache(2)).cache
        cache.rollback(4)
        logits = model(ids[:, 5:], cache=cache).logits
        assert_close(logits, model(ids).logits[:, 5:], BOUND)


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
