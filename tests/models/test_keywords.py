"""transformers' keywords of a forward: decoding loops, packing, neutral values, and refusals with the way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.compat.forward import FORWARD
from tests.models.test_vision_language import model as multimodal
from tests.models.test_vision_language import row
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

CASE = odd_shape(
    3, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_experts=5, num_experts_per_tok=2, tie_word_embeddings=False,
    vocab_size=59,
)
LENGTHS = (5, 1, 8)
T = sum(LENGTHS)
BOUNDS = [0, 5, 6, 14]


@pytest.fixture(scope="module")
def theirs() -> Any:
    theirs = peer.theirs(CASE)
    peer.draw(theirs, 5)
    return theirs


@pytest.fixture(scope="module")
def model(theirs: Any) -> Any:
    return peer.ours(CASE, source=theirs)


def ids(batch: int = 1, length: int = T, salt: int = 0) -> Tensor:
    return CASE.ids(batch, length, salt)


def one_by_one(model: Any, x: Tensor) -> Tensor:
    """The logits of the packed documents, each alone."""
    return torch.cat([model(x[:, a:b]).logits for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)], 1)


POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]


# ------------------------------------------------------------------------------------------------------- decoding loops


def loop_with_use_cache(model: Any, x: Tensor, steps: int) -> Tensor:
    past, new, out = None, x, []
    for _ in range(steps):
        outputs = model(new, past_key_values=past, use_cache=True)
        past, new = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
        out.append(new)
    return torch.cat(out, 1)


def loop_with_mask_and_positions(model: Any, x: Tensor, steps: int) -> Tensor:
    """Left-padded rows, as transformers' generate feeds them."""
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    past, new, out = None, x, []
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        outputs = model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        past, new = outputs["past_key_values"], outputs.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out.append(new)
    return torch.cat(out, 1)


def loop_with_sequence_length(model: Any, x: Tensor, steps: int) -> Tensor:
    """The mask is made from what the cache says that it has seen."""
    past, new, out = None, x, []
    for _ in range(steps):
        seen = 0 if past is None else past.get_seq_length()
        outputs = model(new, attention_mask=x.new_ones(len(x), seen + new.shape[1]), past_key_values=past, use_cache=True)
        past, new = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
        out.append(new)
    return torch.cat(out, 1)


LOOPS = (loop_with_use_cache, loop_with_mask_and_positions, loop_with_sequence_length)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_decoding_loops_of_transformers(model: Any, theirs: Any, loop: Callable[..., Tensor]) -> None:
    """The same loop on both libraries gives the same tokens; the cache is the one that the output returns."""
    with torch.no_grad():
        assert torch.equal(loop(model, ids(2, 7), 5), loop(theirs, ids(2, 7), 5))
        first = model(ids(2, 7), use_cache=True)
        assert first.past_key_values is first.cache and first.cache.lengths.tolist() == [7, 7]
        second = model(ids(2, 1), past_key_values=first.cache)
        assert second.past_key_values is first.cache and first.cache.lengths.tolist() == [8, 8]
        assert "past_key_values" not in model(ids(2, 7), use_cache=False)


def test_a_call_without_a_cache_says_so(model: Any) -> None:
    out = model(ids())
    with pytest.warns(UserWarning, match="use_cache=True"):
        assert out.past_key_values is None
    assert out.cache is None


