"""generation/: the loop on a scripted model, and on the real one beside transformers."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from qwen35moe.generation import StopStrings, TextStream, generate, row_seed, stream, stream_text
from qwen35moe.generation.stop import Cut
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from qwen35moe.models.vision_inputs import VisualInputs
from qwen35moe.models.vision_language import Qwen3_5MoeForConditionalGeneration
from tests.models.test_model import small
from tests.support.fakes import FakeModel
from tests.support.peer import FULL, LINEAR, draw, odd_shape, ours, theirs
from tests.support.peer import padded as padded_rows

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
PAD = 40


def padded(side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, PROMPTS))
    ids, mask = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


class Letters:
    """A tokenizer whose tokens are bytes: id 0..255 is the byte."""

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def says(text: str) -> Any:
    """A script: after the prompt ">", the bytes of `text`."""
    data = text.encode()
    return lambda history: data[len(history) - 1] if len(history) <= len(data) else 0


# ------------------------------------------------------------------------------------------------------------- rows


def test_greedy_is_the_most_likely_token_given_everything_before() -> None:
    model = FakeModel()
    out = generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=9)
    assert out.dtype is torch.int64
    assert out.tolist() == [PROMPTS[0] + model.greedy(PROMPTS[0], 9)]
    assert [shape for shape, _ in model.calls] == [(1, 5)] + [(1, 1)] * 8  # the last token is never fed
    assert all(mask is None for _, mask in model.calls)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_answer_as_alone(side: str) -> None:
    model = FakeModel()
    ids, mask = padded(side)
    out = generate(model, ids, mask, max_new_tokens=6)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert out[:, ids.shape[1] :].tolist() == [model.greedy(prompt, 6) for prompt in PROMPTS]


def test_padding_may_stand_anywhere_and_hold_anything() -> None:
    model = FakeModel()
    ids = torch.tensor([[3, -100, 1, 4, 99999, 1, 5]])
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1]])
    out = generate(model, ids, mask, max_new_tokens=4)
    assert out[0, 7:].tolist() == model.greedy(PROMPTS[0], 4)
    assert out[0, :7].tolist() == ids[0].tolist()


def test_one_dimension_lists_and_lists_of_lists() -> None:
    model = FakeModel(generation_config={"pad_token_id": PAD})
    expected = generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=3)
    assert torch.equal(generate(model, PROMPTS[0], max_new_tokens=3), expected)
    assert torch.equal(generate(model, torch.tensor(PROMPTS[0], dtype=torch.int32), max_new_tokens=3), expected)
    assert torch.equal(generate(model, [PROMPTS[0]], max_new_tokens=3), expected)
    ids, mask = padded("left")
    assert torch.equal(generate(model, PROMPTS, max_new_tokens=3), generate(model, ids, mask, max_new_tokens=3))

    lists = [[1] * len(prompt) for prompt in PROMPTS]
    expected = generate(model, ids, mask, max_new_tokens=3)
    assert torch.equal(generate(model, PROMPTS, lists, max_new_tokens=3), expected)
    lists[2][0] = 0
    assert generate(model, PROMPTS, lists, max_new_tokens=3)[2, 7:].tolist() == model.greedy(PROMPTS[2][1:], 3)
    with pytest.raises(ValueError, match=r"rows of \[5, 2, 6\] values, input_ids of \[5, 2, 7\]"):
        generate(model, PROMPTS, [*lists[:2], lists[2][1:]], max_new_tokens=3)


def test_a_long_answer() -> None:
    model = FakeModel()
    out = generate(model, PROMPTS[0], max_new_tokens=200, presence_penalty=0.0, logits_processor=lambda ids, scores: scores)
    assert out[0, 5:].tolist() == model.greedy(PROMPTS[0], 200)


def test_lengths() -> None:
    model = FakeModel()
    assert generate(model, PROMPTS[0]).shape == (1, 5 + 20)
    assert generate(model, PROMPTS[0], max_length=8).shape == (1, 8)
    assert generate(model, PROMPTS[0], max_length=5).shape == (1, 5)
    model.calls.clear()
    assert torch.equal(generate(model, PROMPTS[0], max_new_tokens=0), torch.tensor([PROMPTS[0]]))
    assert not model.calls
    model.generation_config = {"max_new_tokens": 3, "max_length": 100}
    assert generate(model, PROMPTS[0]).shape == (1, 8)
    assert generate(model, PROMPTS[0], max_length=7).shape == (1, 7)  # the call beats the checkpoint


# ------------------------------------------------------------------------------------------------------- ends of rows


def test_rows_end_on_their_own_and_stay_ended() -> None:
    """Row 0 ends after 2 tokens with id 7, row 1 after 4 with id 8; row 2 runs on."""
    ends = {(3, 5 + 1): 7, (9, 2 + 3): 8}

    def script(history: list[int]) -> int:
        return ends.get((history[0], len(history)), 11)

    model = FakeModel(script=script)
    ids, mask = padded("left")
    cache = model.new_cache(3)
    out = generate(model, ids, mask, max_new_tokens=6, eos_token_id=[7, 8], pad_token_id=PAD, cache=cache)
    assert out[:, 7:].tolist() == [[11, 7, PAD, PAD, PAD, PAD], [11, 11, 11, 8, PAD, PAD], [11] * 6]
    # Ended rows are fed padding: the cache holds all but their last token.
    assert cache.rows == [PROMPTS[0] + [11], PROMPTS[1] + [11] * 3, PROMPTS[2] + [11] * 5]
    masked = [mask[:, -1].tolist() for _, mask in model.calls[1:] if mask is not None]
    assert masked == [[0, 1, 1]] * 2 + [[0, 0, 1]] * 2


def test_all_ended_stops_the_loop() -> None:
    model = FakeModel(script=lambda history: 7 if len(history) > 6 else 11)
    out = generate(model, [PROMPTS[0], PROMPTS[0]], max_new_tokens=50, eos_token_id=7)
    assert out[:, 5:].tolist() == [[11, 11, 7]] * 2


def test_end_tokens_come_from_the_checkpoint_and_can_be_switched_off() -> None:
    model = FakeModel(script=lambda history: 7, generation_config={"eos_token_id": [8, 7]})
    assert generate(model, PROMPTS[0], max_new_tokens=4).shape == (1, 6)
    assert generate(model, PROMPTS[0], max_new_tokens=4, eos_token_id=[]).shape == (1, 9)
    model.generation_config = {}
    model.config.text_config.eos_token_id = 7
    assert generate(model, PROMPTS[0], max_new_tokens=4).shape == (1, 6)
    assert generate(model, PROMPTS[0], max_new_tokens=4, eos_token_id=9).shape == (1, 9)


def test_stopping_criteria() -> None:
    model = FakeModel()
    seen: list[tuple[int, ...]] = []

    def second_row(ids: Tensor, scores: Any) -> Tensor:
        seen.append(tuple(ids.shape))
        return torch.tensor([False, ids.shape[1] >= 8])

    out = generate(model, PROMPTS[:1] * 2, max_new_tokens=6, pad_token_id=PAD, stopping_criteria=[second_row])
    expected = model.greedy(PROMPTS[0], 6)
    assert out[:, 5:].tolist() == [expected, expected[:3] + [PAD] * 3]
    assert seen == [(2, 6 + step) for step in range(6)]
    out = generate(model, PROMPTS[0], max_new_tokens=6, stopping_criteria=lambda ids, scores: ids.shape[1] == 7)
    assert out.shape == (1, 7)
    theirs = StoppingCriteriaList([MaxLengthCriteria(8)])
    assert generate(model, PROMPTS[0], max_new_tokens=6, stopping_criteria=theirs).shape == (1, 8)


# ---------------------------------------------------------------------------------------------------------- penalties


def test_repetition_penalty_counts_the_prompt_and_no_padding() -> None:
    model = FakeModel()
    ids, mask = padded("left")
    batch = generate(model, ids, mask, max_new_tokens=8, repetition_penalty=3.0)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, max_new_tokens=8, repetition_penalty=3.0)
        assert torch.equal(batch[row, 7:], alone[0, len(prompt) :])
    model.script = lambda history: 5
    assert 5 in generate(model, PROMPTS[0], max_new_tokens=1)[0, 5:].tolist()
    assert 5 not in generate(model, PROMPTS[0], max_new_tokens=1, repetition_penalty=100.0)[0, 5:].tolist()


def test_presence_penalty_counts_the_answer_only() -> None:
    model = FakeModel(script=lambda history: 5)
    out = generate(model, PROMPTS[0], max_new_tokens=3, presence_penalty=100.0)[0, 5:].tolist()
    assert out[0] == 5 and 5 not in out[1:]
    assert generate(model, PROMPTS[0], max_new_tokens=3, presence_penalty=-1.0)[0, 5:].tolist() == [5, 5, 5]


def test_processors_come_after_the_penalties_and_before_the_temperature() -> None:
    """As in transformers: what a processor sees is penalised, not yet divided by the temperature."""
    model = FakeModel()
    seen: list[Tensor] = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores.clone())
            assert input_ids.shape == (1, 5 + len(seen) - 1)
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([17]), 0.0)

    options: dict[str, Any] = dict(max_new_tokens=2, do_sample=True, temperature=0.5, repetition_penalty=2.0, seed=0)
    out = generate(model, PROMPTS[0], logits_processor=LogitsProcessorList([Keep()]), **options)
    assert out[0, 5:].tolist() == [17, 17]
    raw = model.logits(PROMPTS[0])
    tokens = sorted(set(PROMPTS[0]))
    expected = raw.clone()
    expected[tokens] = torch.where(raw[tokens] < 0, raw[tokens] * 2, raw[tokens] / 2)
    assert torch.equal(seen[0][0], expected)


def test_defaults_of_the_checkpoint_apply_where_they_should() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.95, "eos_token_id": [7]}
    model = FakeModel(generation_config=defaults)
    greedy = generate(model, PROMPTS[0], max_new_tokens=12)
    plain = FakeModel()
    assert torch.equal(greedy, generate(plain, PROMPTS[0], max_new_tokens=12, eos_token_id=[7]))
    # sampling with the checkpoint's top_k=1 is greedy; with the argument's top_k it is not
    assert torch.equal(generate(model, PROMPTS[0], max_new_tokens=12, do_sample=True, seed=1), greedy)
    assert not torch.equal(generate(model, PROMPTS[0], max_new_tokens=12, do_sample=True, top_k=30, seed=1), greedy)
    model.generation_config = {"repetition_penalty": 3.0}
    expected = generate(plain, PROMPTS[0], max_new_tokens=12, repetition_penalty=3.0)
    assert torch.equal(generate(model, PROMPTS[0], max_new_tokens=12), expected)


# ----------------------------------------------------------------------------------------------------------- sampling


def test_the_seed_alone_decides() -> None:
    model = FakeModel()
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, temperature=1.3)
    first = generate(model, PROMPTS[0], seed=5, **options)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(generate(model, PROMPTS[0], seed=5, **options), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(generate(model, PROMPTS[0], seed=6, **options), first)
    assert not torch.equal(generate(model, PROMPTS[0], **options), generate(model, PROMPTS[0], **options))
    unseeded = []
    for _ in range(2):
        torch.manual_seed(3)
        unseeded.append(generate(model, PROMPTS[0], **options))
    assert torch.equal(unseeded[0], unseeded[1])  # without a seed of its own it follows torch.manual_seed, as transformers does
    shorter = generate(model, PROMPTS[0], seed=5, do_sample=True, temperature=1.3, max_new_tokens=7)
    assert torch.equal(shorter, first[:, : 5 + 7])


def test_a_row_draws_what_it_draws_alone() -> None:
    model = FakeModel()
    ids, mask = padded("right")
    options: dict[str, Any] = dict(max_new_tokens=30, do_sample=True, top_p=0.9, presence_penalty=0.5)
    batch = generate(model, ids, mask, seed=11, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, seed=row_seed(11, row), **options)
        assert torch.equal(batch[row, 7:], alone[0, len(prompt) :])
    listed = generate(model, ids, mask, seed=[row_seed(11, row) for row in range(3)], **options)
    assert torch.equal(listed, batch)
    same = generate(model, [PROMPTS[0]] * 3, seed=11, **options)
    assert len({tuple(row) for row in same.tolist()}) == 3


def test_ended_neighbours_change_nothing() -> None:
    model = FakeModel()
    ends = list(range(0, 40, 6))
    options: dict[str, Any] = dict(max_new_tokens=40, do_sample=True, eos_token_id=ends, pad_token_id=PAD)
    batch = generate(model, PROMPTS, seed=3, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, seed=row_seed(3, row), **options)[0, len(prompt) :].tolist()
        actual = batch[row, 7:].tolist()
        assert actual[: len(alone)] == alone and set(actual[len(alone) :]) <= {PAD}


# ---------------------------------------------------------------------------------------------------------- streaming


def test_stream_yields_what_generate_returns() -> None:
    model = FakeModel(generation_config={"eos_token_id": [4, 12, 20, 33], "pad_token_id": PAD})
    options: dict[str, Any] = dict(max_new_tokens=25, do_sample=True, seed=2)
    steps = list(stream(model, PROMPTS, **options))
    assert all(step.shape == (3,) for step in steps)
    assert torch.equal(torch.stack(steps, 1), generate(model, PROMPTS, **options)[:, 7:])


def test_stream_checks_at_once_and_runs_when_asked() -> None:
    model = FakeModel()
    with pytest.raises(ValueError, match="top_p"):
        stream(model, PROMPTS[0], do_sample=True, top_p=2.0)
    steps = stream(model, PROMPTS[0], max_new_tokens=10)
    assert not model.calls
    next(steps)
    next(steps)
    assert len(model.calls) == 2
    assert torch.is_grad_enabled()  # no_grad does not leak to whoever consumes the iterator


def test_streamer_protocol() -> None:
    model = FakeModel()
    events: list[Any] = []

    class Streamer:
        def put(self, ids: Tensor) -> None:
            events.append(ids.tolist())

        def end(self) -> None:
            events.append("end")

    out = generate(model, PROMPTS[0], max_new_tokens=3, streamer=Streamer())
    assert events == [[PROMPTS[0]], *[[token] for token in out[0, 5:].tolist()], "end"]
    events.clear()

    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("processor")

    with pytest.raises(RuntimeError, match="processor"):
        generate(model, PROMPTS[0], streamer=Streamer(), logits_processor=[fails])
    assert events[-1] == "end"


def test_transformers_streamer_in_a_thread() -> None:
    model = FakeModel(256, script=says("naïve 🎉 text"))
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=300)  # type: ignore[arg-type]
    options: dict[str, Any] = dict(input_ids=[ord(">")], max_new_tokens=len("naïve 🎉 text".encode()), streamer=streamer)
    thread = threading.Thread(target=generate, args=(model,), kwargs=options)
    thread.start()
    assert "".join(streamer) == "naïve 🎉 text"
    thread.join()


# ---------------------------------------------------------------------------------------------------------- text, stops


def test_text_comes_in_whole_characters() -> None:
    text = TextStream(Letters())
    pieces = [text.put(byte) for byte in "aé日🎉.".encode()]
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "🎉", "."]
    assert text.put(0xF0) == text.put(0x9F) == "" and text.end() == "\N{REPLACEMENT CHARACTER}"
    assert text.end() == ""


@given(st.lists(st.integers(0, 255) | st.sampled_from(list("é🎉".encode())), max_size=80))
def test_the_pieces_are_the_whole(ids: list[int]) -> None:
    text = TextStream(Letters())
    pieces = [text.put(token) for token in ids]
    assert "".join(pieces) + text.end() == Letters().decode(ids)
    assert len(text._window) == 0


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    longest = 0

    class Counting(Letters):
        def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    for ids in (b"x" * 500, "é" * 250, b"\x80" * 500):  # the last is broken throughout
        text = TextStream(Counting())
        for token in ids.encode() if isinstance(ids, str) else ids:
            text.put(token)
    assert longest <= 17


@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_counts_from_its_last_byte(text: str, strings: list[str]) -> None:
    stops, data = StopStrings(strings, Letters(), 1), text.encode()
    for end in range(1, len(data) + 1):
        actual = stops.put(0, data[end - 1])
        whole = data[:end].decode("utf-8", errors="ignore")
        assert actual == any(string in whole for string in strings)
        if actual:
            return


@given(st.lists(st.text("ab", max_size=4), max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_cut_gives_the_text_before_the_first_stop_string(pieces: list[str], strings: list[str]) -> None:
    cut, text = Cut(strings), ""
    for piece in pieces:
        text += cut.put(piece)
        if cut.stopped:
            break
    text += cut.end()
    places = []
    for end in range(len("".join(pieces)) + 1):  # the match that is complete first, as it comes in
        places = [place for place in ("".join(pieces)[:end].find(string) for string in strings) if place >= 0]
        if places:
            break
    if cut.stopped:
        assert places and text <= "".join(pieces) and not any(string in text for string in strings)
        assert "".join(pieces).startswith(text)
    else:
        assert not places and text == "".join(pieces)


def test_stop_strings_end_a_row_across_token_borders() -> None:
    model = FakeModel(256, script=says("one two\n\nthree"))
    out = generate(model, [ord(">")], max_new_tokens=20, stop=["\n\n"], tokenizer=Letters())
    assert Letters().decode(out[0].tolist()) == ">one two\n\n"
    out = generate(model, [ord(">")], max_new_tokens=20, stop="two", tokenizer=Letters())
    assert Letters().decode(out[0].tolist()) == ">one two"
    # a stop string in the prompt does not count
    assert generate(model, [ord(">")], max_new_tokens=20, stop=">", tokenizer=Letters()).shape == (1, 21)


def test_stop_strings_end_rows_one_by_one() -> None:
    texts = {ord("a"): b"xyz....", ord("b"): b"...xyz."}
    model = FakeModel(256, script=lambda history: texts[history[0]][len(history) - 1])
    out = generate(model, [[ord("a")], [ord("b")]], max_new_tokens=7, stop=["xyz"], tokenizer=Letters(), pad_token_id=0)
    assert bytes(out[0].tolist()) == b"axyz\0\0\0" and bytes(out[1].tolist()) == b"b...xyz"


def test_stream_text() -> None:
    model = FakeModel(256, script=says("né <stop> more"))
    pieces = list(stream_text(model, Letters(), ">", max_new_tokens=14))
    assert "".join(pieces) == "né <stop> mor"
    assert "é" in pieces
    pieces = list(stream_text(model, Letters(), ">", max_new_tokens=14, stop=["<stop>"]))
    assert "".join(pieces) == "né "
    pieces = list(stream_text(model, Letters(), ">", max_new_tokens=8, stop=["<stop>"]))
    assert "".join(pieces) == "né <sto"  # held back until it was clear that nothing more comes
    pieces = list(stream_text(model, Letters(), ">", max_new_tokens=14, eos_token_id=ord("<")))
    assert "".join(pieces) == "né "


# -------------------------------------------------------------------------------------------------------------- cache


def test_a_conversation_goes_on_in_its_cache() -> None:
    model = FakeModel()
    cache = model.new_cache(1)
    first = generate(model, PROMPTS[0], max_new_tokens=4, cache=cache)
    assert cache.lengths.tolist() == [5 + 4 - 1]
    model.calls.clear()
    second = torch.cat([first, torch.tensor([[2, 7]])], 1)
    out = generate(model, second, max_new_tokens=4, cache=cache)
    # first the last token of its answer and the two new ones
    assert [shape for shape, _ in model.calls] == [(1, 3), (1, 1), (1, 1), (1, 1)]
    assert torch.equal(out, generate(model, second, max_new_tokens=4))


def test_rows_of_a_cache_may_have_different_lengths() -> None:
    model = FakeModel(generation_config={"pad_token_id": PAD})
    eos: dict[str, Any] = {"eos_token_id": list(range(0, 40, 5))}
    cache = model.new_cache(3)
    first = generate(model, PROMPTS, max_new_tokens=9, cache=cache, **eos)
    turns = []
    for row, prompt in enumerate(PROMPTS):
        answer = first[row, 7:].tolist()
        answer = answer[: answer.index(PAD)] if PAD in answer else answer
        turns.append(prompt + answer + [1, 2, 3][: row + 1])
    assert cache.lengths.tolist() == [len(turn) - 1 - (row + 1) for row, turn in enumerate(turns)]
    out = generate(model, turns, max_new_tokens=5, cache=cache, eos_token_id=[])
    width = max(map(len, turns))
    assert out[:, width:].tolist() == [model.greedy(turn, 5) for turn in turns]


def test_a_static_cache_is_filled_to_its_end() -> None:
    model = FakeModel()
    out = generate(model, PROMPTS[0], max_new_tokens=6, cache=model.new_cache(1, max_length=10))
    assert out.shape == (1, 11)


# ---------------------------------------------------------------------------------------------------------- signature


def test_generate_and_stream_take_the_same_arguments() -> None:
    """Described in both; `generate` takes a streamer too, and no keyword is swallowed."""
    arguments = [list(inspect.signature(function).parameters) for function in (generate, stream)]
    more = ["streamer", "return_dict_in_generate", "output_scores", "output_logits"]
    assert arguments[0] == [*arguments[1], *more] and arguments[1][:3] == ["model", "input_ids", "attention_mask"]
    for method, names in ((Qwen3_5MoeForCausalLM.generate, arguments[0]), (Qwen3_5MoeForCausalLM.stream, arguments[1])):
        assert list(inspect.signature(method).parameters) == ["self", *names[1:]]
        assert all(name in (method.__doc__ or "") for name in names[1:])
    visual = [field.name for field in dataclasses.fields(VisualInputs)]
    for method, names in ((Qwen3_5MoeForConditionalGeneration.generate, arguments[0]),
                          (Qwen3_5MoeForConditionalGeneration.stream, arguments[1])):  # fmt: skip
        assert list(inspect.signature(method).parameters) == ["self", *names[1:], *visual]
    for function, names in zip((generate, stream), arguments, strict=True):
        assert all(name in (function.__doc__ or "") for name in names[1:])
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
    model = FakeModel()
    with pytest.raises(TypeError, match=r"^generate\(\) has no keyword 'max_new_token': did you mean 'max_new_tokens'"):
        generate(model, PROMPTS[0], max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        generate(model, PROMPTS[0], input_ids=PROMPTS[0])
    with pytest.raises(TypeError, match="'streamer'"):
        stream(model, PROMPTS[0], streamer=object())  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------------------- errors

ONE = torch.tensor([PROMPTS[0]])
BAD: list[tuple[dict[str, Any], str]] = [
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), r"prompt is empty.*\(1, 0\)"),
    (dict(input_ids=torch.zeros(0, 3, dtype=torch.long)), r"prompt is empty.*\(0, 3\)"),
    (dict(input_ids=[]), "prompt is empty"),
    (dict(input_ids=[[1], []]), "row 1 is empty"),
    (dict(input_ids=[[1], [2, 3]]), "1 to 2 tokens need padding: pass pad_token_id"),
    (dict(input_ids=ONE.float()), "integers, got torch.float32"),
    (dict(input_ids=ONE.bool()), "integers, got torch.bool"),
    (dict(input_ids=[1.5, 2.0]), "whole numbers"),
    (dict(input_ids=["a"]), "list of token ids"),
    (dict(input_ids="text"), "encode it first"),
    (dict(input_ids={"ids": ONE}), "no keyword 'ids'"),
    (dict(input_ids={"attention_mask": ONE}), "a mapping without input_ids: it has attention_mask"),
    (dict(input_ids={"input_ids": ONE, "attention_mask": ONE}, attention_mask=ONE), "attention_mask is in the first"),
    (dict(input_ids=None), "no prompt: give input_ids"),
    (dict(input_ids=7), "got int"),
    (dict(input_ids=ONE[None]), r"\[rows, tokens\] or \[tokens\], got \(1, 1, 5\)"),
    (dict(input_ids=torch.tensor([[1, 41]])), r"token id 41 is outside the vocabulary.*0\.\.40"),
    (dict(input_ids=torch.tensor([[1, -2]])), "token id -2 is outside"),
    (dict(attention_mask=torch.ones(1, 4)), r"\(1, 4\), input_ids \(1, 5\)"),
    (dict(attention_mask=torch.zeros(1, 5)), "row 0 of attention_mask is all padding"),
    (dict(attention_mask=torch.full((1, 5), 2)), "1 for a token and 0 for padding"),
    (dict(attention_mask=torch.ones(1, 1, 5, 5)), r"\(1, 1, 5, 5\)"),
    (dict(max_new_tokens=-1), "max_new_tokens must be at least 0, got -1"),
    (dict(max_new_tokens=2.5), "whole number, got 2.5"),
    (dict(max_new_tokens=2, max_length=9), "max_new_tokens=2 and max_length=9"),
    (dict(max_length=4), "max_length=4 is less than the prompt's 5"),
    (dict(do_sample=True, temperature=0.0), "temperature must be greater than 0 and finite, got 0.0.*do_sample=False"),
    (dict(do_sample=True, temperature=float("nan")), "finite number, got nan"),
    (dict(temperature=-1.0), "got -1.0"),
    (dict(temperature=0.7), "temperature=0.7: has an effect only when sampling"),
    (dict(top_k=5, top_p=0.5), "top_k=5, top_p=0.5: has an effect only"),
    (dict(do_sample=True, top_k=-1), "top_k must be at least 1 and a whole number, got -1"),
    (dict(do_sample=True, top_k=1.5), "got 1.5"),
    (dict(do_sample=True, top_p=0.0), r"top_p must lie in \(0, 1\].*got 0.0"),
    (dict(do_sample=True, top_p=1.1), "got 1.1"),
    (dict(do_sample=True, min_p=1.1), "min_p must lie in"),
    (dict(do_sample="yes"), "do_sample must be True or False"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be greater than 0"),
    (dict(presence_penalty="a"), "presence_penalty must be a finite number"),
    (dict(eos_token_id="x"), "eos_token_id must be a token id or several"),
    (dict(pad_token_id=[1, 2]), "pad_token_id must be one token id"),
    (dict(seed=1.5, do_sample=True), "seed must be a whole number"),
    (dict(seed=7), "seed=7: has an effect only when sampling; pass do_sample=True"),
    (dict(seed=2**64, do_sample=True), "at most 64 bits, got 18446744073709551616"),
    (dict(seed=[1, -(2**63) - 1], do_sample=True), "at most 64 bits"),
    (dict(n=0, do_sample=True), "n must be at least 1, got 0"),
    (dict(n=2), "n=2: greedy decoding gives 2 times the same answer; pass do_sample=True"),
    (dict(min_new_tokens=9, max_new_tokens=3), "min_new_tokens=9 is more than the 3 tokens"),
    (dict(min_length=9, max_length=8), "min_length=9 is more than the 8 tokens"),
    (dict(min_new_tokens=1.5), "min_new_tokens must be a whole number, got 1.5"),
    (dict(suppress_tokens=[41]), r"suppress_tokens has token 41, the vocabulary has 0\.\.40"),
    (dict(begin_suppress_tokens=[-1]), "begin_suppress_tokens has token -1"),
    (dict(bad_words_ids=[[1, 99]]), "bad_words_ids has token 99"),
    (dict(bad_words_ids=[1, 2]), "bad_words_ids must be a list of lists"),
    (dict(bad_words_ids=[[]]), "bad_words_ids has an empty sequence"),
    (dict(eos_token_id=-1), r"eos_token_id -1 is outside the vocabulary 0\.\.40: no row can end with it; \[\] switches"),
    (dict(eos_token_id=[3, 41]), "eos_token_id 41 is outside"),
    (dict(pad_token_id=2**63), "pad_token_id must hold 64-bit token ids"),
    (dict(output_scores=True), "output_scores=True has an effect only with return_dict_in_generate=True"),
    (dict(return_dict_in_generate=1), "return_dict_in_generate must be True or False, got 1"),
    (dict(cache="dynamic"), "cache='dynamic': pass 'static'"),
    (dict(cache=()), "cache is a tuple: pass a cache made with"),
    (dict(stop=3, tokenizer=Letters()), "stop must be one or more non-empty strings, got 3"),
    (dict(attention_mask="ones"), "attention_mask must be a tensor of ones and zeros, got 'ones'"),
    (dict(generation_config="sampling"), "transformers' or a dict, got str"),
    (dict(generation_config={"top_p": 0.5}), "generation_config has top_p=0.5, which has an effect only when sampling"),
    (dict(generation_config={"num_beams": 3}), r"generation_config asks for num_beams=3.*leave it out"),
    (dict(seed=[1, 2], do_sample=True), "seed has 2 numbers for 1 rows"),
    (dict(stop=["x"]), "pass tokenizer="),
    (dict(stop=[""], tokenizer=Letters()), "non-empty strings"),
    (dict(logits_processor=[3]), "logits_processor must hold functions.*int"),
    (dict(speculative=3), "multi-token-prediction head"),
    (dict(input_ids=[PROMPTS[0]] * 2, stopping_criteria=[bool]), "pass pad_token_id"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[words[:30] for _, words in BAD])
def test_bad_input_is_refused_before_anything_runs(arguments: dict[str, Any], words: str) -> None:
    model = FakeModel()
    arguments = {"input_ids": ONE} | arguments
    with pytest.raises((ValueError, TypeError), match=words) as error:
        generate(model, **arguments)
    assert not model.calls and len(str(error.value)) < 500
    assert isinstance(error.value, ValueError) or "no keyword" in words


def test_a_cache_that_does_not_fit_is_refused_before_anything_runs() -> None:
    model = FakeModel()
    too_short = {4: "prompt of 5 tokens is longer than.*max_length=4", 9: "5 tokens and 6 new.*max_length=9"}
    for max_length, words in too_short.items():
        with pytest.raises(ValueError, match=words):
            generate(model, ONE, max_new_tokens=6, cache=model.new_cache(1, max_length=max_length))
    with pytest.raises(ValueError, match="cache is for 2 rows, the prompt has 1"):
        generate(model, ONE, cache=model.new_cache(2))
    assert not model.calls
    cache = model.new_cache(1)
    generate(model, ONE, max_new_tokens=4, cache=cache)
    for ids in (ONE, torch.ones(1, 8, dtype=torch.long)):
        with pytest.raises(ValueError, match=f"cache already holds 8 tokens and input_ids has {ids.shape[1]}"):
            generate(model, ids, cache=cache)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "top_k": 5}, {"eos_token_id": 3}])
def test_logits_without_a_choice_are_an_error(options: dict[str, Any]) -> None:
    model = FakeModel()
    plain = model.logits
    model.logits = lambda history: plain(history) * (float("nan") if len(history) > 8 else 1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"rows \[0\].*NaN"):
        generate(model, ONE, max_new_tokens=9, **options)
    nothing = [lambda ids, scores: torch.full_like(scores, -torch.inf)]
    with pytest.raises(ValueError, match="nothing but -inf"):
        generate(FakeModel(), ONE, logits_processor=nothing, **options)


def test_a_generation_config_that_asks_for_more_is_not_ignored() -> None:
    model = FakeModel(generation_config={"num_beams": 4, "transformers_version": "5.0", "use_cache": True})
    with pytest.raises(ValueError, match="num_beams=4.*generation_config.pop"):
        generate(model, ONE)
    model.generation_config = {"num_beams": 1, "typical_p": 1.0, "bos_token_id": 3, "min_length": 0}
    generate(model, ONE, max_new_tokens=1)


# ------------------------------------------------------------------------------------------- the real model, and
# transformers

CASES = [
    odd_shape(3, vocab_size=53),
    odd_shape(11, tie_word_embeddings=True),
    odd_shape(4, dense=True),
    odd_shape(7, layer_types=[LINEAR, LINEAR, LINEAR, FULL], num_hidden_layers=4),
]


@pytest.fixture(scope="module", params=range(len(CASES)), ids=lambda number: f"case{number}")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    case = CASES[request.param]
    peer = theirs(case)
    draw(peer, 100 + request.param)
    return case, ours(case, source=peer), peer


def rows_of(case: Any) -> list[Tensor]:
    return [case.ids(1, length, salt=length)[0] for length in (9, 4, 14)]


def their_answer(peer: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return peer.generate(input_ids=ids, attention_mask=mask, do_sample=False, use_cache=True, **options)


def test_greedy_tokens_are_transformers_over_64_tokens(pair: tuple[Any, Any, Any]) -> None:
    case, model, peer = pair
    ids, mask = padded_rows(rows_of(case), "left")
    expected = their_answer(peer, ids, mask, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    actual = model.generate(ids, mask, max_new_tokens=64, eos_token_id=[])
    assert actual.shape == (3, 14 + 64)
    assert torch.equal(actual, expected)
    right = model.generate(*padded_rows(rows_of(case), "right"), max_new_tokens=64, eos_token_id=[])
    assert torch.equal(right[:, 14:], expected[:, 14:])


def test_ends_are_transformers(pair: tuple[Any, Any, Any]) -> None:
    case, model, peer = pair
    ids, mask = padded_rows(rows_of(case), "left")
    free = model.generate(ids, mask, max_new_tokens=24, eos_token_id=[])[:, 14:]
    ends = [int(free[0, 7]), int(free[1, 18])]
    options: dict[str, Any] = dict(max_new_tokens=24, eos_token_id=ends, pad_token_id=2)
    actual = model.generate(ids, mask, **options)
    assert actual.shape[1] < free.shape[1] + 14 or (actual[:, -1] == 2).any()  # some row has ended early
    assert torch.equal(actual, their_answer(peer, ids, mask, **options))


def test_repetition_penalty_is_transformers(pair: tuple[Any, Any, Any]) -> None:
    """Without padding: transformers counts the padding token as seen."""
    case, model, peer = pair
    ids = case.ids(3, 8)
    options: dict[str, Any] = dict(max_new_tokens=24, repetition_penalty=1.4)
    expected = their_answer(peer, ids, torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options)
    assert torch.equal(model.generate(ids, eos_token_id=[], **options), expected)


def test_sampled_rows_are_as_alone_on_the_real_model(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair
    rows = rows_of(case)
    ends = [1, 2, 3]
    options: dict[str, Any] = dict(max_new_tokens=24, do_sample=True, temperature=1.2, top_p=0.95, eos_token_id=ends)
    batch = model.generate([row.tolist() for row in rows], seed=9, pad_token_id=0, **options)[:, 14:]
    for number, row in enumerate(rows):
        alone = model.generate(row, seed=row_seed(9, number), **options)[0, len(row) :]
        assert torch.equal(batch[number, : len(alone)], alone)


@pytest.mark.parametrize("max_length", [None, 60])
def test_a_conversation_on_the_real_model(pair: tuple[Any, Any, Any], max_length: int | None) -> None:
    """Three turns of ragged rows in one cache, against each row's turn from nothing."""
    case, model, _ = pair
    turns = [row.tolist() for row in rows_of(case)]
    cache = model.new_cache(3, max_length=max_length)
    for number in range(3):
        width = max(map(len, turns))
        ends = [5, 6, 7, 8]
        out = model.generate(turns, max_new_tokens=10, cache=cache, eos_token_id=ends, pad_token_id=0)[:, width:]
        for row, turn in enumerate(turns):
            answer = model.generate(turn, max_new_tokens=10, eos_token_id=ends)[0, len(turn) :].tolist()
            assert out[row, : len(answer)].tolist() == answer
            turns[row] = turn + answer + case.ids(1, 2 + row, salt=number)[0].tolist()
            assert int(cache.lengths[row]) == len(turn) + len(answer) - 1
    with pytest.raises(ValueError, match="cache already holds"):
        model.generate([[1], [2], [3]], cache=cache)


