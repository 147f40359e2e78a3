"""The cache as a state machine: after any sequence of public operations its rows continue as their texts do in one call.

The oracle is the list of token ids of each row; its logits come from a float64 model without a cache, which reads the whole row
at once. The float32 model has the same weights, rounded once. Every expert is chosen, so that rounding cannot flip a choice.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from qwen35moe.cache import Cache
from tests.properties.tried import tried
from tests.support import peer
from tests.support.peer import FULL, LINEAR, odd_shape, relative_error

BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-4}
LONGEST = 44  # tokens of a row; a static cache has room for so many
CASE = odd_shape(
    15, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, num_experts=3, num_experts_per_tok=3,
    linear_num_key_heads=2, linear_num_value_heads=4, num_attention_heads=4, num_key_value_heads=2, linear_conv_kernel_dim=4,
    attention_bias=False, tie_word_embeddings=False,
)
TOKEN = st.integers(0, CASE.text["vocab_size"] - 1)


@functools.lru_cache
def model_of(dtype: torch.dtype) -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 3)
    return model.to(dtype)


@functools.lru_cache(maxsize=4096)
@torch.no_grad()
def one_shot(row: tuple[int, ...]) -> Tensor:
    """Logits [T, vocabulary] of a whole row in float64."""
    return model_of(torch.float64)(torch.tensor([row])).logits[0]


@dataclass
class Rows:
    """What the rows of a cache hold, and how many of the last tokens of each must be rollable.

    fed: the ids that the forwards got: after a direct edit the states are those of another text.
    """

    texts: list[list[int]]
    fed: list[list[int]]
    rollable: list[int]
    rewinds: int = 0  # rollbacks and restores so far: they may make older snapshots stale

    def copy(self) -> Rows:
        return Rows([list(text) for text in self.texts], [list(ids) for ids in self.fed], list(self.rollable), self.rewinds)


@dataclass
class Held:
    """A cache and its rows, with the snapshots that were taken of it."""

    cache: Cache
    rows: Rows
    snapshots: list[tuple[Any, Rows, int]] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float64, torch.float32]), batch=st.integers(1, 3), static=st.booleans(),
        record=st.sampled_from([0, 2, 6]),
    )
    def start(self, dtype: torch.dtype, batch: int, static: bool, record: int) -> None:
        self.model, self.bound, self.record = model_of(dtype), BOUNDS[dtype], record
        cache = self.model.new_cache(batch, LONGEST if static else None, record=record)
        self.now = Held(cache, Rows([[] for _ in range(batch)], [[] for _ in range(batch)], [0] * batch))
        self.others: list[Held] = []
        tried("cache sequences")

    # ----------------------------------------------------------------------------------------------- forward calls

    def fits(self, count: int) -> bool:
        return max(map(len, self.now.rows.texts)) + count <= LONGEST

    @torch.no_grad()
    def forward(self, new: list[list[int]], left: bool) -> None:
        """Feeds each row its new tokens, padded on one side, and compares every new logit with the whole row's."""
        cache, rows = self.now.cache, self.now.rows
        longest = max(map(len, new))
        ids = torch.full((len(new), longest), 1)
        mask = torch.zeros(len(new), longest, dtype=torch.long)
        for r, tokens in enumerate(new):
            columns = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
            ids[r, columns], mask[r, columns] = torch.tensor(tokens, dtype=torch.long), 1
        options: dict[str, Any] = {}
        if not bool(mask.all()):
            held = torch.zeros(len(new), cache.seen, dtype=torch.long)
            for r, text in enumerate(rows.texts):
                held[r, : len(text)] = 1
            options["attention_mask"] = torch.cat([held, mask], dim=1)
        out = self.model(ids, cache=cache, **options)
        assert out.cache is cache
        for r, tokens in enumerate(new):
            rows.texts[r] += tokens
            rows.fed[r] += tokens
            rows.rollable[r] = min(self.record, rows.rollable[r] + len(tokens))
            if tokens:
                expected = one_shot(tuple(rows.texts[r]))[-len(tokens) :]
                error = relative_error(out.logits[r][mask[r].bool()], expected)
                assert error <= self.bound, f"row {r} of {len(rows.texts[r])} tokens, {len(tokens)} new: {error:.1e}"
        tried("cached tokens compared", sum(map(len, new)))

    @rule(data=st.data(), left=st.booleans(), alike=st.booleans())
    def feed(self, data: st.DataObject, left: bool, alike: bool) -> None:
        """New tokens for every row: as many for each, or any number from 0."""
        batch, longest = len(self.now.rows.texts), data.draw(st.integers(1, 9))
        if not self.fits(longest):
            return
        lengths = [longest if alike else data.draw(st.integers(0, longest)) for _ in range(batch)]
        lengths[data.draw(st.integers(0, batch - 1))] = longest
        self.forward([data.draw(st.lists(TOKEN, min_size=n, max_size=n)) for n in lengths], left)

    @rule(token=TOKEN)
    def step(self, token: int) -> None:
        """One token for every row: the decode step."""
        if self.fits(1):
            batch = len(self.now.rows.texts)
            self.forward([[(token + row) % CASE.text["vocab_size"]] for row in range(batch)], left=False)

    @rule(data=st.data())
    @torch.no_grad()
    def feed_packed(self, data: st.DataObject) -> None:
        """New tokens for every row as the documents of one packed row: cu_seqlens bounds them."""
        cache, rows = self.now.cache, self.now.rows
        lengths = [data.draw(st.integers(1, 6)) for _ in rows.texts]
        if not self.fits(max(lengths)):
            return
        new = [data.draw(st.lists(TOKEN, min_size=n, max_size=n)) for n in lengths]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        logits = self.model(torch.tensor([sum(new, [])]), cache=cache, cu_seqlens=bounds).logits[0]
        for r, tokens in enumerate(new):
            rows.texts[r] += tokens
            rows.fed[r] += tokens
            rows.rollable[r] = min(self.record, rows.rollable[r] + len(tokens))
            error = relative_error(logits[bounds[r] : bounds[r + 1]], one_shot(tuple(rows.texts[r]))[-len(tokens) :])
            assert error <= self.bound, f"row {r} of {len(rows.texts[r])} tokens, {len(tokens)} packed: {error:.1e}"
        tried("packed continuations")

    @precondition(lambda self: all(self.now.rows.texts))
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        """Greedy tokens from the cache: the most likely ones of the whole rows."""
        if not self.fits(4):
            return
        texts, cache = self.now.rows.texts, self.now.cache
        prompt = [text + [data.draw(TOKEN)] for text in texts]
        if texts != self.now.rows.fed:
            with pytest.raises(ValueError, match="belongs to another text"):
                self.model.generate(prompt, cache=cache, max_new_tokens=2, eos_token_id=[], pad_token_id=0)
            tried("prompts of other texts refused")
            return
        ids = self.model.generate(prompt, cache=cache, max_new_tokens=2, eos_token_id=[], pad_token_id=0)
        for text, row in zip(prompt, ids.tolist(), strict=True):
            row = row[len(row) - len(text) - 2 :]
            assert row[: len(text)] == text
            for position in (len(text), len(text) + 1):
                logits = one_shot(tuple(row[:position]))[-1]
                gap = logits.max() - logits[row[position]]
                assert gap <= self.bound * logits.abs().max(), f"token {row[position]} is {gap:.1e} below the best"
            text[:] = row
        for r, text in enumerate(prompt):
            added = len(text) - 1 - len(texts[r])
            self.now.rows.texts[r], self.now.rows.fed[r] = text[:-1], text[:-1]
            self.now.rows.rollable[r] = min(self.record, self.now.rows.rollable[r] + added)
        tried("generations from a cache")

    # ---------------------------------------------------------------------------------------------- earlier states

    @rule()
    def snapshot(self) -> None:
        self.now.snapshots.append((self.now.cache.snapshot(), self.now.rows.copy(), self.now.rows.rewinds))

    @precondition(lambda self: self.now.snapshots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """A snapshot returns its rows; it may only be stale if the cache has gone back since it was taken."""
        snapshot, rows, rewinds = data.draw(st.sampled_from(self.now.snapshots))
        try:
            self.now.cache.restore(snapshot)
        except ValueError as error:
            assert "stale" in str(error) and self.now.rows.rewinds > rewinds, error
            return
        self.now.rows = replace(rows.copy(), rewinds=self.now.rows.rewinds + 1)
        tried("snapshots restored")

    @rule(data=st.data(), ragged=st.booleans())
    def rollback(self, data: st.DataObject, ragged: bool) -> None:
        """The last tokens go, exactly; it may only be refused beyond what is recorded, and then changes nothing."""
        rows = self.now.rows
        batch = len(rows.texts)
        counts = [data.draw(st.integers(0, 7)) for _ in range(batch)]
        if not ragged:
            counts = [counts[0]] * batch
        try:
            self.now.cache.rollback(torch.tensor(counts) if ragged else counts[0])
        except ValueError as error:
            possible = all(n <= have and n <= len(t) for n, have, t in zip(counts, rows.rollable, rows.texts, strict=True))
            assert not possible, f"{counts} of {rows.rollable} recorded: {error}"
            return
        for r, count in enumerate(counts):
            assert count <= len(rows.texts[r])
            rows.texts[r] = rows.texts[r][: len(rows.texts[r]) - count]
            rows.fed[r] = rows.fed[r][: len(rows.texts[r])]
            rows.rollable[r] = max(0, rows.rollable[r] - count)
        rows.rewinds += 1
        tried("rollbacks")

    # -------------------------------------------------------------------------------------------------- as a value

    @rule(how=st.sampled_from(["clone", "deepcopy", "pickle"]), follow=st.booleans())
    def copy(self, how: str, follow: bool) -> None:
        """A copy and the original are independent: either may be used later."""
        cache = self.now.cache
        other = {"clone": cache.clone, "deepcopy": lambda: copy.deepcopy(cache),
                 "pickle": lambda: pickle.loads(pickle.dumps(cache))}[how]()  # fmt: skip
        held = Held(other, self.now.rows.copy())
        self.others.append(self.now if follow else held)
        self.now = held if follow else self.now
        tried("copies")

    @rule()
    def detach(self) -> None:
        """Nothing changes without gradients."""
        assert self.now.cache.detach_() is self.now.cache

    @precondition(lambda self: self.others)
    @rule()
    def switch(self) -> None:
        """Goes on with another copy."""
        self.others.append(self.now)
        self.now = self.others.pop(0)

    @rule()
    def save_and_load(self) -> None:
        """What a file returns; recorded tokens are not in it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            self.now.cache.save(path)
            loaded = Cache.load(path, self.model.config.text_config)
        rows = self.now.rows.copy()
        rows.rollable = [0] * len(rows.texts)
        self.now = Held(loaded, rows)
        tried("files")

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows, batch = self.now.rows, len(self.now.rows.texts)
        size = batch if self.now.cache.max_length is not None else data.draw(st.integers(1, 3))
        order = data.draw(st.lists(st.integers(0, batch - 1), min_size=size, max_size=size))
        self.now.cache.reorder(order)
        texts, fed = [list(rows.texts[r]) for r in order], [list(rows.fed[r]) for r in order]
        self.now.rows = Rows(texts, fed, [rows.rollable[r] for r in order], rows.rewinds + 1)
        self.now.snapshots.clear()
        tried("reorderings")

    # ------------------------------------------------------------------------------------------------ direct edits

    @precondition(lambda self: any(self.now.rows.texts))
    @rule(data=st.data(), assign=st.booleans())
    @torch.no_grad()
    def transplant(self, data: st.DataObject, assign: bool) -> None:
        """One row's state is replaced through `cache[i]` by that of another text of the same length."""
        cache, rows = self.now.cache, self.now.rows
        r = data.draw(st.sampled_from([r for r, text in enumerate(rows.texts) if text]))
        length = len(rows.texts[r])
        text = data.draw(st.lists(TOKEN, min_size=length, max_size=length))
        donor = self.model(torch.tensor([text]), cache=self.model.new_cache(1)).cache
        for layer, other in zip(cache.layers, donor.layers, strict=True):
            for name in layer.names:
                tensor, new = getattr(layer, name), getattr(other, name)[0]
                if assign:
                    tensor = tensor.clone()
                if name in ("key", "value"):
                    tensor[r, :length] = new
                else:
                    tensor[r] = new
                if assign:
                    setattr(layer, name, tensor)
        rows.texts[r] = text
        rows.rollable = [0] * len(rows.texts)
        rows.rewinds += 1
        tried("direct edits")

    @invariant()
    def lengths_are_those_of_the_texts(self) -> None:
        if hasattr(self, "now"):
            assert self.now.cache.lengths.tolist() == [len(text) for text in self.now.rows.texts]

    def teardown(self) -> None:
        """Every cache that is left continues its rows."""
        if not hasattr(self, "now"):
            return
        for held in [self.now, *self.others[:2]]:
            self.now = held
            if self.fits(2):
                self.forward([[7, 11]] * len(held.rows.texts), left=False)


@pytest.mark.filterwarnings("error")
class TestCache(Machine.TestCase):
    """Sequences of operations; the numbers of a short run."""