def test_caches_of_transformers_are_refused(model: Any) -> None:
    from transformers import DynamicCache

    for cache in (DynamicCache(), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(ValueError, match=f"{type(cache).__name__}.*use_cache=True.*new_cache"):
            model(ids(), past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds is a Cache: .*past_key_values"):
        model(ids(), None, None, model.new_cache(1))  # transformers' fourth argument
    with pytest.raises(ValueError, match="past_key_values=.* and cache="):
        model(ids(), past_key_values=model.new_cache(1), cache=model.new_cache(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_cache_position_is_compared_with_the_cache(model: Any, dtype: torch.dtype) -> None:
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids(1, 5), past_key_values=cache, cache_position=torch.arange(5, dtype=dtype))
        with pytest.raises(ValueError, match="from 0 to 2, .* at 5 ... 7"):
            model(ids(1, 3), past_key_values=cache, cache_position=torch.arange(3, dtype=dtype))
        assert cache.lengths.tolist() == [5]
        expected = model(ids(1, 3), cache=cache.clone()).logits
        actual = model(ids(1, 3), past_key_values=cache, cache_position=torch.arange(5, 8, dtype=dtype)).logits
    assert torch.equal(actual, expected)


# -------------------------------------------------------------------------------------------------------------- packing

PACKED: dict[str, dict[str, Any]] = {
    "cu_seq_lens": dict(cu_seq_lens_q=torch.tensor(BOUNDS, dtype=torch.int32), max_length_q=8,
                        cu_seq_lens_k=torch.tensor(BOUNDS, dtype=torch.int32), max_length_k=8),
    "cu_seq_lens and positions": dict(cu_seq_lens_q=torch.tensor(BOUNDS, dtype=torch.int16), position_ids=POSITIONS),
    "both names": dict(cu_seq_lens_q=torch.tensor(BOUNDS), cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32).long()),
    "seq_idx": dict(seq_idx=NUMBERS.int()),
    "seq_idx and positions": dict(seq_idx=NUMBERS.int(), position_ids=POSITIONS),
    "running positions": dict(seq_idx=NUMBERS, position_ids=torch.arange(T)[None]),
}


@pytest.mark.parametrize("keywords", PACKED.values(), ids=PACKED)
def test_packing_keywords_of_transformers(model: Any, keywords: dict[str, Any]) -> None:
    """What DataCollatorWithFlattening returns separates documents, labels included."""
    x = ids()
    with torch.no_grad():
        assert_close(model(x, **keywords).logits, one_by_one(model, x), 1e-5)
        expected = model(x, cu_seqlens=torch.tensor(BOUNDS), labels=x).loss
        assert_close(model(x, **keywords, labels=x).loss, expected, 1e-6)


def test_the_collator_of_transformers(model: Any) -> None:
    from transformers import DataCollatorWithFlattening

    documents = [{"input_ids": ids(1, n, n)[0].tolist()} for n in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(documents)
    with torch.no_grad():
        assert_close(model(**batch).logits, one_by_one(model, batch["input_ids"]), 1e-5)


def test_packing_keywords_that_contradict_are_refused(model: Any) -> None:
    other = torch.tensor([0, 4, 6, 14])
    for keywords, words in (
        (dict(cu_seq_lens_q=torch.tensor(BOUNDS), cu_seq_lens_k=other), "cu_seq_lens_k=.* and cu_seqlens="),
        (dict(cu_seq_lens_q=torch.tensor(BOUNDS), max_length_q=7), "is 7, the longest document .* 8"),
        (dict(cu_seq_lens_q=other, seq_idx=NUMBERS), "separate different documents"),
        (dict(seq_idx=torch.zeros(1, T).long(), position_ids=POSITIONS), "start again at token 5, where seq_idx"),
        (dict(seq_idx=NUMBERS.flip(1)), "seq_idx numbers the documents"),
    ):
        with pytest.raises(ValueError, match=words):
            model(ids(), **keywords)


# ------------------------------------------------------------------------------------------- accepted, renamed, refused


def test_neutral_values_change_nothing(model: Any) -> None:
    x = ids(2, 6)
    with torch.no_grad():
        expected = model(x, labels=x)
        for keywords in (
            dict(return_loss=True), dict(is_causal=True), dict(token_type_ids=torch.zeros_like(x)), dict(use_cache=False),
            dict(mm_token_type_ids=torch.zeros_like(x).int()), dict(output_attentions=None, output_hidden_states=None),
            dict(output_loading_info=False), dict(logits_to_keep=None, output_logits=None, return_dict=None),
            dict.fromkeys(keyword.name for keyword in FORWARD),
        ):
            assert model(x, labels=x, **keywords) == expected, keywords


def test_renamed_keywords(model: Any) -> None:
    x = ids(2, 6)
    with torch.no_grad():
        assert torch.equal(model(x, num_logits_to_keep=2).logits, model(x, logits_to_keep=2).logits)
        assert "logits" not in model(x, labels=x, skip_logits=True) and "logits" in model(x, labels=x, skip_logits=False)
        with pytest.raises(ValueError, match="num_logits_to_keep=2 and logits_to_keep=3"):
            model(x, num_logits_to_keep=2, logits_to_keep=3)


def test_return_dict(model: Any) -> None:
    x = ids(2, 6)
    with torch.no_grad():
        out = model(x, labels=x, return_dict=False)
        assert type(out) is tuple and len(out) == 2 and torch.equal(out[0], model(x, labels=x).loss)
        assert type(model.model(x, return_dict=False)[0]) is Tensor
        assert model(x, return_dict=True) == model(x)


REFUSED: dict[str, tuple[Any, str]] = {
    "is_causal": (False, "causal"), "head_mask": (torch.ones(2), "taps.patch"), "ignore_index": (0, "-100"),
    "label_smoothing": (0.1, "logits"), "shift_labels": (torch.ones(1, T), "labels="), "task_ids": ([1], "Poly"),
    "encoder_hidden_states": (torch.ones(1), "cross-attention"), "encoder_attention_mask": (torch.ones(1), "cross-attention"),
    "second_per_grid_ts": ([1.0], "text"), "rope_deltas": (torch.ones(1), "cache"), "position_embeddings": ((), "position_ids"),
    "pixel_values": (torch.ones(1), "ConditionalGeneration"), "image_grid_thw": (torch.ones(1), "ConditionalGeneration"),
    "pixel_values_videos": (torch.ones(1), "ConditionalGeneration"),
    "video_grid_thw": (torch.ones(1), "ConditionalGeneration"), "mm_encoder_outputs": ({"image": 1}, "ConditionalGeneration"),
    "token_type_ids": (torch.ones(1, T), "one type"), "mm_token_type_ids": (torch.ones(1, T).int(), "ConditionalGeneration"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_values_with_an_effect_are_refused(model: Any, name: str) -> None:
    value, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as error:
        model(ids(), **{name: value})
    assert name in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name,near", [("use_cach", "use_cache"), ("atention_mask", "attention_mask"), ("zzz", None)])
def test_unknown_keywords_suggest_the_nearest_name(model: Any, name: str, near: str | None) -> None:
    with pytest.raises(TypeError) as error:
        model(ids(), **{name: None})
    suggestion = f": did you mean {near!r}?" if near else ""
    assert str(error.value) == f"Qwen3_5MoeForCausalLM.forward() has no keyword {name!r}{suggestion}"


def test_what_the_trainer_reads() -> None:
    """It keeps the columns of the signature, and takes every parameter with "label" in its name for labels."""
    parameters = inspect.signature(Qwen3_5MoeForCausalLM.forward).parameters
    assert [name for name in parameters if "label" in name] == ["labels"]
    assert {"input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "num_items_in_batch"} <= parameters.keys()


def test_the_processors_output_fits_the_text_class(model: Any) -> None:
    """Text without images in the multimodal processor's form; token types of images are refused."""
    x = ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    inputs = {"input_ids": x, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(x)}
    with torch.no_grad():
        assert model(**inputs) == model(x, attention_mask=mask)
        images = row(0)
        with pytest.raises(ValueError, match="images or videos"):
            text = Qwen3_5MoeForCausalLM(multimodal().config.text_only()).init_weights()
            text(images["input_ids"], mm_token_type_ids=(images["input_ids"] > 40).long())


# ------------------------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64],
                         ids=str)
def test_integers_of_every_width(model: Any, dtype: torch.dtype) -> None:
    x, mask = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(x, attention_mask=mask, position_ids=positions, labels=x, logits_to_keep=torch.tensor([1, 3]))
        actual = model(x.to(dtype), attention_mask=mask.to(dtype), position_ids=positions.to(dtype), labels=x.to(dtype),
                       logits_to_keep=torch.tensor([1, 3]).to(dtype))
        assert actual == expected
        packed = dict(attention_mask=(NUMBERS + 1).to(dtype)), dict(cu_seqlens=torch.tensor(BOUNDS).to(dtype))
        for keywords in packed:
            assert_close(model(ids().to(dtype), **keywords).logits, one_by_one(model, ids()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool], ids=str)
def test_masks_of_zeros_and_ones_of_every_dtype(model: Any, dtype: torch.dtype) -> None:
    x, mask = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        assert model(x, attention_mask=mask.to(dtype)) == model(x, attention_mask=mask)
