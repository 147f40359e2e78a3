"""The arguments of one call of generate() or stream(), checked once into `Settings`.

An argument that is left out takes its default from generation_config=, then from the checkpoint (`defaults`).
temperature, top_k, top_p and min_p are taken from there only with do_sample=True, and do_sample itself never from the
checkpoint.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compat import short
from ..config import GenerationConfig
from ..models.generation_inputs import StreamInputs
from ..ops.sampling import check_range
from .defaults import settings_of, token_ids

DEFAULT_NEW_TOKENS = 20  # as in transformers, when neither the call nor the checkpoint has a number
_NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}  # the values without effect


@dataclass(frozen=True)
class Settings:
    """The checked settings of one call. None: not applied."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    bad_words_ids: tuple[tuple[int, ...], ...]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    seed: int | tuple[int, ...] | None
    n: int
    cache: str | None  # "static" of a generation_config
    capture: bool
    stop: tuple[str, ...]
    stopping_criteria: tuple[Callable[..., Any], ...]
    logits_processor: tuple[Callable[..., Any], ...]

    @property
    def can_finish_early(self) -> bool:
        return bool(self.eos_token_ids or self.stop or self.stopping_criteria)


def resolve(model: Any, inputs: StreamInputs, prompt_length: int, ends: tuple[int, ...], pad: int | None) -> Settings:
    """Checks the arguments and fills in the defaults. ValueError names the argument, its value and what to do. ends and
    pad: from `end_tokens` and `padding_token`."""
    if inputs.speculative is not None:
        raise ValueError(
            f"speculative={short(inputs.speculative)}: speculative decoding comes with the multi-token-prediction head, which "
            "this version does not have yet; leave speculative=None"
        )
    defaults = settings_of(model, inputs.generation_config)
    do_sample = _do_sample(inputs)
    repetition = _number("repetition_penalty", inputs.repetition_penalty, defaults.get("repetition_penalty"))
    if repetition is not None:
        check_range("repetition_penalty", repetition)
    presence = _number("presence_penalty", inputs.presence_penalty, defaults.get("presence_penalty"))
    new = _new_tokens(inputs.max_new_tokens, inputs.max_length, prompt_length, inputs.generation_config, defaults)
    stop = inputs.stop if inputs.stop is not None else defaults.get("stop")
    suppressed, at_first = (
        token_ids(name, _either(getattr(inputs, name), defaults.get(name)))
        for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    return Settings(
        max_new_tokens=new,
        min_new_tokens=_least(inputs, prompt_length, new, defaults),
        do_sample=do_sample,
        **_shaping(inputs, do_sample, defaults),
        repetition_penalty=None if repetition == 1 else repetition,
        presence_penalty=presence or None,
        suppress_tokens=suppressed,
        begin_suppress_tokens=at_first,
        bad_words_ids=_sequences(_either(inputs.bad_words_ids, defaults.get("bad_words_ids")), ends),
        eos_token_ids=ends,
        pad_token_id=pad,
        seed=_seed(inputs.seed, do_sample),
        n=_copies(_either(inputs.n, defaults.get("n")), do_sample),
        cache=defaults.get("cache"),
        capture=_capture(_either(inputs.capture, defaults.get("capture"))),
        stop=_strings(stop),
        stopping_criteria=_callables("stopping_criteria", inputs.stopping_criteria),
        logits_processor=_callables("logits_processor", inputs.logits_processor),
    )


def _capture(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"capture must be True or False, got {short(value)}")
    return value is not False


def _either(argument: Any, default: Any) -> Any:
    return default if argument is None else argument


def _do_sample(inputs: StreamInputs) -> bool:
    """The argument, else that of generation_config=, else False: the checkpoint's does not count."""
    value = inputs.do_sample
    if value is None and inputs.generation_config is not None:
        override = GenerationConfig.of(inputs.generation_config)
        value = override.do_sample
        unused = [name for name in _NEUTRAL if override.get(name) not in (None, _NEUTRAL[name])]
        if value is None and unused:
            raise ValueError(
                f"generation_config has {unused[0]}={short(override[unused[0]])}, which has an effect only when sampling, and "
                "no do_sample: set do_sample=True or False in it"
            )
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"do_sample must be True or False, got {short(value)}")
    return value


def _least(inputs: StreamInputs, prompt: int, new: int, defaults: Mapping[str, Any]) -> int:
    """The number of new tokens before which no row ends."""
    values = []
    for name, less in (("min_new_tokens", 0), ("min_length", prompt)):
        value = _either(getattr(inputs, name), defaults.get(name))
        if value is None:
            continue
        _whole(name, value, lowest=0)
        if value - less > new:
            raise ValueError(f"{name}={value} is more than the {less + new} tokens that the call allows: raise max_new_tokens")
        values.append(int(value) - less)
    return max([0, *values])


