"""transformers' keywords of generate."""

from __future__ import annotations

from typing import Any

from .keyword import Keyword, anything, short

_TEST = "tests/generation/test_keywords.py::"
_NEUTRAL, _REFUSED = _TEST + "test_neutral_keywords_change_nothing", _TEST + "test_other_values_name_the_way_out"


def _processor(name: str) -> str:
    """What to use instead of what one of transformers' logits processors does."""
    return f"pass logits_processor=[transformers.{name}(...)], which does the same here"


def _cache_kind(value: Any) -> Any:
    if value in ("static", "dynamic"):
        return value if value == "static" else None
    raise ValueError(
        f"generate(cache_implementation={short(value)}) is not supported: pass 'dynamic' or 'static', or a cache made with "
        "model.new_cache(batch_size, max_length=...)"
    )


def _capture(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"generate(disable_compile={short(value)}) must be True or False")
    return not value


def _all_zero(value: Any) -> bool:
    """Whether token types say that every token is text."""
    any_of = getattr(value, "any", None)
    return callable(any_of) and not bool(any_of())


_TOWER = "a text class reads no images or videos: load the multimodal class, Qwen3_5MoeForConditionalGeneration"
_BEAMS = "beam search is not implemented: sample several answers with do_sample=True and num_return_sequences"
_GUIDE = "two forward calls and a logits_processor of your own"
_DRAFT = "assisted decoding is not implemented: leave it out; the tokens are the same, only slower"
_AGAIN = "run model(output.sequences, {0}=True) once the tokens are there"

