"""transformers' keywords of generate(): translated, without effect, or refused with the way out; and what they compute."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig as TheirGenerationConfig

from qwen35moe.compat import TABLE
from qwen35moe.config import GenerationConfig
from qwen35moe.generation import GenerateOutput, generate, row_seed, stream
from tests.support.fakes import FakeModel
from tests.support.peer import draw, odd_shape, ours, theirs

GENERATE = TABLE["generate"]
PROMPT = [3, 1, 4, 1, 5]
PAD = 40
WORDS = dict(max_new_tokens=6, eos_token_id=[])


def answer(**options: Any) -> list[int]:
    return generate(FakeModel(), PROMPT, **(WORDS | options))[0, 5:].tolist()


# ------------------------------------------------------------------------------------------------------ the table


def test_neutral_keywords_change_nothing() -> None:
    neutral: dict[str, Any] = {"token_type_ids": torch.zeros(1, 5), "mm_token_type_ids": torch.zeros(1, 5)}
    neutral |= {"bos_token_id": 3, "transformers_version": "5.0"}
    for keyword in GENERATE:
        values = keyword.neutral if isinstance(keyword.neutral, tuple) else (neutral[keyword.name],)
        for value in (None, *values):
            assert answer(**{keyword.name: value}) == answer(), (keyword.name, value)


REFUSED: dict[str, Any] = {
    "num_beams": 4, "num_beam_groups": 2, "length_penalty": 2.0, "diversity_penalty": 0.5, "constraints": [1],
    "force_words_ids": [[1]], "synced_gpus": True, "logits_to_keep": 3, "no_repeat_ngram_size": 2, "frequency_penalty": 0.5,
    "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "typical_p": 0.5, "top_h": 0.5, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "sequence_bias": {(1,): 2.0}, "prefix_allowed_tokens_fn": print, "forced_bos_token_id": 1,
    "forced_eos_token_id": 1, "exponential_decay_length_penalty": (1, 1.1), "remove_invalid_values": True,
    "renormalize_logits": True, "watermarking_config": {}, "max_time": 1.0, "guidance_scale": 2.0,
    "negative_prompt_ids": [1], "negative_prompt_attention_mask": [1], "assistant_model": FakeModel(), "assistant_tokenizer": 1,
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 2, "use_mtp": True, "penalty_alpha": 0.6, "dola_layers": "high",
    "token_healing": True, "output_attentions": True, "output_hidden_states": True, "output_router_logits": True,
    "inputs_embeds": torch.zeros(1, 5, 8), "position_ids": torch.zeros(1, 5), "cache_position": torch.zeros(5),
    "prefill_chunk_size": 8, "max_cache_len": 8, "cache_config": {"a": 1}, "compile_config": {"a": 1}, "custom_generate": "x",
    "pixel_values": torch.zeros(4, 8), "pixel_values_videos": torch.zeros(4, 8), "image_grid_thw": torch.ones(1, 3),
    "video_grid_thw": torch.ones(1, 3), "mm_token_type_ids": torch.ones(1, 5), "token_type_ids": torch.ones(1, 5),
    "cache_implementation": "quantized",
}  # fmt: skip


def test_other_values_name_the_way_out() -> None:
    model = FakeModel()
    for keyword in GENERATE:
        if keyword.name not in REFUSED:
            continue
        with pytest.raises(ValueError, match=keyword.name) as error:
            generate(model, PROMPT, **{keyword.name: REFUSED[keyword.name]})
        assert keyword.instead in str(error.value) and len(str(error.value)) < 500
    accepted = {keyword.name for keyword in GENERATE} - set(REFUSED)
    assert accepted == {"inputs", "past_key_values", "num_return_sequences", "stop_strings", "use_cache", "early_stopping",
                        "return_dict", "disable_compile", "low_memory", "bos_token_id", "transformers_version"}  # fmt: skip
    assert not model.calls


def test_the_processors_that_messages_name_exist() -> None:
    for keyword in GENERATE:
        if "transformers." in keyword.instead:
            assert hasattr(transformers, keyword.instead.partition("transformers.")[2].partition("(")[0]), keyword.name
    repeats = FakeModel(script=lambda history: 7)
    processor = [transformers.NoRepeatNGramLogitsProcessor(2)]
    pairs = generate(repeats, PROMPT, logits_processor=processor, **WORDS)[0].unfold(0, 2, 1)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)


def test_every_keyword_of_transformers_is_known() -> None:
    """No setting of its GenerationConfig is an unknown keyword here, apart from those of assisted decoding's own."""
    own = {*GenerationConfig().to_dict()} & {name for name in TheirGenerationConfig().to_dict() if not name.startswith("_")}
    inner = {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
             "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
             "speculation_type", "continuous_batching_config", "decoder_start_token_id"}  # fmt: skip
    for name in own - inner:
        generate(FakeModel(), PROMPT, max_new_tokens=1, **({} if name == "max_new_tokens" else {name: None}))