def _copies(n: Any, do_sample: bool) -> int:
    if n is None:
        return 1
    _whole("n", n, lowest=1)
    if n > 1 and not do_sample:
        raise ValueError(f"n={n}: greedy decoding gives {n} times the same answer; pass do_sample=True")
    return int(n)


def _sequences(value: Any, ends: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """bad_words_ids, without the end tokens, as in transformers."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"bad_words_ids must be a list of lists of token ids, got {short(value)}")
    words = []
    for word in value:
        if isinstance(word, numbers.Integral) or isinstance(word, str):
            raise ValueError(f"bad_words_ids must be a list of lists of token ids, got {short(value)}")
        words.append(token_ids("bad_words_ids", word))
    if () in words:
        raise ValueError("bad_words_ids has an empty sequence: each needs at least one token id")
    return tuple(word for word in words if not (len(word) == 1 and word[0] in ends))


def _whole(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {short(value)}")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")


def _new_tokens(
    max_new_tokens: int | None, max_length: int | None, prompt: int, override: Any, defaults: Mapping[str, Any]
) -> int:
    """How many tokens may be new. Of generation_config= and of the checkpoint's, max_new_tokens comes before max_length."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(f"{max_new_tokens=} and {max_length=} both limit the length: pass one of them")
    for settings in ({} if override is None else GenerationConfig.of(override), defaults):
        if max_new_tokens is None and max_length is None:
            max_new_tokens = settings.get("max_new_tokens")
            max_length = settings.get("max_length") if max_new_tokens is None else None
    if max_new_tokens is None and max_length is None:
        return DEFAULT_NEW_TOKENS
    name, value = ("max_length", max_length) if max_new_tokens is None else ("max_new_tokens", max_new_tokens)
    assert value is not None
    _whole(name, value, lowest=0)
    if name == "max_new_tokens":
        return int(value)
    if value < prompt:
        raise ValueError(
            f"max_length={value} is less than the prompt's {prompt} tokens: it counts the prompt too; "
            "raise it or pass max_new_tokens"
        )
    return int(value) - prompt


def _shaping(inputs: StreamInputs, do_sample: bool, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """temperature, top_k, top_p, min_p, each None where it changes nothing."""
    fallback = defaults if do_sample else {}
    values: dict[str, Any] = {}
    for name, no_effect in _NEUTRAL.items():
        value = _number(name, getattr(inputs, name), fallback.get(name))
        if value == no_effect:
            value = None
        if value is not None:
            check_range(name, value)
        values[name] = int(value) if value is not None and name == "top_k" else value
    unused = [f"{name}={value}" for name, value in values.items() if value is not None]
    if unused and not do_sample:
        raise ValueError(f"{', '.join(unused)}: has an effect only when sampling; pass do_sample=True, or leave it out")
    return values


def _number(name: str, argument: Any, fallback: Any) -> float | None:
    """The argument, else the fallback, as a finite number."""
    value = fallback if argument is None else argument
    if value is None:
        return None
    try:
        finite = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise ValueError(f"{name} must be a finite number, got {short(value)}")
    return float(value)


def _seed(seed: Any, do_sample: bool) -> int | tuple[int, ...] | None:
    if seed is None:
        return None
    if not do_sample:
        raise ValueError(f"seed={short(seed)}: has an effect only when sampling; pass do_sample=True, or leave it out")
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    values: tuple[Any, ...] = tuple(seed) if isinstance(seed, (list, tuple)) else (seed,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"seed must be a whole number, or one for each row, got {short(seed)}")
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seed must have at most 64 bits, got {short(value)}")
    return tuple(int(value) for value in values) if isinstance(seed, (list, tuple)) else int(values[0])


def _strings(stop: Any) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, Iterable):
        raise ValueError(f"stop must be one or more non-empty strings, got {short(stop)}")
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be one or more non-empty strings, got {short(string)}")
    return stop


def _callables(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    # transformers' LogitsProcessorList and StoppingCriteriaList are lists *and* callable: they are unpacked as lists.
    value = () if value is None else tuple(value) if isinstance(value, Iterable) else (value,)
    for function in value:
        if not callable(function):
            raise ValueError(f"{name} must hold functions (input_ids, scores) -> ..., got {type(function).__name__}")
    return value