GENERATE: tuple[Keyword, ...] = (
    # ------------------------------------------------------------------------------------------- other names of ours
    Keyword("inputs", becomes="input_ids", tested_by=_TEST + "test_translated_keywords"),
    Keyword("past_key_values", becomes="cache", tested_by=_TEST + "test_translated_keywords"),
    Keyword("num_return_sequences", becomes="n", tested_by=_TEST + "test_translated_keywords"),
    Keyword("stop_strings", becomes="stop", tested_by=_TEST + "test_translated_keywords"),
    Keyword("cache_implementation", becomes="cache", convert=_cache_kind, tested_by=_TEST + "test_translated_keywords"),
    Keyword("disable_compile", becomes="capture", convert=_capture, tested_by=_TEST + "test_translated_keywords"),
    # --------------------------------------------------------------------------- accepted where they change nothing
    Keyword("use_cache", neutral=(True, False), instead="a cache is always used; the tokens are the same", tested_by=_NEUTRAL),
    Keyword("num_beams", neutral=(1,), instead=_BEAMS, tested_by=_REFUSED),
    Keyword("num_beam_groups", neutral=(1,), instead=_BEAMS, tested_by=_REFUSED),
    Keyword("early_stopping", neutral=(True, False), instead="it is for beam search: leave it out", tested_by=_NEUTRAL),
    Keyword("length_penalty", neutral=(1.0, 1), instead="it is for beam search: leave it out", tested_by=_REFUSED),
    Keyword("diversity_penalty", neutral=(0.0, 0), instead=_BEAMS, tested_by=_REFUSED),
    Keyword("constraints", instead=_BEAMS, tested_by=_REFUSED),
    Keyword("force_words_ids", instead=_BEAMS, tested_by=_REFUSED),
    Keyword("synced_gpus", neutral=(False,), instead="every process here runs its own number of steps: leave it out, and give "
            "all ranks prompts of one batch with eos_token_id=[] where their steps must agree", tested_by=_REFUSED),
    Keyword("return_dict", neutral=(True, False), instead="return_dict_in_generate=True returns an object", tested_by=_NEUTRAL),
    Keyword("logits_to_keep", neutral=(0, 1), instead="return_dict_in_generate=True, output_logits=True", tested_by=_REFUSED),
    Keyword("token_type_ids", neutral=_all_zero, instead="the model has no token types: leave it out", tested_by=_NEUTRAL),
    Keyword("low_memory", neutral=(True, False), instead="leave it out", tested_by=_NEUTRAL),
    Keyword("bos_token_id", neutral=anything, instead="a prompt begins with its own tokens", tested_by=_NEUTRAL),
    Keyword("transformers_version", neutral=anything, instead="no effect", tested_by=_NEUTRAL),
    # ------------------------------------------------------- parts of the scores that transformers' processors compute
    Keyword("no_repeat_ngram_size", neutral=(0,), instead=_processor("NoRepeatNGramLogitsProcessor"), tested_by=_REFUSED),
    Keyword("encoder_repetition_penalty", neutral=(1.0, 1), instead=_processor("EncoderRepetitionPenaltyLogitsProcessor"),
            tested_by=_REFUSED),
    Keyword("encoder_no_repeat_ngram_size", neutral=(0,), instead=_processor("EncoderNoRepeatNGramLogitsProcessor"),
            tested_by=_REFUSED),
    Keyword("typical_p", neutral=(1.0, 1), instead=_processor("TypicalLogitsWarper"), tested_by=_REFUSED),
    Keyword("top_h", instead=_processor("TopHLogitsWarper"), tested_by=_REFUSED),
    Keyword("epsilon_cutoff", neutral=(0.0, 0), instead=_processor("EpsilonLogitsWarper"), tested_by=_REFUSED),
    Keyword("eta_cutoff", neutral=(0.0, 0), instead=_processor("EtaLogitsWarper"), tested_by=_REFUSED),
    Keyword("frequency_penalty", neutral=(0.0, 0), instead="presence_penalty or repetition_penalty", tested_by=_REFUSED),
    Keyword("sequence_bias", neutral=({}, []), instead=_processor("SequenceBiasLogitsProcessor"), tested_by=_REFUSED),
    Keyword("prefix_allowed_tokens_fn", instead=_processor("PrefixConstrainedLogitsProcessor"), tested_by=_REFUSED),
    Keyword("forced_bos_token_id", instead=_processor("ForcedBOSTokenLogitsProcessor"), tested_by=_REFUSED),
    Keyword("forced_eos_token_id", instead=_processor("ForcedEOSTokenLogitsProcessor"), tested_by=_REFUSED),
    Keyword("exponential_decay_length_penalty", instead=_processor("ExponentialDecayLengthPenalty"), tested_by=_REFUSED),
    Keyword("remove_invalid_values", neutral=(False,), instead=_processor("InfNanRemoveLogitsProcessor"), tested_by=_REFUSED),
    Keyword("renormalize_logits", neutral=(False,), instead="take log_softmax of output.scores", tested_by=_REFUSED),
    Keyword("watermarking_config", instead=_processor("WatermarkLogitsProcessor"), tested_by=_REFUSED),
    Keyword("max_time", instead="pass stopping_criteria=[transformers.MaxTimeCriteria(...)]", tested_by=_REFUSED),
    # ------------------------------------------------------------------------------------------------- not implemented
    Keyword("guidance_scale", neutral=(1.0, 1), instead=_GUIDE, tested_by=_REFUSED),
    Keyword("negative_prompt_ids", instead=_GUIDE, tested_by=_REFUSED),
    Keyword("negative_prompt_attention_mask", instead=_GUIDE, tested_by=_REFUSED),
    Keyword("assistant_model", instead=_DRAFT, tested_by=_REFUSED),
    Keyword("assistant_tokenizer", instead=_DRAFT, tested_by=_REFUSED),
    Keyword("prompt_lookup_num_tokens", instead=_DRAFT, tested_by=_REFUSED),
    Keyword("assistant_early_exit", instead=_DRAFT, tested_by=_REFUSED),
    Keyword("use_mtp", neutral=(False,), instead=_DRAFT, tested_by=_REFUSED),
    Keyword("penalty_alpha", neutral=(0.0, 0), instead="contrastive search: leave it out", tested_by=_REFUSED),
    Keyword("dola_layers", instead="DoLa is not implemented: leave it out", tested_by=_REFUSED),
    Keyword("token_healing", neutral=(False,), instead="token healing is not implemented: leave it out", tested_by=_REFUSED),
    Keyword("output_attentions", neutral=(False,), instead=_AGAIN.format("output_attentions"), tested_by=_REFUSED),
    Keyword("output_hidden_states", neutral=(False,), instead=_AGAIN.format("output_hidden_states"), tested_by=_REFUSED),
    Keyword("output_router_logits", neutral=(False,), instead=_AGAIN.format("output_router_logits"), tested_by=_REFUSED),
    Keyword("inputs_embeds", instead="prompts are token ids here: run model(inputs_embeds=..., cache=cache) and a loop of "
            "your own, see docs/guide/generation_and_caches.md", tested_by=_REFUSED),
    Keyword("position_ids", instead="positions follow from attention_mask: leave it out", tested_by=_REFUSED),
    Keyword("cache_position", instead="positions follow from the cache: leave it out", tested_by=_REFUSED),
    Keyword("prefill_chunk_size", instead="call model(part, cache=cache) for each part, then generate(..., cache=cache)",
            tested_by=_REFUSED),
    Keyword("max_cache_len", instead="pass cache=model.new_cache(batch_size, max_length=...)", tested_by=_REFUSED),
    Keyword("cache_config", instead="pass cache=model.new_cache(batch_size, max_length=...)", tested_by=_REFUSED),
    Keyword("compile_config", instead="model.compile() before the call", tested_by=_REFUSED),
    Keyword("custom_generate", instead="write the loop over model(...), see docs/guide/generation_and_caches.md",
            tested_by=_REFUSED),
    Keyword("mm_token_type_ids", neutral=_all_zero, instead=_TOWER, tested_by=_NEUTRAL),
    Keyword("pixel_values", instead=_TOWER, tested_by=_REFUSED),
    Keyword("pixel_values_videos", instead=_TOWER, tested_by=_REFUSED),
    Keyword("image_grid_thw", instead=_TOWER, tested_by=_REFUSED),
    Keyword("video_grid_thw", instead=_TOWER, tested_by=_REFUSED),
)