def test_translated_keywords() -> None:
    ids = torch.tensor([PROMPT])
    assert generate(FakeModel(), inputs=ids, **WORDS)[0, 5:].tolist() == answer()
    model = FakeModel()
    cache = model.new_cache(1)
    generate(model, ids, past_key_values=cache, use_cache=True, **WORDS)
    assert len(cache.rows[0]) == 5 + 5
    sampled = generate(model, ids, num_return_sequences=3, do_sample=True, seed=4, **WORDS)
    assert torch.equal(sampled, generate(model, ids, n=3, do_sample=True, seed=4, **WORDS))
    with pytest.raises(ValueError, match="num_return_sequences=2 and n=3, which mean the same: give n"):
        generate(model, ids, num_return_sequences=2, n=3, do_sample=True)
    with pytest.raises(ValueError, match="inputs=.* and input_ids=.* mean the same"):
        generate(model, inputs=ids, input_ids=ids + 1)
    assert answer(cache_implementation="dynamic") == answer(cache_implementation="static") == answer()
    for new, room in ((6, 10), (1, 5), (0, 5)):  # the last token is not stored
        out = generate(FakeModel(), ids, cache="static", max_new_tokens=new, eos_token_id=[], return_dict_in_generate=True)
        assert out.past_key_values.max_length == room and out.sequences.shape == (1, 5 + new)
    for arguments in ({"disable_compile": True}, {"disable_compile": False}, {"generation_config": {"disable_compile": True}}):
        assert answer(**arguments) == answer()
    with pytest.raises(ValueError, match="disable_compile=True and capture=True, which mean"):
        generate(model, ids, disable_compile=True, capture=True)
    for arguments in ({"disable_compile": 1}, {"capture": "auto"}):
        with pytest.raises(ValueError, match="must be True or False"):
            generate(model, ids, **arguments)
    with pytest.raises(ValueError, match="stop=.*pass tokenizer="):
        generate(model, ids, stop_strings=["x"])


def test_all_that_a_tokenizer_returns_may_be_the_first_argument() -> None:
    ids = torch.tensor([[PAD, *PROMPT], [9, 2, 6, 5, 3, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0] + [1] * 5, [1] * 6]), "token_type_ids": torch.zeros(2, 6)}
    expected = generate(FakeModel(), **inputs, **WORDS)
    for first in (inputs, UserDict(inputs), transformers.BatchEncoding(inputs)):
        assert torch.equal(generate(FakeModel(), first, **WORDS), expected)
        assert torch.equal(torch.stack(list(stream(FakeModel(), first, **WORDS)), 1), expected[:, 6:])
    assert expected[0, 6:].tolist() == answer()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_ids_and_masks_of_any_integers(dtype: str) -> None:
    """As numpy, Arrow and memory-mapped corpora give them."""
    ids, mask = numpy.array([[0, *PROMPT], [9, 2, 6, 5, 3, 5]]), numpy.array([[0] + [1] * 5, [1] * 6])
    expected = generate(FakeModel(), torch.tensor(ids), torch.tensor(mask), **WORDS)
    kinds = (ids.astype(dtype), torch.tensor(ids).to(getattr(torch, dtype)))
    masks = (mask.astype(dtype), torch.tensor(mask).to(getattr(torch, dtype)), mask.astype(bool), mask.astype("float32"))
    for kind in kinds:
        for one in masks:
            assert torch.equal(generate(FakeModel(), kind, one, **WORDS), expected)
    for wrong in (ids.astype(float), numpy.array(["a"]), numpy.array([None])):
        with pytest.raises(ValueError, match="input_ids must"):
            generate(FakeModel(), wrong, **WORDS)


