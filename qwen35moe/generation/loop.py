"""The loop: prompt in, one new token per row and step out.

    prefill -> [penalties -> the caller's processors -> temperature, top-k, top-p, min-p] -> pick -> feed it -> ...

The rules are transformers' (`generate`), so that greedy tokens are the same; where it goes wrong we do not follow:
padding counts as nothing, on either side, and each row's answer is the one it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..ops import sampling
from .prompt import Prompt
from .prompt import read as read_prompt
from .settings import Settings, end_tokens, padding_token, resolve
from .stop import Decoder, StopStrings
from .streams import Uniforms

_ROOM = 64  # columns for new tokens made at a time, at least
_CHECK_EVERY = 32  # steps between looks at the error flag when nothing else makes the loop look at the device


def generate(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    streamer: Any = None,
    cache: Any = None,
    stopping_criteria: Any = None,
    logits_processor: Any = None,
    speculative: Any = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: Decoder | None = None,
    visual_inputs: Any = None,
) -> Tensor:
    """Continue the prompts: [B, prompt + new] int64, the caller's columns first, `pad_token_id` after a row has ended.

    input_ids: [B, T] or [T], a list of ids, or a list of lists of any lengths. attention_mask: 1 for tokens, 0 for
    padding, on either side; without it every id is a token. max_new_tokens counts new tokens (default 20), max_length
    the prompt too; one of them.

    do_sample=False takes the most likely token. do_sample=True draws; temperature, top_k, top_p and min_p then
    default to the checkpoint's generation_config.json. repetition_penalty (prompt and answer) and presence_penalty
    (answer) act in both. seed: a number; row r draws from `row_seed(seed, r)` and no other row or call moves it. A
    list gives each row its own.

    A row ends with one of eos_token_id (default: the checkpoint's; [] for none), with a stop string in its new text
    (`stop=`, needs `tokenizer=`), or when a function in stopping_criteria says so: (input_ids, scores) -> bool or [B]
    bool. logits_processor: functions (input_ids, scores) -> scores, after the penalties and before the temperature.
    transformers' LogitsProcessor and StoppingCriteria objects are such functions. `scores` of the criteria is None.

    visual_inputs: what a multimodal model is to see (its own `generate` takes pixel_values and the like by name).
    streamer: an object with put(ids) and end(), as in transformers; it is given the prompt first.
    cache: from `model.new_cache`; may hold a beginning of the rows. input_ids is the whole of them all the same, what
    is cached included. Afterwards it holds everything but each row's last token.

    ValueError: empty prompt, ids outside the vocabulary, a prompt that does not fit the cache, NaN logits, an
    argument out of range; each names the values, and nothing has been computed then (NaN excepted).
    """
    run = _Run(**{name: value for name, value in locals().items() if name != "streamer"})
    if streamer is not None:
        streamer.put(run.prompt.ids.cpu())
    try:
        for token in run:
            if streamer is not None:
                streamer.put(token.cpu())
    finally:
        if streamer is not None:
            streamer.end()  # after an error too: a thread may be waiting at the other end
    return run.sequences()


def stream(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    cache: Any = None,
    stopping_criteria: Any = None,
    logits_processor: Any = None,
    speculative: Any = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: Decoder | None = None,
    visual_inputs: Any = None,
) -> Iterator[Tensor]:
    """`generate` as an iterator: each step's new ids [B], `pad_token_id` for rows that have ended.

    Arguments are checked here, at the call; the model runs as the iterator is asked. Leaving early is fine.
    """
    return iter(_Run(**locals()))


class _Run:
    """One call of generate(): the prompt, what has been produced, and who has finished."""

    def __init__(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        *,
        eos_token_id: Any,
        pad_token_id: int | None,
        cache: Any,
        stop: Any,
        tokenizer: Decoder | None,
        seed: Any,
        visual_inputs: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.visual_inputs = model, visual_inputs
        self.device = torch.device(model.device)
        self.vocabulary = _vocabulary(model)
        ends = end_tokens(model, eos_token_id)
        pad = padding_token(model, pad_token_id, ends)
        self.prompt: Prompt = read_prompt(
            input_ids, attention_mask, vocabulary=self.vocabulary, device=self.device, pad_token_id=pad
        )
        rows, width = self.prompt.ids.shape
        self.settings: Settings = resolve(model, width, eos_token_id=ends, pad_token_id=pad, stop=stop, seed=seed, **options)
        self._check_pad(rows)
        self.stops = self._stop_strings(tokenizer, rows)
        self.uniforms = Uniforms(self.settings.seed, rows, self.device) if self.settings.do_sample else None
        self.cache, self.cached = self._cache(cache, rows)

        pad = 0 if pad is None else pad  # then no row can need it
        self.ids = self.prompt.ids  # grows by doubling
        self.pad = self.ids.new_tensor(pad)
        self.width = width  # columns of self.ids that hold something
        self.eos = torch.tensor(self.settings.eos_token_ids, dtype=torch.int64, device=self.device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.finished = [False] * rows  # the same, as the host last saw it
        self.error = torch.zeros(rows, dtype=torch.bool, device=self.device)  # rows without a usable logit
        self.seen = self.generated = None
        if self.settings.repetition_penalty is not None:
            self.seen = sampling.seen_tokens(self.prompt.ids.masked_fill(~self._real(), 0), self.vocabulary, self._real())
        if self.settings.presence_penalty is not None:
            self.generated = torch.zeros(rows, self.vocabulary, dtype=torch.bool, device=self.device)

    # ------------------------------------------------------------------------------------------------------- checks

    def _check_pad(self, rows: int) -> None:
        if self.settings.pad_token_id is None and rows > 1 and self.settings.can_finish_early:
            raise ValueError("rows may end at different lengths and the checkpoint names no padding token: pass pad_token_id")

    def _stop_strings(self, tokenizer: Decoder | None, rows: int) -> StopStrings | None:
        if not self.settings.stop:
            return None
        if tokenizer is None:
            raise ValueError(f"stop={list(self.settings.stop)!r} is looked for in decoded text: pass tokenizer= too")
        return StopStrings(self.settings.stop, tokenizer, rows)

    def _cache(self, cache: Any, rows: int) -> tuple[Any, tuple[int, ...]]:
        """The cache to use and how many tokens of each row it holds; refused if the rows cannot fit."""
        if cache is None:
            return (self.model.new_cache(rows) if self.settings.max_new_tokens else None), (0,) * rows
        if cache.batch_size != rows:
            raise ValueError(f"the cache is for {cache.batch_size} rows, the prompt has {rows}")
        cached = tuple(int(each) for each in cache.lengths.tolist())
        for row, (held, given) in enumerate(zip(cached, self.prompt.lengths, strict=True)):
            if held >= given:
                raise ValueError(
                    f"row {row}: the cache already holds {held} tokens and input_ids has {given}; input_ids is the "
                    "whole row, with what is cached, and at least one token more"
                )
        longest, new = max(self.prompt.lengths), self.settings.max_new_tokens
        if cache.max_length is not None and longest + max(new - 1, 0) > cache.max_length:  # the last token is not fed
            what = "is longer than" if longest > cache.max_length else f"and {new} new tokens (the last is not stored) exceed"
            raise ValueError(
                f"the prompt of {longest} tokens {what} the cache's max_length={cache.max_length}: "
                "make a longer one, or pass new_cache(batch_size) without max_length"
            )
        return cache, cached

    # --------------------------------------------------------------------------------------------------------- steps

    def __iter__(self) -> Iterator[Tensor]:
        if not self.settings.max_new_tokens:
            return
        logits = self._prefill()
        for step in range(self.settings.max_new_tokens):
            token = self._pick(logits)
            last = step + 1 == self.settings.max_new_tokens
            over = self._look(token, last, step)
            yield token
            if over or last:
                return
            logits = self._feed(token)

    @torch.no_grad()
    def _prefill(self) -> Tensor:
        """Run what the cache does not hold yet; the logits after each row's last token [B, V]."""
        tokens, lengths = self.prompt.tokens, self.prompt.lengths
        fresh = [given - held for given, held in zip(lengths, self.cached, strict=True)]
        tokens = tokens[:, tokens.shape[1] - max(fresh) :]
        mask = None
        if min(fresh) != max(fresh):
            new = self._right(max(fresh), torch.tensor(fresh, device=self.device))
            tokens, mask = tokens.masked_fill(~new, 0), torch.cat([self._past(), new], 1).long()
        return self._forward(tokens, mask, **self._seen_first())

    def _seen_first(self) -> dict[str, Any]:
        """The pictures that the prefill is to see: those whose tokens the cache does not hold."""
        if self.visual_inputs is None:
            return {}
        tokens, width = self.prompt.tokens, self.prompt.tokens.shape[1]
        rows = [row[width - length :] for row, length in zip(tokens, self.prompt.lengths, strict=True)]
        return self.model.visual_arguments(self.visual_inputs, rows, self.cached)

    @torch.no_grad()
    def _feed(self, token: Tensor) -> Tensor:
        """Run one token of each row. Rows that have ended are padding: their memory stays as it is."""
        mask = None
        if any(self.finished):
            ended = self.done[:, None]
            token = token.masked_fill(self.done, 0)
            mask = torch.cat([self._past(), ~ended], 1).long()
        return self._forward(token[:, None], mask)

    def _forward(self, tokens: Tensor, mask: Tensor | None, **pictures: Any) -> Tensor:
        # Router logits, if the configuration asks for them, are for training: here they would be thrown away.
        options = {"cache": self.cache, "logits_to_keep": 1, "output_router_logits": False, **pictures}
        return self.model(input_ids=tokens, attention_mask=mask, **options).logits[:, -1].to(self.device)

    @torch.no_grad()
    def _pick(self, logits: Tensor) -> Tensor:
        """One token for each row, written into self.ids; rows that end with it are marked done."""
        scores = self._penalised(logits.to(torch.promote_types(torch.float32, logits.dtype)))
        if self.uniforms is None:
            token, best = sampling.greedy(scores), scores.amax(-1)  # NaN if any score is
            self.error |= ~(best > -torch.inf) & ~self.done
        else:
            scores, ids = self._filtered(scores)
            best = scores.amax(-1)
            self.error |= ~((best > -torch.inf) & (best < torch.inf)) & ~self.done
            token = sampling.sample(scores, self.uniforms.next())
            token = token if ids is None else ids.gather(1, token[:, None])[:, 0]
        token = torch.where(self.done, self.pad, token)
        if self.width == self.ids.shape[1]:
            self.ids = functional.pad(self.ids, (0, max(self.width, _ROOM)))
        self.ids[:, self.width] = token
        self.width += 1
        for marks in (self.seen, self.generated):
            if marks is not None:
                marks.scatter_(1, token.masked_fill(self.done, 0)[:, None], True)
        if self.eos.numel():
            self.done = self.done | torch.isin(token, self.eos)
        for criterion in self.settings.stopping_criteria:
            self.done = self.done | torch.as_tensor(criterion(self.ids[:, : self.width], None), device=self.device)
        return token

    def _penalised(self, scores: Tensor) -> Tensor:
        """What greedy decoding picks from [B, V]: the penalties, then the caller's processors."""
        s = self.settings
        if s.repetition_penalty is not None and self.seen is not None:
            scores = sampling.repetition_penalty(scores, self.seen, s.repetition_penalty)
        if s.presence_penalty is not None and self.generated is not None:
            scores = sampling.presence_penalty(scores, self.generated, s.presence_penalty)
        for processor in s.logits_processor:
            scores = processor(self.ids[:, : self.width], scores)
        return scores

    def _filtered(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is drawn from: scores [B, V]; or scores [B, n] of some tokens and their ids [B, n]."""
        s, ids = self.settings, None
        if s.temperature is not None:
            scores = sampling.temperature(scores, s.temperature)
        if s.top_k is not None:
            if scores.device.type == "cpu":
                scores, ids = sampling.shortlist(scores, s.top_k)
            else:
                scores = sampling.top_k(scores, s.top_k)
        if s.top_p is not None:
            scores = sampling.top_p(scores, s.top_p)
        if s.min_p is not None:
            scores = sampling.min_p(scores, s.min_p)
        return scores, ids

    def _look(self, token: Tensor, last: bool, step: int) -> bool:
        """Bring what the host must know from the device, in one transfer; True when every row has ended."""
        if not (self.settings.can_finish_early or last or step % _CHECK_EVERY == 0):
            return False
        tokens, done, error = torch.stack([token, self.done.long(), self.error.long()]).tolist()
        if any(error):
            rows = [row for row, wrong in enumerate(error) if wrong]
            raise ValueError(
                f"no token can be chosen for rows {rows} (new token {step + 1}, or shortly before): the logits hold "
                "NaN, +inf, or nothing but -inf; look at the model's weights, or at the logits_processor"
            )
        if self.stops is not None:
            for row, each in enumerate(tokens):
                if not self.finished[row] and self.stops.put(row, each) and not done[row]:
                    done[row] = 1
                    self.done[row] = True
        self.finished = [bool(each) for each in done]
        return all(self.finished)

    # --------------------------------------------------------------------------------------------------------- small

    def sequences(self) -> Tensor:
        """Everything so far, [B, prompt + new]."""
        return self.ids[:, : self.width].clone()

    def _real(self) -> Tensor:
        mask = self.prompt.mask
        return torch.ones_like(self.prompt.ids, dtype=torch.bool) if mask is None else mask != 0

    def _past(self) -> Tensor:
        """What the cache holds, as the past part of a mask [B, positions seen]."""
        return self._right(self.cache.seen, self.cache.lengths.to(self.device))

    def _right(self, width: int, lengths: Tensor) -> Tensor:
        """[B, width] bool, True in the last lengths[r] columns of row r."""
        return torch.arange(width, device=self.device) >= width - lengths[:, None]


def _vocabulary(model: Any) -> int:
    """How many tokens the model knows: the rows of its embedding, padding rows included."""
    return int(model.get_input_embeddings().weight.shape[0])
