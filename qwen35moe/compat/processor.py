"""transformers' keywords of the processor (call, apply_chat_template, from_pretrained).

Keywords with the same meaning under the same name (text, images, videos, padding, truncation, max_length, return_tensors,
return_dict, continue_final_message, chat_template, min_pixels, max_pixels, size, fps, num_frames, do_sample_frames, ...) are
parameters.
"""

from __future__ import annotations

from .keyword import Keyword
from .tokenizer import TOKENIZER

_TESTS = "tests/processing/test_transformers_processor.py::"
_REFUSED = _TESTS + "test_keywords_are_refused_with_the_way_out"
_NEUTRAL = _TESTS + "test_neutral_keywords_change_nothing"
_DECODING = ("ids", "rows", "token_ids", "sequences", "encoded_inputs")  # keywords of methods that take generated ids

PROCESSOR: tuple[Keyword, ...] = (
    *(keyword for keyword in TOKENIZER if keyword.name not in _DECODING),
    Keyword("audio", instead="the model takes no audio", tested_by=_REFUSED),
    Keyword("audio_kwargs", neutral=({},), instead="the model takes no audio", tested_by=_REFUSED),
    Keyword("load_audio_from_video", neutral=(False,), instead="the model takes no audio", tested_by=_REFUSED),
    Keyword("video_metadata", instead="give the frames with their rate: Video(frames, fps=..., indices=...)",
            tested_by=_REFUSED),
    Keyword("common_kwargs", neutral=({},), instead="give its entries as keywords of the call", tested_by=_REFUSED),
    Keyword("return_mm_token_type_ids", neutral=(True,), instead="mm_token_type_ids is always returned: drop it",
            tested_by=_NEUTRAL),
    Keyword("return_metadata", neutral=(True, False), instead="True or False: the times are in the text", tested_by=_NEUTRAL),
    Keyword("do_convert_rgb", neutral=(True,), instead="images are always converted to RGB", tested_by=_REFUSED),
    Keyword("default_to_square", neutral=(False, True), instead="True or False", tested_by=_NEUTRAL),
    Keyword("do_center_crop", neutral=(False,), instead="crop the image yourself", tested_by=_REFUSED),
    Keyword("crop_size", instead="crop the image yourself", tested_by=_REFUSED),
    Keyword("do_pad", neutral=(False,), instead="images are not padded, they are resized to whole patches", tested_by=_REFUSED),
    Keyword("data_format", neutral=("channels_first",), instead="patches have the order channels, frames, rows, columns",
            tested_by=_REFUSED),
    Keyword("input_data_format", instead="channels are the first or the last axis; permute others", tested_by=_REFUSED),
    Keyword("disable_grouping", neutral=(True, False), instead="True or False", tested_by=_NEUTRAL),
    Keyword("device", neutral=("cpu",), instead="images are processed on the CPU: call .to(device) on the result",
            tested_by=_REFUSED),
)  # fmt: skip
