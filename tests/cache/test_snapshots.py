"""clone, snapshot and restore."""

from __future__ import annotations

import pytest
import torch

from tests.cache.common import CACHES, contents, filled, next_logits, same, tokens


@CACHES
@pytest.mark.parametrize("record", [0, 4])
def test_a_clone_shares_nothing(model, max_length, record):
    cache = filled(model, max_length=max_length, record=record)
    before, clone = contents(cache), cache.clone()
    next_logits(model, clone)
    for i in (0, 2):
        clone[i].recurrent_state.zero_()
    clone[1].key.zero_()
    assert same(contents(cache), before) and cache.lengths.tolist() == [9, 9]
    other = cache.clone()
    expected = next_logits(model, cache)
    assert torch.equal(next_logits(model, other), expected)
    if record:
        other.rollback(2)
        assert other.lengths.tolist() == [9, 9] and cache.lengths.tolist() == [11, 11]


@CACHES
def test_a_tree_of_snapshots(model, max_length):
    """A snapshot stays valid while only later positions are written."""
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
        cache.restore(branch)  # nothing was written in between: still valid
        assert same(contents(cache), at_branch)


@CACHES
def test_an_overwritten_snapshot_is_stale(model, max_length):
    cache = filled(model, 3, max_length=max_length)
    trunk = cache.snapshot()
    with torch.no_grad():
        model(tokens(2, 4, salt=1), cache=cache)
        branch = cache.snapshot()
        cache.restore(trunk)
        model(tokens(2, 1, salt=2), cache=cache)  # over the branch's fourth position
        before = contents(cache)
        with pytest.raises(ValueError, match="stale.*clone"):
            cache.restore(branch)
        assert same(contents(cache), before) and cache.lengths.tolist() == [4, 4]
        cache.restore(trunk)
        assert cache.lengths.tolist() == [3, 3]


@CACHES
def test_a_snapshot_stays_valid_after_a_rollback_to_it_or_a_return(model, max_length):
    cache = filled(model, 3, max_length=max_length, record=6)
    with torch.no_grad():
        model(tokens(2, 2, salt=1), cache=cache)
        snapshot, expected = cache.snapshot(), contents(cache)
        model(tokens(2, 2, salt=2), cache=cache)
        cache.rollback(2)
        model(tokens(2, 3, salt=3), cache=cache)
        cache.restore(snapshot)
        assert same(contents(cache), expected)
        cache.rollback(1)
        cache.restore(snapshot)  # rewound and not written: still valid, also for further writes
        model(tokens(2, 3, salt=3), cache=cache)
        cache.restore(snapshot)
        assert same(contents(cache), expected)
        cache.rollback(1)
        model(tokens(2, 1, salt=3), cache=cache)
        with pytest.raises(ValueError, match="stale"):
            cache.restore(snapshot)


def test_a_snapshot_of_another_cache_raises(model):
    one, other = filled(model), filled(model)
    with pytest.raises(ValueError, match="another cache"):
        other.restore(one.snapshot())


@CACHES
def test_snapshots_share_keys_and_are_not_kept_alive(model, max_length):
    """They share keys and values with the cache, and the cache holds weak references."""
    import gc
    import weakref

    cache = filled(model, max_length=max_length)
    nbytes = cache.nbytes
    snapshots = [cache.snapshot() for _ in range(50)]
    keys = [layer.key_buffer.data_ptr() for snapshot in snapshots for layer in snapshot.layers if hasattr(layer, "key_buffer")]
    assert len(set(keys)) == 1 and cache.nbytes == nbytes
    reference = weakref.ref(snapshots[0])
    snapshots.clear()
    gc.collect()
    assert reference() is None
