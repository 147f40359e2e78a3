"""transformers' keywords of the tokenizer (call, encode, decode, batch_decode, apply_chat_template, pad, from_pretrained).

Keywords with the same meaning under the same name (padding, truncation, max_length, add_special_tokens, return_tensors,
return_attention_mask, padding_side, skip_special_tokens, continue_final_message, chat_template, ...) are parameters.
"""

from __future__ import annotations

from .keyword import Keyword, anything

_TESTS = "tests/processing/test_transformers_tokenizer.py::"
_REFUSED = _TESTS + "test_keywords_are_refused_with_the_way_out"
_NEUTRAL = _TESTS + "test_neutral_keywords_change_nothing"


TOKENIZER: tuple[Keyword, ...] = (
    Keyword("split_special_tokens", becomes="special", convert=lambda value: not value,
            tested_by=_TESTS + "test_control_tokens"),
    Keyword("sanitize_control_tokens", becomes="special", convert=lambda value: not value,
            tested_by=_TESTS + "test_control_tokens"),
    Keyword("conversation", becomes="messages", tested_by=_TESTS + "test_chat_equals_transformers"),
    Keyword("token_ids", becomes="ids", tested_by=_TESTS + "test_decoding_equals_transformers"),
    Keyword("sequences", becomes="rows", tested_by=_TESTS + "test_decoding_equals_transformers"),
    Keyword("encoded_inputs", becomes="rows", tested_by=_TESTS + "test_padding_of_features_equals_transformers"),
    Keyword("text_pair", instead="one model input is one text: join the two yourself", tested_by=_REFUSED),
    Keyword("text_target", instead="labels are input_ids here: call the tokenizer once more", tested_by=_REFUSED),
    Keyword("text_pair_target", instead="labels are input_ids here: call the tokenizer once more", tested_by=_REFUSED),
    Keyword("max_target_length", instead="give max_length= in a call of its own", tested_by=_REFUSED),
    Keyword("stride", neutral=(0,), instead="cut input_ids into windows yourself", tested_by=_REFUSED),
    Keyword("is_split_into_words", neutral=(False,), instead="join the words: the tokenizer splits text itself",
            tested_by=_REFUSED),
    Keyword("return_overflowing_tokens", neutral=(False,), instead="leave truncation out and cut input_ids yourself",
            tested_by=_REFUSED),
    Keyword("return_token_type_ids", neutral=(False,), instead="the model has no token types; for images and videos the "
            "processor returns mm_token_type_ids", tested_by=_REFUSED),
    Keyword("return_special_tokens_mask", neutral=(False,), instead="compare input_ids with all_special_ids",
            tested_by=_REFUSED),
    Keyword("return_offsets_mapping", neutral=(False,), instead="use tokenizer.backend_tokenizer.encode(text).offsets",
            tested_by=_REFUSED),
    Keyword("return_length", neutral=(False,), instead="the lengths are attention_mask.sum(-1)", tested_by=_REFUSED),
    Keyword("return_assistant_tokens_mask", neutral=(False,), instead="render the conversation with and without the last "
            "message and compare the lengths", tested_by=_REFUSED),
    Keyword("tokenizer_kwargs", neutral=({},), instead="give its entries as keywords of the call", tested_by=_REFUSED),
    Keyword("clean_up_tokenization_spaces", neutral=(False, True), instead="True or False: a byte-level BPE has no blanks to "
            "clean up, and transformers leaves its text alone too", tested_by=_NEUTRAL),
    Keyword("spaces_between_special_tokens", neutral=(False, True), tested_by=_NEUTRAL),
    Keyword("use_source_tokenizer", neutral=(False,), instead="there is one tokenizer", tested_by=_NEUTRAL),
    Keyword("verbose", neutral=anything, tested_by=_NEUTRAL),
    Keyword("use_fast", neutral=anything, tested_by=_NEUTRAL),
    Keyword("legacy", neutral=anything, tested_by=_NEUTRAL),
    Keyword("trust_remote_code", neutral=anything, tested_by=_NEUTRAL),
    Keyword("add_bos_token", neutral=(False,), instead="the published tokenizers have no start token", tested_by=_REFUSED),
    Keyword("add_eos_token", neutral=(False,), instead="append tokenizer.eos_token_id yourself", tested_by=_REFUSED),
)  # fmt: skip