# ---------------------------------------------------------------------------------------------- generation_config


@pytest.mark.parametrize("kind", [dict, GenerationConfig, TheirGenerationConfig])
def test_generation_config_comes_between_the_arguments_and_the_checkpoint(kind: Any) -> None:
    model = FakeModel(generation_config={"max_new_tokens": 9, "repetition_penalty": 3.0, "eos_token_id": [], "do_sample": True})
    override = kind(max_new_tokens=4)
    assert generate(model, PROMPT, generation_config=override)[0, 5:].tolist() == answer(repetition_penalty=3.0)[:4]
    assert generate(model, PROMPT, generation_config=override, max_new_tokens=2).shape == (1, 7)
    assert generate(model, PROMPT, generation_config=kind(max_length=8)).shape == (1, 8)
    sampled = generate(model, PROMPT, generation_config=kind(do_sample=True, top_k=3, max_new_tokens=6), seed=3)
    assert sampled[0, 5:].tolist() == answer(do_sample=True, top_k=3, seed=3, repetition_penalty=3.0)
    if kind is not dict:  # its place in transformers
        assert generate(model, PROMPT, override).shape == (1, 9)
        with pytest.raises(ValueError, match="the second argument and given by name"):
            generate(model, PROMPT, override, generation_config=override)
    greedy = generate(model, PROMPT, generation_config=kind(do_sample=True, top_k=3), do_sample=False)
    assert greedy[0, 5:].tolist()[:6] == answer(repetition_penalty=3.0)
    ended = generate(model, PROMPT, generation_config=kind(eos_token_id=list(range(41)), pad_token_id=2))
    assert ended.shape == (1, 6)
    several = generate(model, [PROMPT, PROMPT], generation_config=kind(num_return_sequences=2, do_sample=True, pad_token_id=1))
    assert several.shape[0] == 4
    result = generate(model, PROMPT, generation_config=kind(return_dict_in_generate=True, output_scores=True))
    assert len(result.scores) == 9 and result.logits is None


def test_a_setting_of_the_checkpoint_that_the_call_replaces_is_not_refused() -> None:
    model = FakeModel(generation_config={"num_beams": 4, "typical_p": 0.5})
    with pytest.raises(ValueError, match="asks for num_beams=4"):
        generate(model, PROMPT)
    with pytest.raises(ValueError, match="asks for typical_p=0.5"):
        generate(model, PROMPT, generation_config={"num_beams": 1})
    stored = {"num_beams": 1, "typical_p": 1.0}
    assert generate(model, PROMPT, generation_config=stored, **WORDS)[0, 5:].tolist() == answer()


def test_a_misspelt_setting_of_a_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="generation_config.* has no keyword 'temprature': did you mean 'temperature'"):
        answer(generation_config={"temprature": 0.5})
    assert answer(generation_config=GenerationConfig({"chat_format": "chatml"})) == answer()  # a file's own key


# ------------------------------------------------------------------------------------------------- several answers