def test_stream_on_the_real_model(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair
    ids = case.ids(2, 6)
    steps = list(model.stream(ids, max_new_tokens=5, eos_token_id=[]))
    assert torch.equal(torch.stack(steps, 1), model.generate(ids, max_new_tokens=5, eos_token_id=[])[:, 6:])


def test_too_long_for_a_static_cache_leaves_it_empty(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair
    cache = model.new_cache(1, max_length=7)
    with pytest.raises(ValueError, match="prompt of 8 tokens is longer than the cache's max_length=7"):
        model.generate(case.ids(1, 8), max_new_tokens=1, cache=cache)
    assert cache.lengths.tolist() == [0]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.generate(torch.tensor([[case.text["vocab_size"]]]))


def test_a_float64_model_generates_too(pair: tuple[Any, Any, Any]) -> None:
    case, model, peer = pair
    double = ours(case, dtype=torch.float64, source=peer)
    ids = case.ids(2, 6)
    assert torch.equal(double.generate(ids, max_new_tokens=16, eos_token_id=[]),
                       model.generate(ids, max_new_tokens=16, eos_token_id=[]))  # fmt: skip


AMBIENT: dict[str, dict[str, Any]] = {
    "greedy": {}, "sampled": {"do_sample": True, "seed": 3},
    "several": {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    "a criterion": {"stopping_criteria": [lambda ids, scores: [True, False]]},
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIENT)
def test_the_default_device_changes_no_token(name: str) -> None:
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": []} | AMBIENT[name]
    prompts: list[Any] = [[[3, 1, 4], [1, 5]], torch.tensor([[3, 1, 4], [1, 5, 9]])]
    model = Qwen3_5MoeForCausalLM(small()).init_weights(seed=0).eval()
    expected = [generate(model, prompt, **options) for prompt in prompts]
    with torch.device("meta"):
        actual = [generate(model, prompt, **options) for prompt in prompts]
    assert all(a.device.type == "cpu" and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
