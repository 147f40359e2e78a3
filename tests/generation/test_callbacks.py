"""Results of the caller's functions are read as in transformers, or are one clear error; and settings at their limits."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from qwen35moe.generation import generate, stream
from tests.support.fakes import FakeModel

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
OPTIONS: dict[str, Any] = dict(max_new_tokens=6, eos_token_id=[], pad_token_id=40)


def lengths(criterion: Any) -> list[int]:
    """How many tokens each row has got when the criterion has stopped the rows."""
    out = generate(FakeModel(), PROMPTS, stopping_criteria=[criterion], **OPTIONS)[:, 5:]
    return [int((row != 40).sum()) for row in out]


VERDICTS: list[tuple[Any, list[int]]] = [
    (True, [1, 1]), (False, [6, 6]), (1, [1, 1]), (0, [6, 6]),
    (numpy.bool_(True), [1, 1]), (numpy.array([False, True]), [6, 1]), ([True, False], [1, 6]),
    (torch.tensor(True), [1, 1]), (torch.tensor([True]), [1, 1]), (torch.tensor([False, True]), [6, 1]),
    (torch.tensor([[False], [True]]), [6, 1]), (torch.tensor([0, 1]), [6, 1]),
    (torch.tensor([1, 0], dtype=torch.uint8), [1, 6]),
]  # fmt: skip


@pytest.mark.parametrize("verdict, expected", VERDICTS, ids=[repr(verdict) for verdict, _ in VERDICTS])
def test_verdicts_of_a_criterion(verdict: Any, expected: list[int]) -> None:
    assert lengths(lambda ids, scores: verdict) == expected


NO_VERDICTS: list[tuple[Any, str]] = [
    (None, "returned None, expected True"), ("stop", "returned 'stop'"), (0.0, "returned 0.0, expected True"),
    (torch.tensor([0.2, 0.7]), r"expected True, False or \[2\] bool"), (torch.tensor([1, 2]), "truth values, or 0 and 1"),
    (-1, "returned -1"), (torch.tensor([False] * 3), r"returned \[3\] values for 2 rows"), ([], "returned"),
    (torch.zeros(1, 2, dtype=torch.bool), r"returned \[1, 2\] values"), (object(), "returned <object"),
]  # fmt: skip


@pytest.mark.parametrize("verdict, words", NO_VERDICTS, ids=[words[-20:] for _, words in NO_VERDICTS])
def test_what_is_no_verdict_is_an_error(verdict: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"the stopping criterion.*{words}") as error:
        generate(FakeModel(), PROMPTS, stopping_criteria=[lambda ids, scores: verdict], **OPTIONS)
    assert len(str(error.value)) < 300


def test_a_criterion_object_of_transformers_sees_the_scores() -> None:
    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.append(scores)
            return torch.full((2,), input_ids.shape[1] >= 7)

    seen: list[Any] = []
    generate(FakeModel(), PROMPTS, stopping_criteria=StoppingCriteriaList([AfterTwo()]), **OPTIONS)
    assert seen == [None, None]
    seen.clear()
    more = dict(return_dict_in_generate=True, output_scores=True)
    out = generate(FakeModel(), PROMPTS, stopping_criteria=[AfterTwo()], **OPTIONS, **more)
    assert [len(scores) for scores in seen] == [1, 2] and torch.equal(seen[1][1], out.scores[1])


def test_scores_of_a_processor() -> None:
    """Another floating dtype and a change in place are taken; the processor is called with all columns so far."""
    plain = generate(FakeModel(), PROMPTS, **OPTIONS)

    def in_place(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7] = 100.0
        return scores

    def half(ids: Tensor, scores: Tensor) -> Tensor:
        return (scores * 0).half().index_fill(1, torch.tensor([7]), 5.0)

    for processor in (in_place, half):
        for sampling in ({}, dict(do_sample=True, top_k=1, seed=3)):
            out = generate(FakeModel(), PROMPTS, logits_processor=processor, **OPTIONS, **sampling)
            assert bool((out[:, 5:] == 7).all())
    same = [lambda ids, scores: scores.double(), lambda ids, scores: scores.clone()]
    assert torch.equal(generate(FakeModel(), PROMPTS, logits_processor=same, **OPTIONS), plain)


NO_SCORES: list[tuple[Any, str]] = [
    (lambda ids, scores: None, r"returned NoneType, expected scores \[2, 41\] \(return the scores"),
    (lambda ids, scores: scores[:, :20], r"returned \[2, 20\] torch.float32"),
    (lambda ids, scores: scores[0], r"returned \[41\]"),
    (lambda ids, scores: scores[:1], r"returned \[1, 41\]"),
    (lambda ids, scores: scores.long(), "returned.*torch.int64"),
    (lambda ids, scores: scores > 0, "returned.*torch.bool"),
    (lambda ids, scores: scores.to(torch.complex64), "returned.*torch.complex64"),
    (lambda ids, scores: scores.numpy(), "returned ndarray"),
    (lambda ids, scores: (scores,), "returned tuple"),
]


@pytest.mark.parametrize("processor, words", NO_SCORES, ids=[words[-20:] for _, words in NO_SCORES])
def test_what_are_no_scores_is_an_error(processor: Any, words: str) -> None:
    for sampling in ({}, dict(do_sample=True, top_k=3)):
        with pytest.raises(ValueError, match=f"the logits processor '<lambda>' {words}"):
            generate(FakeModel(), PROMPTS, logits_processor=[processor], **OPTIONS, **sampling)


def test_the_message_names_what_may_have_made_such_logits() -> None:
    def nan(ids: Tensor, scores: Tensor) -> Tensor:
        return scores * torch.nan

    with pytest.raises(ValueError, match="look at the logits_processor, the model's weights$"):
        generate(FakeModel(), PROMPTS, logits_processor=nan, **OPTIONS)
    with pytest.raises(ValueError, match="look at suppress_tokens=.*, the model's weights$") as error:
        generate(FakeModel(), PROMPTS, suppress_tokens=list(range(41)), **OPTIONS)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match="look at min_new_tokens=2"):
        generate(FakeModel(), PROMPTS, min_new_tokens=2, max_new_tokens=3, eos_token_id=list(range(41)), pad_token_id=1)


# -------------------------------------------------------------------------------------------------- settings at limits


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("more", [{}, dict(top_k=5), dict(top_p=0.5), dict(min_p=0.5)])
def test_the_limit_of_small_temperatures_is_greedy(temperature: float, more: dict[str, Any]) -> None:
    plain = generate(FakeModel(), PROMPTS, **OPTIONS)
    options = OPTIONS | more | dict(do_sample=True, seed=0)
    assert torch.equal(generate(FakeModel(), PROMPTS, temperature=temperature, **options), plain)


NARROW = [dict(top_p=1e-300), dict(top_p=5e-324), dict(min_p=1), dict(top_k=1), dict(min_p=1.0, top_k=10**9)]


@pytest.mark.parametrize("limit", NARROW, ids=str)
def test_the_narrowest_filters_are_greedy(limit: dict[str, Any]) -> None:
    plain = generate(FakeModel(), PROMPTS, **OPTIONS)
    assert torch.equal(generate(FakeModel(), PROMPTS, do_sample=True, seed=1, **limit, **OPTIONS), plain)


def test_the_widest_settings_are_none() -> None:
    options = OPTIONS | dict(do_sample=True, seed=4)
    plain = generate(FakeModel(), PROMPTS, **options)
    for wide in (dict(top_k=10**30), dict(top_k=41), dict(top_p=1), dict(min_p=0), dict(min_p=5e-324), dict(temperature=1)):
        assert torch.equal(generate(FakeModel(), PROMPTS, **options, **wide), plain), wide


def test_a_huge_temperature_draws_evenly_from_what_is_allowed() -> None:
    """Also where a mask has set scores to -inf."""
    options = OPTIONS | dict(do_sample=True, max_new_tokens=200)
    for temperature in (1e30, 1e39, 1e300):
        out = generate(FakeModel(), [3, 1], seed=2, temperature=temperature, suppress_tokens=[0, 7], **options)[0, 2:]
        assert set(out.tolist()) <= set(range(41)) - {0, 7} and len(set(out.tolist())) > 30


@pytest.mark.parametrize("penalty", [1e-40, 1e-300, 1e39, 1e300])
def test_penalties_beyond_float32(penalty: float) -> None:
    """The token that was seen comes last, or first."""
    model = FakeModel(script=lambda history: 7)
    out = generate(model, [[7, 2]], max_new_tokens=4, eos_token_id=[], repetition_penalty=penalty)[0, 2:].tolist()
    assert out == [7] * 4 if penalty < 1 else 7 not in out
    if penalty > 1:
        unseen = generate(model, [[2, 2]], max_new_tokens=1, eos_token_id=[], presence_penalty=penalty)[0, 2:].tolist()
        assert unseen == [7]
        after = generate(model, [[2, 2]], max_new_tokens=5, eos_token_id=[], presence_penalty=penalty)[0, 2:].tolist()
        assert len(set(after)) == 5


BEYOND = [dict(temperature=10**400), dict(top_k=float("inf")), dict(top_p=float("nan")), dict(repetition_penalty=-1.0),
          dict(min_p=-1e-9), dict(top_p=-0.0), dict(temperature="0.7"), dict(top_p=True)]  # fmt: skip


@pytest.mark.parametrize("wrong", BEYOND, ids=[str(wrong)[:30] for wrong in BEYOND])
def test_settings_out_of_range_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        generate(FakeModel(), PROMPTS, do_sample=True, **wrong, **OPTIONS)
    assert len(str(error.value)) < 200


def test_seeds_of_64_bits() -> None:
    options = OPTIONS | dict(do_sample=True)
    for seed in (-1, -(2**63), 2**63, 2**64 - 1, torch.tensor(5), numpy.int64(5)):
        first = generate(FakeModel(), PROMPTS, seed=seed, **options)
        assert torch.equal(generate(FakeModel(), PROMPTS, seed=seed, **options), first)
    last = generate(FakeModel(), PROMPTS, seed=2**64 - 1, **options)
    assert torch.equal(generate(FakeModel(), PROMPTS, seed=-1, **options), last)


# ----------------------------------------------------------------------------------------------------------- streamers


def test_a_streamer_that_fails_is_ended() -> None:
    class Streamer:
        def __init__(self, fails_at: int) -> None:
            self.fails_at, self.puts, self.ended = fails_at, 0, 0

        def put(self, ids: Tensor) -> None:
            self.puts += 1
            if self.puts == self.fails_at:
                raise KeyError("streamer")

        def end(self) -> None:
            self.ended += 1

    for fails_at in (1, 3):  # at the prompt, at a token
        streamer = Streamer(fails_at)
        with pytest.raises(KeyError, match="streamer"):
            generate(FakeModel(), PROMPTS, streamer=streamer, **OPTIONS)
        assert streamer.ended == 1


def test_a_stream_that_is_closed_early_leaves_a_cache_that_goes_on() -> None:
    model = FakeModel()
    cache = model.new_cache(2)
    steps = stream(model, PROMPTS, cache=cache, **OPTIONS)
    first, second = next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled() and cache.lengths.tolist() == [6, 6]
    longer = torch.cat([torch.tensor(PROMPTS), first[:, None], second[:, None]], 1)
    out = generate(model, longer, cache=cache, **(OPTIONS | dict(max_new_tokens=4)))
    assert torch.equal(out, generate(FakeModel(), PROMPTS, **OPTIONS))


def test_what_is_no_streamer_is_an_error() -> None:
    with pytest.raises(ValueError, match="streamer 3 has no methods put and end"):
        generate(FakeModel(), PROMPTS, streamer=3, **OPTIONS)  # type: ignore[arg-type]
