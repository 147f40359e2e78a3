"""The host reads each step some steps late: whatever the lateness, generate() gives what it gives when it reads at once.

A GPU's copies and events are simulated: a copy is ready when some more steps have been launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen35moe.generation import generate, loop, stream, stream_text
from qwen35moe.generation.late import BEHIND, LateReads
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.models.test_model import small
from tests.support.fakes import FakeModel

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
PAD = 40
LATENESS = [0, 1, 2, 3, 99]
reading = False  # whether a read on the host is one of the late ones


class Late:
    """A copy that is ready when `lateness` more have been started."""

    lateness = started = waited = 0

    def start(self, report: Tensor) -> None:
        global reading
        Late.started += 1
        reading, before = True, reading
        self.number, self.values = Late.started, report.tolist()
        reading = before

    def ready(self) -> bool:
        return Late.started - self.number >= Late.lateness

    def read(self) -> list[list[int]]:
        Late.waited += not self.ready()
        return self.values


@contextmanager
def late(lateness: int | None) -> Iterator[None]:
    """None: the host reads at once, as on a CPU."""
    Late.lateness, Late.started, Late.waited = lateness or 0, 0, 0
    with mock.patch.object(loop, "late_copy", lambda device: None if lateness is None else Late):
        yield


class Streamer:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, ids: Tensor) -> None:
        self.events.append(ids.tolist())

    def end(self) -> None:
        self.events.append("end")


class Letters:
    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join("abc"[token % 3] for token in ids)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


ENDS = list(range(0, 39, 8))  # rows 0, 1 and 2 end after different numbers of tokens
CASES: dict[str, dict[str, Any]] = {
    "greedy": dict(eos_token_id=ENDS),
    "greedy without ends": dict(eos_token_id=[], max_new_tokens=9),
    "one token": dict(eos_token_id=ENDS, max_new_tokens=1),
    "sampled": dict(eos_token_id=ENDS, do_sample=True, seed=3, top_k=20, top_p=0.95, temperature=1.3),
    "several": dict(eos_token_id=ENDS, do_sample=True, seed=5, n=2),
    "penalties and masks": dict(
        eos_token_id=ENDS, repetition_penalty=1.5, presence_penalty=0.7, min_new_tokens=4, begin_suppress_tokens=[1, 2, 7],
        bad_words_ids=[[11], [3, 12], [30, 14, 2]],
    ),
    "stop strings": dict(eos_token_id=[16], stop=["bab", "cca"], tokenizer=Letters()),
    "stop strings alone": dict(eos_token_id=[], stop=["ab"], tokenizer=Letters()),
    "a criterion": dict(eos_token_id=[], stopping_criteria=[lambda ids, scores: ids[:, -1] % 7 == 0]),
    "a processor": dict(eos_token_id=ENDS, logits_processor=[lambda ids, scores: scores - ids[:, -1:] % 5]),
}  # fmt: skip


def outcome(lateness: int | None, keep: bool, **options: Any) -> Any:
    """All that a call of generate() leaves, and what the next one gives with the same cache."""
    model, streamer = FakeModel(), Streamer()
    options = dict(max_new_tokens=30, pad_token_id=PAD, streamer=streamer) | options
    rows = len(PROMPTS) * options.get("n", 1)
    with late(lateness):
        if not keep:
            ids = generate(model, PROMPTS, **options)
            return ids.tolist(), streamer.events
        cache = model.new_cache(rows, max_length=7 + 29)
        results = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
        out = generate(model, PROMPTS, cache=cache, **options, **results)
        turns = [prompt + [1, 2] for prompt in cache.rows]
        values = [out.sequences.tolist(), torch.stack(out.scores).tolist(), torch.stack(out.logits).tolist()]
        left = (streamer.events, [list(row) for row in cache.rows], cache.seen)
        cache.max_length = None
        options.pop("n", None)
        return *values, *left, generate(model, turns, cache=cache, **options).tolist(), cache.rows, cache.seen


@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_the_lateness_changes_nothing(name: str, keep: bool) -> None:
    expected = outcome(None, keep, **CASES[name])
    for lateness in LATENESS:
        assert outcome(lateness, keep, **CASES[name]) == expected, lateness
    if name == "greedy":  # the case is what it claims to be
        ids = torch.tensor(expected[0])[:, 7:]
        assert len(set((ids != PAD).sum(1).tolist())) == 3 and ids.shape[1] < 30 - BEHIND


@pytest.mark.parametrize("lateness", LATENESS)
def test_an_iterator_gives_the_same_steps_and_may_stop_early(lateness: int) -> None:
    options: dict[str, Any] = dict(max_new_tokens=30, pad_token_id=PAD, eos_token_id=ENDS)
    for taken in (2, 30):
        for keep in (False, True):
            results = []
            for one in (None, lateness):
                model = FakeModel()
                cache = model.new_cache(3) if keep else None
                with late(one):
                    steps = stream(model, PROMPTS, cache=cache, **options)
                    tokens = [token.tolist() for token, _ in zip(steps, range(taken), strict=False)]
                    steps.close()  # type: ignore[attr-defined]
                    results.append((tokens, cache and (cache.rows, cache.seen)))
            assert results[0] == results[1]


@pytest.mark.parametrize("lateness", LATENESS)
def test_streamed_text_is_the_same(lateness: int) -> None:
    options: dict[str, Any] = dict(max_new_tokens=30, eos_token_id=[5], stop=["cab"])
    pieces = []
    for one in (None, lateness):
        with late(one):
            pieces.append(list(stream_text(FakeModel(), Letters(), PROMPTS[0], **options)))
    assert pieces[0] == pieces[1] and len(pieces[0]) > 4


class Broken(FakeModel):
    """NaN from the fifth new token of the row [9, 2] on, whose fourth is 16."""

    def __init__(self) -> None:
        super().__init__(script=lambda history: 16 if len(history) == 5 and history[0] == 9 else None)

    def logits(self, history: list[int]) -> Tensor:
        return super().logits(history) * (torch.nan if history[0] == 9 and len(history) >= 6 else 1)


@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, temperature=1e-3, seed=1)], ids=["greedy", "sampled"])
def test_logits_without_a_choice_are_an_error_of_their_step(sampling: dict[str, Any]) -> None:
    """Whatever the lateness, the streamer has had the steps before. A row that has ended may have any logits."""
    options: dict[str, Any] = dict(max_new_tokens=20, pad_token_id=PAD, **sampling)
    expected = generate(Broken(), PROMPTS, eos_token_id=ENDS, **options)
    for lateness in (None, *LATENESS):
        streamer = Streamer()
        with late(lateness):
            with pytest.raises(ValueError, match=r"rows \[1\] \(new token 5\): the logits hold NaN"):
                generate(Broken(), PROMPTS, eos_token_id=[], streamer=streamer, **options)
            assert len(streamer.events) == 1 + 4 + 1
            assert torch.equal(generate(Broken(), PROMPTS, eos_token_id=ENDS, **options), expected)


def test_the_host_is_late_but_not_too_late() -> None:
    """It waits only for a step that is BEHIND steps old; and where the caller's functions or an iterator's cache need it, not
    even that."""
    options: dict[str, Any] = dict(max_new_tokens=20, eos_token_id=[], pad_token_id=PAD)
    steps: list[int] = []
    with late(99):
        model = FakeModel()
        for _ in stream(model, PROMPTS, **options):
            steps.append(len(model.calls))
        assert steps == [min(step + 1 + BEHIND, 20) for step in range(20)]
    with late(2):
        generate(FakeModel(), PROMPTS, **options)
        assert Late.waited == 2  # the last two steps
    model = FakeModel()
    alike = [dict(stopping_criteria=lambda ids, scores: False), dict(logits_processor=lambda ids, scores: scores)]
    for more in (*alike, dict(cache=model.new_cache(3))):
        with late(99):
            model.calls.clear()
            assert [len(model.calls) for _ in stream(model, PROMPTS, **options, **more)] == list(range(1, 21))


def test_the_steps_computed_in_vain_are_few() -> None:
    model = FakeModel(script=lambda history: 16)
    for lateness, vain in ((None, 0), (0, 0), (2, 2), (99, BEHIND)):
        with late(lateness):
            model.calls.clear()
            generate(model, PROMPTS, max_new_tokens=30, eos_token_id=16, pad_token_id=PAD)
            assert len(model.calls) == 1 + vain


def test_copies_are_used_again() -> None:
    made: list[Late] = []
    reads = LateReads(lambda: made.append(Late()) or made[-1], 3)
    with late(99):
        for step in range(10):
            reads.put(step, torch.full((4, 2), step))
            assert [read.step for read in reads.take()] == ([step - 3] if step >= 3 else [])
        assert [(read.step, read.tokens, read.done) for read in reads.take(True)] == [(n, [n, n], [n, n]) for n in (7, 8, 9)]
    assert len(made) == 4


# ------------------------------------------------------------------------------------------------ reads on the host


class NoReads(TorchDispatchMode):
    """Raises where a value is read on the host, but not where `reading` is set."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "repeat_interleave")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not reading and name.strip("_").startswith(tuple(word.strip("_") for word in self.READS)):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


