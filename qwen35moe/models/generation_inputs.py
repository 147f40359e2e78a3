"""The arguments of generate() and stream(), named and described once.

transformers' other names and keywords are in `qwen35moe.compat.generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from qwen35moe.compat.generate import GENERATE
from qwen35moe.compat.keyword import read_keywords
from qwen35moe.models.vision_inputs import VisualInputs


@dataclass(frozen=True, eq=False)
class StreamInputs:
    """input_ids: [B, T] or [T], a list of ids, a list of lists of any lengths, or all that a tokenizer or processor
    returned. attention_mask: 1 for tokens, 0 for padding, on either side; without it every id is a token.
    max_new_tokens counts new tokens (default 20), max_length the prompt too; one of them. No row ends before
    min_new_tokens or min_length.

    do_sample=False takes the most likely token. do_sample=True samples; temperature, top_k, top_p and min_p then
    default to the checkpoint's generation_config.json. repetition_penalty (prompt and answer) and presence_penalty
    (answer) act in both. seed, for sampling: a number; row r uses the stream `row_seed(seed, r)`, independent of other rows
    and calls. A list gives each row its own. n: sequences for each prompt, which is computed once; rows r*n ... r*n + n-1
    continue prompt r.

    suppress_tokens are never chosen, begin_suppress_tokens not as the first new token; bad_words_ids are sequences of
    tokens of which the last one is not chosen after the others.

    A row ends with one of eos_token_id (default: the checkpoint's; [] for none), after which it is filled with pad_token_id
    (default: the checkpoint's, else the first end token), with a stop string in its new text
    (`stop=`, needs `tokenizer=`), or when a function in stopping_criteria returns True: (input_ids, scores) -> bool or
    [B] bool. logits_processor: functions (input_ids, scores) -> scores, after the penalties and before the temperature.
    transformers' LogitsProcessor and StoppingCriteria objects are such functions. `scores` of the criteria is None,
    or the scores so far with output_scores=True.

    generation_config: settings for this call, a GenerationConfig (transformers' too) or a dict; arguments come before it,
    and it comes before the checkpoint's (`model.generation_config`). do_sample is never taken from the checkpoint.

    cache: from `model.new_cache`; may hold a beginning of the rows. input_ids is the whole of them all the same, cached
    tokens included. Afterwards it holds everything but each row's last token. "static": one of fixed length.
    capture: on a GPU, decode steps with a static cache are replayed as CUDA graphs unless this is False; without a cache
    generate then makes a static one. See docs/guide/generation_and_caches.md.
    visual_inputs: images and videos as `VisualInputs` (a multimodal model's own `generate` takes pixel_values and the
    like by name). speculative: reserved.
    """

    input_ids: Any = None
    attention_mask: Any = None
    _: KW_ONLY
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    suppress_tokens: Sequence[int] | Tensor | None = None
    begin_suppress_tokens: Sequence[int] | Tensor | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    eos_token_id: int | Sequence[int] | Tensor | None = None
    pad_token_id: int | None = None
    seed: int | Sequence[int] | Tensor | None = None
    n: int | None = None
    cache: Any = None
    capture: bool | None = None
    stopping_criteria: Any = None
    logits_processor: Any = None
    speculative: Any = None
    stop: str | Sequence[str] | None = None
    tokenizer: Any = None
    generation_config: Any = None
    visual_inputs: Any = None


@dataclass(frozen=True, eq=False)
class GenerateInputs(StreamInputs):
    """streamer: an object with put(ids) and end(), as in transformers; it gets the prompt first.

    return_dict_in_generate=True returns a GenerateOutput instead of the tokens: sequences, past_key_values (the cache), with
    output_scores=True the scores from which each token was chosen, with output_logits=True the model's logits.
    """

    _: KW_ONLY
    streamer: Any = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None


@dataclass(frozen=True, eq=False)
class MultimodalStreamInputs(VisualInputs, StreamInputs):
    """The arguments of a multimodal model's `stream`."""


@dataclass(frozen=True, eq=False)
class MultimodalGenerateInputs(VisualInputs, GenerateInputs):
    """The arguments of a multimodal model's `generate`."""


Inputs = TypeVar("Inputs", bound=StreamInputs)


def expand(inputs: Inputs) -> Inputs:
    """The arguments, with those of a tokenizer's or processor's output that was passed as input_ids, and with a
    generation_config that was passed second, its place in transformers."""
    if callable(getattr(inputs.attention_mask, "to_diff_dict", None)):
        if inputs.generation_config is not None:
            raise ValueError("generation_config is the second argument and given by name: give it once")
        inputs = replace(inputs, attention_mask=None, generation_config=inputs.attention_mask)
    if not isinstance(inputs.input_ids, Mapping):
        return inputs
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    del values["input_ids"]
    read = read_keywords("generate", GENERATE, dict(inputs.input_ids), [field.name for field in fields(inputs)])
    if read.get("input_ids") is None:
        raise ValueError(f"the first argument is a mapping without input_ids: it has {', '.join(map(str, inputs.input_ids))}")
    twice = [name for name in read if values.get(name) is not None]
    if twice:
        raise ValueError(f"{twice[0]} is in the first argument and given by name: give it once")
    return type(inputs)(**(values | read))


def keywords(inputs: StreamInputs) -> dict[str, Any]:
    """The arguments by name, the vision arguments as one value (`visual_inputs`)."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    if isinstance(inputs, VisualInputs):
        visual = VisualInputs(**{field.name: values.pop(field.name) for field in fields(VisualInputs)})
        if any(value is not None for value in vars(visual).values()):
            if values["visual_inputs"] is not None:
                raise ValueError("images and videos are given by name and as visual_inputs: give one of them")
            values["visual_inputs"] = visual
    return values
