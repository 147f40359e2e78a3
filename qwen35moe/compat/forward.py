"""transformers' keywords of a model's forward. Their values are read in `qwen35moe.models.inputs` and `packing`."""

from __future__ import annotations

from .keyword import Keyword

_TESTS = "tests/models/test_keywords.py::"
_CACHES = _TESTS + "test_decoding_loops_of_transformers"
_PACKED = _TESTS + "test_packing_keywords_of_transformers"
_NEUTRAL = _TESTS + "test_neutral_values_change_nothing"
_REFUSED = _TESTS + "test_values_with_an_effect_are_refused"
_TEXT = "this class reads text alone; Qwen3_5MoeForConditionalGeneration reads images and videos too"


FORWARD: tuple[Keyword, ...] = (
    Keyword("past_key_values", becomes="cache", tested_by=_CACHES),
    Keyword(
        "use_cache", does="True without a cache makes a growing one, which the output returns as past_key_values; None and "
        "False make none", tested_by=_CACHES,
    ),
    Keyword("cache_position", does="compared with the columns that the cache has seen; others are refused",
            tested_by=_TESTS + "test_cache_position_is_compared_with_the_cache"),
    Keyword("return_dict", does="False returns the tuple output.to_tuple()", tested_by=_TESTS + "test_return_dict"),
    Keyword("cu_seq_lens_q", becomes="cu_seqlens", tested_by=_PACKED),
    Keyword("cu_seq_lens_k", becomes="cu_seqlens", tested_by=_PACKED),
    Keyword("max_length_q", does="computed from cu_seqlens; less than the longest document is refused", tested_by=_PACKED),
    Keyword("max_length_k", does="as max_length_q", tested_by=_PACKED),
    Keyword("seq_idx", does="the number of each token's document: packing, as cu_seqlens", tested_by=_PACKED),
    Keyword("num_logits_to_keep", becomes="logits_to_keep", tested_by=_TESTS + "test_renamed_keywords"),
    Keyword("skip_logits", becomes="output_logits", convert=lambda value: not value,
            tested_by=_TESTS + "test_renamed_keywords"),
    Keyword("token_type_ids", does="zeros are accepted; the model has one type of token", tested_by=_NEUTRAL),
    Keyword("mm_token_type_ids", does="zeros are accepted by text models; a multimodal model reads them",
            tested_by=_TESTS + "test_the_processors_output_fits_the_text_class"),
    Keyword("is_causal", neutral=(True,), instead="attention and the delta rule are causal", tested_by=_REFUSED),
    Keyword("head_mask", instead="taps.patch changes the output of single heads", tested_by=_REFUSED),
    Keyword("return_loss", neutral=(True, False), instead="labels decide whether there is a loss", tested_by=_NEUTRAL),
    Keyword("ignore_index", neutral=(-100,), instead="labels to leave out are -100", tested_by=_REFUSED),
    Keyword("label_smoothing", neutral=(0, 0.0), instead="compute the loss from the logits", tested_by=_REFUSED),
    Keyword("shift_labels", instead="give labels=, which are shifted here", tested_by=_REFUSED),
    Keyword("task_ids", instead="it belongs to peft's Poly, which wraps the model", tested_by=_REFUSED),
    Keyword("encoder_hidden_states", instead="the model has no cross-attention", tested_by=_REFUSED),
    Keyword("encoder_attention_mask", instead="the model has no cross-attention", tested_by=_REFUSED),
    Keyword("pixel_values", instead=_TEXT, tested_by=_REFUSED),
    Keyword("image_grid_thw", instead=_TEXT, tested_by=_REFUSED),
    Keyword("pixel_values_videos", instead=_TEXT, tested_by=_REFUSED),
    Keyword("video_grid_thw", instead=_TEXT, tested_by=_REFUSED),
    Keyword("mm_encoder_outputs", neutral=({},), instead=_TEXT, tested_by=_REFUSED),
    Keyword("second_per_grid_ts", instead="times of video frames are part of the text", tested_by=_REFUSED),
    Keyword("rope_deltas", instead="the cache keeps each row's rotary offset", tested_by=_REFUSED),
    Keyword("position_embeddings", instead="give position_ids", tested_by=_REFUSED),
    Keyword("output_loading_info", neutral=(False,), instead="it belongs to from_pretrained", tested_by=_NEUTRAL),
)
