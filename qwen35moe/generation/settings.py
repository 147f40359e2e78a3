"""What a call of generate() asks for, checked once: the caller's arguments first, then the checkpoint's own defaults.

The defaults come from the checkpoint's generation_config.json (`model.generation_config`, a dict), because it knows
all end tokens: the published text configs name one of two. How to sample (temperature, top_k, top_p, min_p) is taken
from there only with do_sample=True, and do_sample itself never: sampling is asked for.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DEFAULT_NEW_TOKENS = 20  # as in transformers, when neither the call nor the checkpoint says how many

# Keys of a generation_config.json that would change the answer and are not implemented, with the values that change
# nothing.
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


@dataclass(frozen=True)
class Settings:
    """A checked request. `None` means: not applied."""

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


def resolve(
    model: Any,
    prompt_length: int,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    presence_penalty: float | None,
    repetition_penalty: float | None,
    eos_token_id: int | Sequence[int] | Tensor | None,
    pad_token_id: int | None,
    seed: int | Sequence[int] | Tensor | None,
    stop: str | Sequence[str] | None,
    stopping_criteria: Any,
    logits_processor: Any,
    speculative: Any,
) -> Settings:
    """Check the arguments, fill in the checkpoint's defaults. ValueError names the argument, its value and the way
    out."""
    if speculative is not None:
        raise ValueError(
            f"speculative={speculative!r}: speculative decoding comes with the multi-token-prediction head, which this "
            "version does not have yet; leave speculative=None"
        )
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample must be True or False, got {do_sample!r}")
    defaults = checkpoint_defaults(model)
    shaping = _shaping(do_sample, defaults, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    eos = end_tokens(model, eos_token_id)
    repetition = _number("repetition_penalty", repetition_penalty, defaults.get("repetition_penalty"))
    if repetition is not None and repetition <= 0:
        raise ValueError(f"repetition_penalty must be greater than 0 (1 is none), got {repetition}")
    presence = _number("presence_penalty", presence_penalty, defaults.get("presence_penalty"))
    return Settings(
        max_new_tokens=_new_tokens(max_new_tokens, max_length, prompt_length, defaults),
        do_sample=do_sample,
        **shaping,
        repetition_penalty=None if repetition == 1 else repetition,
        presence_penalty=presence or None,
        eos_token_ids=eos,
        pad_token_id=padding_token(model, pad_token_id, eos),
        seed=_seed(seed),
        stop=_strings(stop if stop is not None else defaults.get("stop_strings")),
        stopping_criteria=_callables("stopping_criteria", stopping_criteria),
        logits_processor=_callables("logits_processor", logits_processor),
    )


def checkpoint_defaults(model: Any) -> dict[str, Any]:
    """model.generation_config as a dict ({} without one). ValueError for keys in it that would be ignored silently."""
    found = getattr(model, "generation_config", None)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        if not callable(getattr(found, "to_dict", None)):
            raise ValueError(f"model.generation_config must be a dict, got {type(found).__name__}")
        found = found.to_dict()  # a transformers GenerationConfig
    for key, neutral in _UNSUPPORTED.items():
        value = found.get(key)
        if value is not None and value not in neutral:
            raise ValueError(
                f"the checkpoint's generation_config asks for {key}={value!r}, which is not implemented: "
                f"model.generation_config.pop({key!r}) to generate without it"
            )
    return dict(found)


def end_tokens(model: Any, given: int | Sequence[int] | Tensor | None = None) -> tuple[int, ...]:
    """The tokens that end a row: `given`, or what the checkpoint says; () for none."""
    if given is None:
        given = default(model, checkpoint_defaults(model), "eos_token_id")
    return _token_ids("eos_token_id", given)


def padding_token(model: Any, given: int | None, ends: Sequence[int]) -> int | None:
    """The token that fills rows up: `given`, or what the checkpoint says, or the first end token, as in
    transformers."""
    if given is None:
        given = default(model, checkpoint_defaults(model), "pad_token_id")
    if given is not None:
        return _token_ids("pad_token_id", given)[0]
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


def _shaping(do_sample: bool, defaults: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """temperature, top_k, top_p, min_p, each None where it changes nothing."""
    fallback = defaults if do_sample else {}
    values = {name: _number(name, value, fallback.get(name)) for name, value in given.items()}
    warmth, k, p, floor = values["temperature"], values["top_k"], values["top_p"], values["min_p"]
    if warmth is not None and warmth <= 0:
        raise ValueError(f"temperature must be greater than 0, got {warmth}: for greedy decoding leave do_sample=False")
    if k is not None and (k < 0 or k != int(k)):
        raise ValueError(f"top_k must be a whole number, at least 1 (0 or None is none), got {k}")
    if p is not None and not 0 < p <= 1:
        raise ValueError(f"top_p must lie in (0, 1] (1 is none), got {p}")
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"min_p must lie in [0, 1] (0 is none), got {floor}")
    result = {
        "temperature": None if warmth == 1 else warmth,
        "top_k": int(k) if k else None,
        "top_p": None if p == 1 else p,
        "min_p": floor or None,
    }
    unused = [f"{name}={value}" for name, value in result.items() if value is not None]
    if unused and not do_sample:
        raise ValueError(f"{', '.join(unused)}: has an effect only when sampling; pass do_sample=True, or leave it out")
    return result


def _number(name: str, given: Any, fallback: Any) -> float | None:
    value = fallback if given is None else given
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
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, numbers.Integral):
            raise ValueError(f"{name} must be a token id or several, got {value!r}")
    if name == "pad_token_id" and len(ids) != 1:
        raise ValueError(f"pad_token_id must be one token id, got {value!r}")
    return tuple(int(each) for each in ids)


def _seed(seed: Any) -> int | tuple[int, ...] | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    values: tuple[Any, ...] = tuple(seed) if isinstance(seed, (list, tuple)) else (seed,)
    for each in values:
        if isinstance(each, bool) or not isinstance(each, numbers.Integral):
            raise ValueError(f"seed must be a whole number, or one for each row, got {seed!r}")
    return tuple(int(each) for each in values) if isinstance(seed, (list, tuple)) else int(values[0])


def _strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stop:
        if not isinstance(each, str) or not each:
            raise ValueError(f"stop must be one or more non-empty strings, got {each!r}")
    return stop


def _callables(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    # transformers' LogitsProcessorList and StoppingCriteriaList are lists *and* callable: they are unpacked as lists.
    value = () if value is None else tuple(value) if isinstance(value, Iterable) else (value,)
    for each in value:
        if not callable(each):
            raise ValueError(f"{name} must hold functions (input_ids, scores) -> ..., got {type(each).__name__}")
    return value
