"""A decode step of fixed shape: one token per row of a static cache, from device memory alone. See `qwen35moe.cache.static`.

    step = StaticStep(model, cache)              # after the prefill
    step.token.copy_(token)                      # [B], and step.active for rows that have ended
    logits = step()                              # [B, vocabulary]

It computes what model(token[:, None], cache=cache) does. Its part `run` is what a CUDA graph or torch.compile takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.cache.layout import FixedStep, TokenLayout
from qwen35moe.cache.modes import ordinary_tensors
from qwen35moe.cache.static import Counters, advance, bucket, settle
from qwen35moe.models.inputs import Planned, TextInputs


class StepMemory:
    """The memory of the steps over a cache beside the cache's own: what `StaticStep` describes, and the rows' counters."""

    def __init__(self, cache: Cache) -> None:
        self.counters = Counters(cache)
        with ordinary_tensors():
            self.token = torch.zeros_like(self.counters.lengths)
            self.active = torch.ones_like(self.counters.lengths, dtype=torch.bool)


class StaticStep:
    """Decodes with a static cache. token [B] int64 and active [B] bool are written in place before a step: the next token of
    each row, and whether it takes it; a row that does not stays as it is in the cache. memory: of earlier steps with this
    cache.

    ValueError for a growing cache, one with recorded tokens, one that has no room for the step, and a model on several devices.
    """

    def __init__(self, model: Any, cache: Cache, memory: StepMemory | None = None) -> None:
        if cache.max_length is None or cache.record:
            kind = f"record={cache.record}" if cache.record else "no max_length"
            raise ValueError(f"a step of fixed shape needs a static cache without record, this one has {kind}: "
                             f"make one with new_cache({cache.batch_size}, max_length=...)")  # fmt: skip
        if model.device_map is not None:
            raise ValueError("a step of fixed shape needs all layers on one device: the model has a device_map")
        self.model, self.cache = model, cache
        memory = memory or StepMemory(cache)
        self.counters, self.token, self.active = memory.counters, memory.token, memory.active

    @torch.no_grad()
    def __call__(self, *, frozen: bool = True) -> Tensor:
        """The logits [B, vocabulary] after the token. frozen: whether rows may be inactive; `settle` after the last step."""
        positions, _ = self.prepare()
        logits = self.run(positions)
        advance(self.cache, frozen=frozen)
        return logits

    def prepare(self) -> tuple[int, bool]:
        """Before a step: the positions that attention reads, and whether the cache's tensors may be others than before."""
        cache, changed = self.cache, self.counters.adopt(self.cache)
        room = cache.max_length
        assert room is not None
        if cache._longest >= room:
            settle(cache)  # the longest row may have been inactive
        if (needed := cache._longest + 1) > room:
            raise ValueError(
                f"the longest row would hold {needed} tokens, the cache has room for {room}: "
                f"make one with new_cache({cache.batch_size}, max_length={needed}) or more"
            )
        return bucket(needed, room), changed

    def run(self, positions: int) -> Tensor:
        """The step on the device, over the first `positions` positions: logits [B, vocabulary]. Reads and writes `token`,
        `active` and the cache's tensors; the host's numbers follow in `cache.static.advance`."""
        counters, cache, rows = self.counters, self.cache, self.token.shape[0]
        tokens = self.token[:, None]
        layout = TokenLayout(
            (rows, 1), rows, 1, (counters.lengths + counters.delta)[None, :, None].expand(3, rows, 1), counters.lengths,
            step=FixedStep(self.active, counters.rows, positions),
        )
        planned = Planned(TextInputs(tokens, cache=cache), layout)
        # Router logits, where the configuration has them on, are for training.
        return self.model(tokens, cache=cache, logits_to_keep=1, output_router_logits=False, planned=planned).logits[:, -1]

    def settle(self) -> None:
        """Reads the lengths of rows that may have been inactive from the device, after the last step."""
        settle(self.cache)