def test_n_answers_of_a_prompt_that_is_computed_once() -> None:
    model = FakeModel()
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=True, eos_token_id=[0, 9, 17], pad_token_id=PAD)
    prompts = [PROMPT, [9, 2]]
    out = generate(model, prompts, n=3, seed=8, **options)
    assert [shape for shape, _ in model.calls][:2] == [(2, 5), (6, 1)]
    assert out.shape[0] == 6 and out[:, :5].tolist() == [PROMPT] * 3 + [[PAD] * 3 + [9, 2]] * 3
    for row in range(6):
        alone = generate(model, prompts[row // 3], seed=row_seed(8, row), **options)[0]
        alone = alone[len(prompts[row // 3]) :].tolist()
        assert out[row, 5:].tolist()[: len(alone)] == alone and set(out[row, 5 + len(alone) :].tolist()) <= {PAD}
    assert len({tuple(row) for row in out[:3].tolist()}) > 1
    seeds = [row_seed(8, row) for row in range(6)]
    assert torch.equal(generate(model, prompts, n=3, seed=seeds, **options), out)
    for cache in (model.new_cache(2), model.new_cache(6), model.new_cache(6, max_length=9), "static"):
        assert torch.equal(generate(model, prompts, n=3, seed=8, cache=cache, **options), out)
    steps = torch.stack(list(stream(model, prompts, n=3, seed=8, **options)), 1)
    assert torch.equal(steps, out[:, 5:])
    with pytest.raises(ValueError, match="cache is for 4 rows, the prompt has 2, or 6 with n=3"):
        generate(model, prompts, n=3, cache=model.new_cache(4), **options)
    with pytest.raises(ValueError, match=r"fixed length keeps its 2 rows; make one with new_cache\(6"):
        generate(model, prompts, n=3, cache=model.new_cache(2, max_length=99), **options)


# -------------------------------------------------------------------------------------------------- tokens not chosen


def test_tokens_that_may_not_be_chosen() -> None:
    model = FakeModel(script=lambda history: 7)
    assert generate(model, PROMPT, suppress_tokens=[7], **WORDS)[0, 5:].eq(7).sum() == 0
    first = generate(model, PROMPT, begin_suppress_tokens=torch.tensor([7]), **WORDS)[0, 5:].tolist()
    assert first[0] != 7 and first[1:] == [7] * 5
    words = generate(model, PROMPT, bad_words_ids=[[7, 7, 7]], **WORDS)[0, 5:].tolist()
    assert words[:2] == [7, 7] and words[2] != 7 and words[3:5] == [7, 7] and words[5] != 7
    # the beginning of a word may stand in the prompt, whose padding is no part of it
    for mask, expected in (([1, 1, 1], False), ([1, 1, 0], False), ([1, 0, 1], False), ([0, 1, 1], True)):
        out = generate(model, [[2, 5, 5]], [mask], bad_words_ids=[[2, 5, 7], [5, 2, 7]], max_new_tokens=1, eos_token_id=[])
        assert (int(out[0, -1]) == 7) is (expected or mask == [1, 1, 1])
    assert generate(model, [[0, 0, 0]], [[0, 0, 1]], bad_words_ids=[[0, 0, 7]], max_new_tokens=1, eos_token_id=[])[0, -1] == 7


def test_no_end_before_the_least_length() -> None:
    model = FakeModel(script=lambda history: 7)
    assert generate(model, PROMPT, max_new_tokens=9, eos_token_id=7).shape == (1, 6)
    out = generate(model, PROMPT, max_new_tokens=9, eos_token_id=7, min_new_tokens=3)
    assert out.shape == (1, 9) and out[0, 5:8].eq(7).sum() == 0 and out[0, 8] == 7
    assert torch.equal(generate(model, PROMPT, max_new_tokens=9, eos_token_id=7, min_length=8), out)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=9, eos_token_id=7, min_length=2, min_new_tokens=3), out)
    # an end token is not a bad word, as in transformers
    assert generate(model, PROMPT, max_new_tokens=9, eos_token_id=7, bad_words_ids=[[7]]).shape == (1, 6)


# -------------------------------------------------------------------------------------- the real model, and transformers


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    case = odd_shape(3, vocab_size=53)
    peer = theirs(case)
    draw(peer, 7)
    return case, ours(case, source=peer), peer


def test_masked_tokens_are_transformers(pair: tuple[Any, Any, Any]) -> None:
    case, model, peer = pair
    ids = case.ids(3, 8)
    greedy = model.generate(ids, max_new_tokens=12, eos_token_id=[])[:, 8:]
    options: dict[str, Any] = dict(
        max_new_tokens=12, eos_token_id=[int(greedy[0, 2]), int(greedy[1, 4])], pad_token_id=2, min_new_tokens=6, min_length=9,
        suppress_tokens=[int(greedy[2, 1])], begin_suppress_tokens=[int(greedy[1, 0])],
        bad_words_ids=[greedy[0, :2].tolist(), [int(greedy[2, 5])], ids[1, -2:].tolist() + [int(greedy[1, 0])]],
    )  # fmt: skip
    expected = peer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(expected[:, 8 : 8 + greedy.shape[1]], greedy[:, : expected.shape[1] - 8])


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_output_object_is_transformers(pair: tuple[Any, Any, Any], do_sample: bool) -> None:
    """Scores are those from which the token was chosen, logits those of the model; both a tuple with one entry per step."""
    case, model, peer = pair
    ids = case.ids(2, 6)
    options: dict[str, Any] = dict(max_new_tokens=1 if do_sample else 4, repetition_penalty=1.3, do_sample=do_sample)
    options |= dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    options |= dict(temperature=0.7, top_k=9, top_p=0.8) if do_sample else {}
    actual: GenerateOutput = model.generate(ids, eos_token_id=[], **options)
    expected = peer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options)
    names = ["past_key_values" if name == "cache" else name for name in expected]  # `cache` since transformers 5.24
    assert list(actual) == names == ["sequences", "scores", "logits", "past_key_values"]
    assert actual.cache is actual.past_key_values
    assert actual[0] is actual.sequences is actual["sequences"] and actual.attentions is actual.hidden_states is None
    if not do_sample:
        assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert isinstance(actual[name], tuple) and len(actual[name]) == len(expected[name])
        for step, other in zip(actual[name], expected[name], strict=True):
            assert torch.equal(step.isneginf(), other.isneginf())
            torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-5)
    assert actual.past_key_values.lengths.tolist() == [6 + options["max_new_tokens"] - 1] * 2
    assert "sequences=[2, " in repr(actual) and len(repr(actual)) < 400
    leaves = torch.utils._pytree.tree_map(lambda leaf: leaf, actual)
    assert type(leaves) is GenerateOutput and torch.equal(leaves.logits[0], actual.logits[0])
    for normalize in (False, True):
        ours_table = model.compute_transition_scores(actual.sequences, actual.scores, normalize_logits=normalize)
        table = peer.compute_transition_scores(actual.sequences, actual.scores, normalize_logits=normalize)
        torch.testing.assert_close(ours_table, table, rtol=1e-5, atol=1e-6)
        assert table.shape == (2, options["max_new_tokens"])
    padded = torch.cat([actual.sequences[:, :-1], torch.full((2, 1), -100)], 1)
    assert bool(model.compute_transition_scores(padded, actual.scores)[:, -1].isneginf().all())
    with pytest.raises(ValueError, match="no beam search"):
        model.compute_transition_scores(actual.sequences, actual.scores, torch.zeros(2, 4))
    with pytest.raises(AttributeError, match="no 'sequence': it has sequences"):
        _ = actual.sequence


def test_logits_of_the_output_are_not_what_a_processor_wrote(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair

    def writes(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.fill_(1.0)

    options: dict[str, Any] = dict(max_new_tokens=2, eos_token_id=[], return_dict_in_generate=True, output_logits=True)
    out = model.generate(case.ids(1, 6), logits_processor=writes, output_scores=True, **options)
    plain = model.generate(case.ids(1, 6), **options)
    assert torch.equal(out.logits[0], plain.logits[0]) and bool((out.scores[0] == 1).all())


def test_several_answers_on_the_real_model(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair
    prompts = [case.ids(1, length, salt=length)[0] for length in (7, 4)]
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=True, eos_token_id=[1, 2], pad_token_id=0)
    cache = model.new_cache(2)
    out = model.generate([prompt.tolist() for prompt in prompts], n=2, seed=5, cache=cache, **options)
    assert cache.batch_size == 4
    for row in range(4):
        alone = model.generate(prompts[row // 2], seed=row_seed(5, row), **options)[0, len(prompts[row // 2]) :]
        assert torch.equal(out[row, 7 : 7 + len(alone)], alone)


def test_a_cache_of_another_text_is_refused(pair: tuple[Any, Any, Any]) -> None:
    """Nothing is computed and the cache stays as it was; the right continuation goes on from it."""
    case, model, _ = pair
    first, other = case.ids(2, 6), case.ids(2, 6, salt=1)
    rest = case.ids(2, 3, salt=2)
    assert not torch.equal(first[1], other[1])
    options: dict[str, Any] = dict(max_new_tokens=4, eos_token_id=[])
    expected = model.generate(torch.cat([first, rest], 1), **options)
    for max_length in (None, 20):
        cache = model.new_cache(2, max_length=max_length)
        with torch.no_grad():
            model(first, cache=cache)
        for wrong, words in (
            (torch.cat([other, rest], 1), "row 0: token 0 of the prompt is .*belongs to another text"),
            (torch.cat([torch.stack([first[0], other[1]]), rest], 1), "row 1: token"),
            (torch.cat([first[:, :5], rest], 1), r"row \d: token 5 of the prompt"),
            (first, "row 0: the cache already holds 6 tokens and input_ids has 6.*at least one token more"),
            (first[:, :4], "already holds 6 tokens and input_ids has 4"),
            (torch.cat([first, rest], 1)[:1], "cache is for 2 rows, the prompt has 1"),
        ):
            for call in (model.generate, model.stream):
                with pytest.raises(ValueError, match=words):
                    call(wrong, cache=cache, **options)
            assert cache.lengths.tolist() == [6, 6]
        padded = torch.cat([torch.full((2, 2), 1), first, rest], 1)
        mask = torch.cat([torch.zeros(2, 2), torch.ones(2, 9)], 1).long()
        with pytest.raises(ValueError, match="row 0: token 0 of the prompt is 1"):
            model.generate(padded, cache=cache, **options)  # without its mask the padding is text
        out = model.generate(padded, mask, cache=cache, **options)
        assert torch.equal(out[:, 2:], expected)


def test_a_cache_that_was_rolled_back_or_reordered_has_the_text_of_its_rows(pair: tuple[Any, Any, Any]) -> None:
    case, model, _ = pair
    ids = case.ids(2, 7)
    options: dict[str, Any] = dict(max_new_tokens=3, eos_token_id=[])
    cache = model.new_cache(2, record=4)
    out = model.generate(ids, cache=cache, **options)
    cache.rollback(3)
    changed = torch.cat([ids[:, :6], case.ids(2, 2, salt=5)], 1)
    assert torch.equal(model.generate(changed, cache=cache, **options), model.generate(changed, **options))
    cache = model.new_cache(2)
    model.generate(ids, cache=cache, **options)
    cache.reorder([1, 0])
    longer = torch.cat([out, case.ids(2, 2, salt=6)], 1)
    with pytest.raises(ValueError, match="belongs to another text"):
        model.generate(longer, cache=cache, **options)
    assert torch.equal(model.generate(longer.flip(0), cache=cache, **options), model.generate(longer.flip(0), **options))


def test_a_replaced_prepare_inputs_for_generation_is_called() -> None:
    """Every step's arguments go through it, as in transformers; what it returns decides."""
    case = odd_shape(8)
    model, plain = ours(case), ours(case)
    for one in (model, plain):
        draw(one, 0)
    ids, calls = case.ids(2, 5), []

    def prepare(input_ids: Tensor, **options: Any) -> dict[str, Any]:
        calls.append((tuple(input_ids.shape), options["is_first_iteration"], options["past_key_values"] is None))
        return {"input_ids": (input_ids + 1) % plain.config.vocab_size, **options}

    model.prepare_inputs_for_generation = prepare
    expected, size = ids, plain.config.vocab_size
    for _ in range(4):
        expected = torch.cat([expected, plain((expected + 1) % size).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=[]), expected)
    assert calls == [((2, 5), True, True)] + [((2, 1), False, False)] * 3
    model.prepare_inputs_for_generation = lambda input_ids, **options: input_ids
    with pytest.raises(ValueError, match="prepare_inputs_for_generation returned .*expected a dict"):
        model.generate(ids, max_new_tokens=4, eos_token_id=[])
