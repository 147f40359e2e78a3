"""Calls of generate() whose round trips to a GPU tests/triton/test_round_trips.py counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from tests.support.text_scenarios import gpu, model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
RAGGED = [[3, 1, 4, 1, 5], [9, 2]]
STEPS = 8


class Copied:
    """In place of a pinned copy, which needs CUDA's driver: ready two steps later. From the third step on row 0 has ended, as
    the host reads it."""

    started = 0

    def start(self, report: torch.Tensor) -> None:
        from tests.support.pretend_gpu import plain

        assert report.is_cuda
        Copied.started += 1
        self.number, self.values = Copied.started, plain(report).clone()

    def ready(self) -> bool:
        return Copied.started - self.number >= 2

    def read(self) -> list[list[int]]:
        tokens, done, failed, *_ = self.values.tolist()
        return [tokens, [int(self.number >= 3), *done[1:]], failed]


class Letters:
    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join("abc"[token % 3] for token in ids)


class Streamer:
    puts = 0

    def put(self, ids: torch.Tensor) -> None:
        from tests.support.pretend_gpu import OnGpu

        assert not isinstance(ids, OnGpu)
        self.puts += 1

    def end(self) -> None:
        assert self.puts == 1 + STEPS


def call(prompts: Any = None, cache: Callable[[], Any] | None = None, **options: Any) -> Callable[[], object]:
    """generate() of STEPS tokens. No row ends on the device: end tokens are suppressed."""
    from qwen35moe.generation import loop

    prompts = PROMPTS if prompts is None else prompts
    arguments: dict[str, Any] = {
        "max_new_tokens": STEPS, "eos_token_id": [7], "pad_token_id": 0, "min_new_tokens": STEPS, **options,
        "cache": cache if cache is None else cache(),
    }  # fmt: skip

    def run() -> None:
        Copied.started = 0
        pinned = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
        with mock.patch.object(loop, "late_copy", lambda device: Copied), pinned:
            out = model().generate(prompts, **arguments)
        sequences = out.sequences if hasattr(out, "sequences") else out
        assert sequences.is_cuda and sequences.shape == (2, 5 + STEPS)

    return run


def second_turn(held: list[int]) -> Callable[[], object]:
    """A cache holds the first tokens of each prompt."""
    cache = model().new_cache(2)
    mask = torch.tensor([[int(column >= 4 - count) for column in range(4)] for count in held])
    ids = torch.tensor([[0] * (4 - count) + row[:count] for row, count in zip(PROMPTS, held, strict=True)])
    with torch.no_grad():
        model()(gpu(ids), attention_mask=mask, cache=cache)
    return call(cache=lambda: cache)


SAMPLED = {"do_sample": True, "seed": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
PENALISED = {
    "repetition_penalty": 1.2, "presence_penalty": 0.5, "suppress_tokens": [3], "begin_suppress_tokens": [4],
    "bad_words_ids": [[5], [6, 7]],
}  # fmt: skip
SCENARIOS: dict[str, Callable[[], Callable[[], object]]] = {
    "lists": lambda: call(),
    "tensors on the GPU": lambda: call(gpu(PROMPTS)),
    "tensors on the GPU with a mask": lambda: call(gpu(PROMPTS), attention_mask=gpu([[1] * 5, [0, 0, 0, 1, 1]])),
    "ragged lists": lambda: call(RAGGED),
    "sampled": lambda: call(**SAMPLED, **PENALISED),
    "a streamer": lambda: call(streamer=Streamer()),
    "stop strings": lambda: call(stop=["xyz"], tokenizer=Letters()),
    "static": lambda: call(cache=lambda: "static"),
    "scores": lambda: call(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "a cache": lambda: call(cache=lambda: model().new_cache(2)),
    "a static cache": lambda: call(cache=lambda: model().new_cache(2, max_length=20)),
    "a cache that holds a part": lambda: second_turn([4, 4]),
    "a cache that holds rows of different lengths": lambda: second_turn([4, 2]),
    "a cache with recorded tokens": lambda: call(cache=lambda: model().new_cache(2, record=2)),
    "a criterion that reads": lambda: call(stopping_criteria=lambda ids, scores: bool((ids[:, -1] > 99).all())),
}
