"""The arguments of generate() and stream(), named and described once, and checked once into `Settings`.

An argument that is left out takes its default from the checkpoint's generation_config.json (`model.generation_config`, a
dict), which has all end tokens: the published text configs name one of two. temperature, top_k, top_p and min_p are taken
from there only with do_sample=True, and do_sample itself never.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from ..ops.sampling import check_range
from .stop import Decoder

DEFAULT_NEW_TOKENS = 20  # as in transformers, when neither the call nor the checkpoint has a number

# Keys of a generation_config.json that would change the answer and are not implemented, with their neutral values.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "min_length": (0, 1),
    "min_new_tokens": (0, 1),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({},),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "frequency_penalty": (0.0,),
    "max_time": (),
}


@dataclass(frozen=True, eq=False)
class StreamInputs:
    """input_ids: [B, T] or [T], a list of ids, or a list of lists of any lengths. attention_mask: 1 for tokens, 0 for
    padding, on either side; without it every id is a token. max_new_tokens counts new tokens (default 20), max_length
    the prompt too; one of them.

    do_sample=False takes the most likely token. do_sample=True samples; temperature, top_k, top_p and min_p then
    default to the checkpoint's generation_config.json. repetition_penalty (prompt and answer) and presence_penalty
    (answer) act in both. seed: a number; row r uses the stream `row_seed(seed, r)`, independent of other rows and calls.
    A list gives each row its own.

    A row ends with one of eos_token_id (default: the checkpoint's; [] for none), with a stop string in its new text
    (`stop=`, needs `tokenizer=`), or when a function in stopping_criteria returns True: (input_ids, scores) -> bool or
    [B] bool. logits_processor: functions (input_ids, scores) -> scores, after the penalties and before the temperature.
    transformers' LogitsProcessor and StoppingCriteria objects are such functions. `scores` of the criteria is None.

    cache: from `model.new_cache`; may hold a beginning of the rows. input_ids is the whole of them all the same, cached
    tokens included. Afterwards it holds everything but each row's last token.
    visual_inputs: images and videos as `VisualInputs` (a multimodal model's own `generate` takes pixel_values and the
    like by name). speculative: reserved.
    """

    input_ids: Any
    attention_mask: Any = None
    _: KW_ONLY
    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | Tensor | None = None
    pad_token_id: int | None = None
    seed: int | Sequence[int] | Tensor | None = None
    cache: Any = None
    stopping_criteria: Any = None
    logits_processor: Any = None
    speculative: Any = None
    stop: str | Sequence[str] | None = None
    tokenizer: Decoder | None = None
    visual_inputs: Any = None


@dataclass(frozen=True, eq=False)
class GenerateInputs(StreamInputs):
    """streamer: an object with put(ids) and end(), as in transformers; it gets the prompt first."""

    _: KW_ONLY
    streamer: Any = None


@dataclass(frozen=True)
class Settings:
    """The checked settings of one call. None: not applied."""

    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    seed: int | tuple[int, ...] | None
    stop: tuple[str, ...]
    stopping_criteria: tuple[Callable[..., Any], ...]
    logits_processor: tuple[Callable[..., Any], ...]

    @property
    def can_finish_early(self) -> bool:
        return bool(self.eos_token_ids or self.stop or self.stopping_criteria)


def resolve(model: Any, inputs: StreamInputs, prompt_length: int, ends: tuple[int, ...], pad: int | None) -> Settings:
    """Checks the arguments and fills in the checkpoint's defaults. ValueError names the argument, its value and what to
    do. ends and pad: from `end_tokens` and `padding_token`."""
    if inputs.speculative is not None:
        raise ValueError(
            f"speculative={inputs.speculative!r}: speculative decoding comes with the multi-token-prediction head, which this "
            "version does not have yet; leave speculative=None"
        )
    if not isinstance(inputs.do_sample, bool):
        raise ValueError(f"do_sample must be True or False, got {inputs.do_sample!r}")
    defaults = checkpoint_defaults(model)
    repetition = _number("repetition_penalty", inputs.repetition_penalty, defaults.get("repetition_penalty"))
    if repetition is not None:
        check_range("repetition_penalty", repetition)
    presence = _number("presence_penalty", inputs.presence_penalty, defaults.get("presence_penalty"))
    return Settings(
        max_new_tokens=_new_tokens(inputs.max_new_tokens, inputs.max_length, prompt_length, defaults),
        do_sample=inputs.do_sample,
        **_shaping(inputs, defaults),
        repetition_penalty=None if repetition == 1 else repetition,
        presence_penalty=presence or None,
        eos_token_ids=ends,
        pad_token_id=pad,
        seed=_seed(inputs.seed),
        stop=_strings(inputs.stop if inputs.stop is not None else defaults.get("stop_strings")),
        stopping_criteria=_callables("stopping_criteria", inputs.stopping_criteria),
        logits_processor=_callables("logits_processor", inputs.logits_processor),
    )


def checkpoint_defaults(model: Any) -> dict[str, Any]:
    """model.generation_config as a dict ({} without one). ValueError for a key in it that is not implemented."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        if not callable(getattr(config, "to_dict", None)):
            raise ValueError(f"model.generation_config must be a dict, got {type(config).__name__}")
        config = config.to_dict()  # a transformers GenerationConfig
    for key, neutral in _UNSUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise ValueError(
                f"the checkpoint's generation_config asks for {key}={value!r}, which is not implemented: "
                f"model.generation_config.pop({key!r}) to generate without it"
            )
    return dict(config)


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | Tensor | None = None) -> tuple[int, ...]:
    """The tokens that end a row: the argument, by default the checkpoint's; () for none."""
    if eos_token_id is None:
        eos_token_id = default(model, checkpoint_defaults(model), "eos_token_id")
    return _token_ids("eos_token_id", eos_token_id)