class Computing(FakeModel):
    """The forward may read; nothing else after that of the first new token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        global reading
        reading = True
        out = super().forward(*args, **kwargs)
        reading = len(self.calls) == 1
        return out


@contextmanager
def no_reads() -> Iterator[None]:
    global reading

    def guarded(name: str) -> Any:
        method = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert reading, f"Tensor.{name} reads a value on the host"
            return method(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, call)

    reading = True  # what is read at the call may be
    patches = [guarded(name) for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__index__", "__float__")]
    for patch in patches:
        patch.start()
    try:
        with NoReads():
            yield
    finally:
        for patch in patches:
            patch.stop()
        reading = False


# On a CPU top_k and temperature read values by choice; the caller's functions, and stop strings with a cache that is kept, take
# part in every step.
WITHOUT_READS = [name for name in CASES if not name.startswith(("a ", "sampled"))]
KEPT_WITHOUT_READS = [name for name in WITHOUT_READS if "stop" not in CASES[name]]
READS_NOTHING = [*((name, False) for name in WITHOUT_READS), *((name, True) for name in KEPT_WITHOUT_READS)]


@pytest.mark.parametrize("name, keep", READS_NOTHING)
def test_no_step_reads_a_value(name: str, keep: bool) -> None:
    """Prompts of different lengths, and rows that have ended."""
    options: dict[str, Any] = dict(max_new_tokens=12, pad_token_id=PAD) | CASES[name]
    model = Computing()
    expected = generate(model, PROMPTS, **options)
    more = dict(cache=model.new_cache(len(expected)), return_dict_in_generate=True, output_scores=True) if keep else {}
    model.calls.clear()
    with late(2), no_reads():
        out = generate(model, PROMPTS, **options, **more)
    assert torch.equal(out.sequences if keep else out, expected)


def test_a_read_would_be_noticed() -> None:
    options: dict[str, Any] = dict(max_new_tokens=3, pad_token_id=PAD)
    for word, read in (("bool", lambda ids: bool(ids.any())), ("nonzero", lambda ids: len(ids.nonzero()))):
        with late(2), no_reads(), pytest.raises(AssertionError, match=word):
            generate(Computing(), PROMPTS, logits_processor=lambda ids, scores, read=read: scores + read(ids), **options)


# --------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def model() -> Qwen3_5MoeForCausalLM:
    return Qwen3_5MoeForCausalLM(small()).init_weights(seed=0).double().eval()


def contents(state: Any, lengths: list[int]) -> list[Tensor]:
    """A layer's tensors; of keys and values those of the tokens, for behind a row's tokens there may be others."""
    if "key" not in state.names:
        return [state.conv_state.clone(), state.recurrent_state.clone()]
    assert state.key.shape[1] == max(lengths)
    return [x[row, :length].clone() for x in (state.key, state.value) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("max_length, record", [(None, 0), (40, 0), (None, 2)])
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0]], [PROMPTS[0], [2, 7, 1, 8, 2]]], ids=["ragged", "one", "two"])
def test_a_cache_of_the_real_model_is_the_same(
    prompts: list[list[int]], max_length: int | None, record: int, model: Any
) -> None:
    """Its lengths, its contents and how it goes on, after rows that end at different steps; and with recorded tokens, which
    `rollback` takes back."""
    free = model.generate(prompts, max_new_tokens=16, eos_token_id=[], pad_token_id=0)[:, max(map(len, prompts)) :]
    ends = sorted({int(row[3 + 4 * number]) for number, row in enumerate(free)})
    options: dict[str, Any] = dict(max_new_tokens=16, eos_token_id=ends, pad_token_id=0)
    results = []
    for lateness in (None, 0, 3, 99):
        with late(lateness):
            cache = model.new_cache(len(prompts), max_length=max_length, record=record)
            ids = model.generate(prompts, cache=cache, **options)
            lengths, seen = cache.lengths, cache.seen
            tensors = [contents(layer.state, lengths.tolist()) for layer in cache]
            held = [row[:length].tolist() for row, length in zip(cache._ids, lengths.tolist(), strict=True)]
            turns = [row + [5, 3, 2] for row in held]
            if record:
                cache.rollback(2)
            more = model.generate(turns, cache=cache, **options)
            results.append((held, tensors, [ids, lengths, torch.tensor(seen), more, cache.lengths]))
    assert results[0][2][0].shape[1] < max(map(len, prompts)) + 16
    for held, tensors, same in results[1:]:
        assert held == results[0][0]
        assert all(torch.equal(actual, expected) for actual, expected in zip(same, results[0][2], strict=True))
        torch.testing.assert_close(tensors, results[0][1])


def test_an_error_leaves_a_cache_with_what_it_holds(model: Any) -> None:
    """Rows that had ended are as they were at their ends, and the others go on."""
    prompts = [PROMPTS[0], [2, 7, 1, 8, 2]]
    free = model.generate(prompts, max_new_tokens=16, eos_token_id=[])[:, 5:]
    end = int(free[0, 3])
    assert end not in free[1].tolist() and end not in free[0, :3].tolist()

    class Fails(Streamer):
        def put(self, ids: Tensor) -> None:
            super().put(ids)
            if len(self.events) == 9:
                raise KeyError("streamer")

    for lateness in (0, 3, 99):
        cache = model.new_cache(2)
        with late(lateness), pytest.raises(KeyError) as _held:  # its frames, with all that they refer to
            model.generate(prompts, max_new_tokens=16, eos_token_id=end, pad_token_id=0, cache=cache, streamer=Fails())
        held = [row[:length].tolist() for row, length in zip(cache._ids, cache.lengths.tolist(), strict=True)]
        assert held[0] == prompts[0] + free[0, :3].tolist() and len(held[1]) in range(5 + 7, 5 + 7 + BEHIND + 1)
        assert held[1] == prompts[1] + free[1, : len(held[1]) - 5].tolist()
        turns = [row + [5, 3] for row in held]
        assert torch.equal(model.generate(turns, max_new_tokens=4, cache=cache, eos_token_id=[], pad_token_id=0),
                           model.generate(turns, max_new_tokens=4, eos_token_id=[], pad_token_id=0))  # fmt: skip


def test_a_cache_with_recorded_tokens_cannot_freeze_rows(model: Any) -> None:
    with pytest.raises(ValueError, match="record=2 cannot be frozen: pass an attention_mask"):
        model.new_cache(1, record=2).freeze(torch.zeros(1, dtype=torch.bool))
