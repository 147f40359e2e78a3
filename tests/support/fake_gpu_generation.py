"""Scenarios of `fake_gpu`: generate() on fake CUDA tensors, from the prefill to the last token, with what the host reads late
made up. Row 0 ends with the third token.

A scenario that ends has read no value: neither between two steps nor in one, greedy or sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

STEPS, ENDS_AFTER = 8, 3


class MadeUp:
    """In place of a pinned copy: what the host reads when it is there."""

    started = 0

    def start(self, report: Any) -> None:
        assert report.is_cuda and report.shape[0] == 4
        MadeUp.started += 1
        self.number = MadeUp.started

    def ready(self) -> bool:
        return MadeUp.started - self.number >= 2

    def read(self) -> list[list[int]]:
        return [[5, 7], [int(self.number >= ENDS_AFTER), 0], [-1, -1], [5, 7]]


def decoding(torch: Any, kept: bool = False, **options: Any) -> Callable[[], object]:
    """A batch of two prompts. kept: the cache is returned, so that the state of a row that has ended must not change."""
    from qwen35moe.generation import loop
    from qwen35moe.generation.prompt import Prompt
    from qwen35moe.models.generation_inputs import StreamInputs
    from tests.support.fake_gpu import ids, small

    prompt = Prompt(ids(torch, 2, 65), None, ids(torch, 2, 65), (65, 65), torch.zeros(2, 65, dtype=torch.int64), None)
    inputs = StreamInputs(prompt.ids, **{"max_new_tokens": STEPS, "eos_token_id": [7, 9], **options})
    MadeUp.started = 0
    # The ids of a prompt are checked at the call, which reads them.
    with mock.patch.multiple(loop, read_prompt=lambda *_, **__: prompt, late_copy=lambda _: MadeUp):
        run = loop._Run(small(torch), inputs, keeps_cache=kept)
    assert run.reads.behind and run.freezes == kept
    if run.state.uniforms is not None:
        run.state.uniforms.reserve()  # the copy of a block of random numbers to the device

    def call() -> None:
        read = [(one.step, one.tokens) for one in run]
        assert read == [(step, [5 if step < ENDS_AFTER else 7, 7]) for step in range(STEPS)], read
        assert run.state.sequences().shape == (2, 65 + STEPS)

    return call


SAMPLED = {"do_sample": True, "seed": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
PENALISED = {
    "repetition_penalty": 1.2, "presence_penalty": 0.5, "min_new_tokens": 4, "suppress_tokens": [3],
    "begin_suppress_tokens": [4], "bad_words_ids": [[5], [6, 7]],
}  # fmt: skip
SCENARIOS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "generate": lambda torch: decoding(torch),
    "generate_static": lambda torch: decoding(torch, cache="static"),
    "generate_sampled": lambda torch: decoding(torch, **SAMPLED, **PENALISED),
    "generate_top_p": lambda torch: decoding(torch, do_sample=True, seed=7, top_p=0.9),
    "generate_kept": lambda torch: decoding(torch, kept=True),
    "generate_kept_static": lambda torch: decoding(torch, kept=True, cache="static"),
}