def padding_token(model: Any, pad_token_id: int | None, ends: Sequence[int]) -> int | None:
    """The padding token: the argument, else the checkpoint's, else the first end token, as in transformers."""
    if pad_token_id is None:
        pad_token_id = default(model, checkpoint_defaults(model), "pad_token_id")
    if pad_token_id is not None:
        return _token_ids("pad_token_id", pad_token_id)[0]
    return ends[0] if ends else None


def default(model: Any, defaults: Mapping[str, Any], name: str) -> Any:
    """A token id from generation_config, else from the config (the text part before the whole)."""
    if defaults.get(name) is not None:
        return defaults[name]
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return None


def _new_tokens(max_new_tokens: int | None, max_length: int | None, prompt: int, defaults: Mapping[str, Any]) -> int:
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(f"{max_new_tokens=} and {max_length=} both limit the length: pass one of them")
    if max_new_tokens is None and max_length is None:
        max_new_tokens = defaults.get("max_new_tokens")
        max_length = defaults.get("max_length") if max_new_tokens is None else None
        if max_new_tokens is None and max_length is None:
            return DEFAULT_NEW_TOKENS
    name, value = ("max_length", max_length) if max_new_tokens is None else ("max_new_tokens", max_new_tokens)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if name == "max_length":
        if value < prompt:
            raise ValueError(
                f"max_length={value} is less than the prompt's {prompt} tokens: it counts the prompt too; "
                "raise it or pass max_new_tokens"
            )
        return int(value) - prompt
    if value < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {value}")
    return int(value)


def _shaping(inputs: StreamInputs, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """temperature, top_k, top_p, min_p, each None where it changes nothing."""
    fallback = defaults if inputs.do_sample else {}
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    values: dict[str, Any] = {}
    for name, no_effect in neutral.items():
        value = _number(name, getattr(inputs, name), fallback.get(name))
        if value == no_effect:
            value = None
        if value is not None:
            check_range(name, value)
        values[name] = int(value) if value is not None and name == "top_k" else value
    unused = [f"{name}={value}" for name, value in values.items() if value is not None]
    if unused and not inputs.do_sample:
        raise ValueError(f"{', '.join(unused)}: has an effect only when sampling; pass do_sample=True, or leave it out")
    return values


def _number(name: str, argument: Any, fallback: Any) -> float | None:
    """The argument, else the fallback, as a finite number."""
    value = fallback if argument is None else argument
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One id, several, or none ([] switches the checkpoint's end tokens off)."""
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise ValueError(f"{name} must be a token id or several, got {value!r}")
    if name == "pad_token_id" and len(ids) != 1:
        raise ValueError(f"pad_token_id must be one token id, got {value!r}")
    return tuple(int(token) for token in ids)


def _seed(seed: Any) -> int | tuple[int, ...] | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    values: tuple[Any, ...] = tuple(seed) if isinstance(seed, (list, tuple)) else (seed,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"seed must be a whole number, or one for each row, got {seed!r}")
    return tuple(int(value) for value in values) if isinstance(seed, (list, tuple)) else int(values[0])


def _strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be one or more non-empty strings, got {string!r}")
    return stop


def _callables(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    # transformers' LogitsProcessorList and StoppingCriteriaList are lists *and* callable: they are unpacked as lists.
    value = () if value is None else tuple(value) if isinstance(value, Iterable) else (value,)
    for function in value:
        if not callable(function):
            raise ValueError(f"{name} must hold functions (input_ids, scores) -> ..., got {type(function).__name__}")
    return value
