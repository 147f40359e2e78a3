"""The ids that a cache keeps, and prompts that contradict it."""

from __future__ import annotations

import pytest
import torch

from qwen35moe.cache import Cache
from tests.cache.common import CACHES, filled, tokens
from tests.support import peer

MORE = torch.tensor([[1], [2]])


@CACHES
@torch.no_grad()
def test_a_prompt_must_begin_with_the_cached_tokens(model, max_length):
    cache = filled(model, max_length=max_length)
    prompt = torch.cat([tokens(2, 9), MORE], dim=1)
    cache.check_prompt(prompt)
    other = prompt.clone()
    other[1, 4] = (other[1, 4] + 1) % 61
    with pytest.raises(ValueError, match=rf"row 1: token 4 of the prompt is {other[1, 4]}, the cache holds {prompt[1, 4]}"):
        cache.check_prompt(other)
    with pytest.raises(ValueError, match="row 0: the prompt has 8 tokens and the cache holds 9"):
        cache.check_prompt(prompt[:, :8])
    for wrong in (prompt[:1], prompt[0], prompt.float()):
        with pytest.raises(ValueError, match="2 rows"):
            cache.check_prompt(wrong)
    with pytest.raises(ValueError, match="attention_mask"):
        cache.check_prompt(prompt, torch.ones(2, 3))


@CACHES
@torch.no_grad()
def test_the_ids_follow_every_operation(model, max_length, tmp_path):
    """Ragged rows, later tokens, rollback, restore, reorder, clone, file."""

    def holds(cache: Cache, *rows: torch.Tensor) -> None:
        ids, mask = peer.padded([torch.cat([row, row.new_tensor([7])]) for row in rows], "left")
        cache.check_prompt(ids, mask)
        ids[mask.bool()] = (ids[mask.bool()] + 1) % 61
        with pytest.raises(ValueError, match="row 0: token 0"):
            cache.check_prompt(ids, mask)

    a, b = tokens(1, 9)[0], tokens(1, 4, salt=1)[0]
    ids, mask = peer.padded([a, b], "left")
    cache = model(ids, attention_mask=mask, cache=model.new_cache(2, max_length and 100, record=5)).cache
    holds(cache, a, b)
    start, step = cache.snapshot(), tokens(2, 70, salt=2)  # over the first growth
    model(step, cache=cache)
    holds(cache, torch.cat([a, step[0]]), torch.cat([b, step[1]]))
    cache.rollback(torch.tensor([3, 5]))
    holds(cache, torch.cat([a, step[0, :-3]]), torch.cat([b, step[1, :-5]]))
    cache.save(tmp_path / "cache.safetensors")
    holds(Cache.load(tmp_path / "cache.safetensors", model.config.text_config), torch.cat([a, step[0, :-3]]),
          torch.cat([b, step[1, :-5]]))
    past = (torch.arange(cache.seen) < cache.lengths[:, None]).long()
    late = torch.cat([past, torch.tensor([[0, 1], [1, 1]])], dim=1)
    kept = cache.clone()
    model(step[:, :2], attention_mask=late, cache=cache)
    holds(cache, torch.cat([a, step[0, :-3], step[0, 1:2]]), torch.cat([b, step[1, :-5], step[1, :2]]))
    holds(kept, torch.cat([a, step[0, :-3]]), torch.cat([b, step[1, :-5]]))
    cache.reorder([1, 0])
    holds(cache, torch.cat([b, step[1, :-5], step[1, :2]]), torch.cat([a, step[0, :-3], step[0, 1:2]]))
    if max_length is None:
        cache.restore(start)
        holds(cache, a, b)


@torch.no_grad()
def test_documents_continue_their_rows_and_embeddings_fit_every_prompt(model):
    cache = filled(model)
    row = tokens(1, 5, salt=3)
    model(row, cu_seqlens=torch.tensor([0, 2, 5]), cache=cache)
    ids, mask = peer.padded([torch.cat([tokens(2, 9)[0], row[0, :2], MORE[0]]),
                             torch.cat([tokens(2, 9)[1], row[0, 2:], MORE[0]])], "right")
    cache.check_prompt(ids, mask)
    embedded = model.new_cache(1)
    model(inputs_embeds=model.model.embed_tokens(tokens(1, 4)), cache=embedded)
    model(tokens(1, 2, salt=5), cache=embedded)
    embedded.check_prompt(torch.cat([tokens(1, 4, salt=6), tokens(1, 2, salt=5), MORE[:1]], dim=1))
    with pytest.raises(ValueError, match="token 4"):
        embedded.check_prompt(torch.cat([tokens(1, 4, salt=6), (tokens(1, 2, salt=5) + 1) % 61, MORE[:1]], dim=1))
