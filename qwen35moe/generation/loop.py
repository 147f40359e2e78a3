"""The loop: prompt in, one new token per row and step out.

    prefill -> [penalties -> the caller's processors -> temperature, top-k, top-p, min-p] -> pick -> feed it -> ...

The rules are those of transformers' `generate`, so that greedy tokens are the same. Unlike there, padding on either side
changes nothing: each row's answer is the one it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..models.arguments import takes
from ..ops import sampling
from .prompt import Prompt
from .prompt import read as read_prompt
from .settings import GenerateInputs, Settings, StreamInputs, end_tokens, padding_token, resolve
from .stop import Decoder, StopStrings
from .streams import Uniforms

_MIN_COLUMNS = 64  # columns for new tokens allocated at a time, at least
_CHECK_EVERY = 32  # steps between reads of the error flag when nothing else synchronises with the device


@takes(GenerateInputs)
def generate(model: Any, inputs: GenerateInputs) -> Tensor:
    """Continues the prompts: [B, prompt + new] int64, the caller's columns first, `pad_token_id` after a row has ended.

    ValueError: empty prompt, ids outside the vocabulary, a prompt that does not fit the cache, NaN logits, an
    argument out of range; each names the values. All but NaN are raised before anything is computed.
    """
    run, streamer = _Run(model, inputs), inputs.streamer
    if streamer is not None:
        streamer.put(run.prompt.ids.cpu())
    try:
        for token in run:
            if streamer is not None:
                streamer.put(token.cpu())
    finally:
        if streamer is not None:
            streamer.end()  # after an error too: another thread may be waiting for the end
    return run.sequences()


@takes(StreamInputs)
def stream(model: Any, inputs: StreamInputs) -> Iterator[Tensor]:
    """`generate` as an iterator: each step's new ids [B], `pad_token_id` for rows that have ended.

    Arguments are checked by this call; the model runs while the iterator is read, which may stop early.
    """
    return iter(_Run(model, inputs))


class _Run:
    """One call of generate(): the prompt, the tokens so far, and which rows have ended."""

    def __init__(self, model: Any, inputs: StreamInputs) -> None:
        self.model, self.visual_inputs = model, inputs.visual_inputs
        self.device = torch.device(model.device)
        self.vocabulary = _vocabulary(model)
        ends = end_tokens(model, inputs.eos_token_id)
        pad = padding_token(model, inputs.pad_token_id, ends)
        self.prompt: Prompt = read_prompt(
            inputs.input_ids, inputs.attention_mask, vocabulary=self.vocabulary, device=self.device, pad_token_id=pad
        )
        rows, width = self.prompt.ids.shape
        self.settings: Settings = resolve(model, inputs, width, ends, pad)
        self._check_pad(rows)
        self.stops = self._stop_strings(inputs.tokenizer, rows)
        self.uniforms = Uniforms(self.settings.seed, rows, self.device) if self.settings.do_sample else None
        self.cache, self.cached = self._cache(inputs.cache, rows)

        pad = 0 if pad is None else pad  # then no row can need it
        self.ids = self.prompt.ids  # grows by doubling
        self.pad = self.ids.new_tensor(pad)
        self.width = width  # columns of self.ids in use
        self.eos = torch.tensor(self.settings.eos_token_ids, dtype=torch.int64, device=self.device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.finished = [False] * rows  # `done` when the host last read it
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
            raise ValueError(f"stop={list(self.settings.stop)!r} is searched in decoded text: pass tokenizer= too")
        return StopStrings(self.settings.stop, tokenizer, rows)

    def _cache(self, cache: Any, rows: int) -> tuple[Any, tuple[int, ...]]:
        """The cache to use and how many tokens of each row it holds; refused if the rows cannot fit."""
        if cache is None:
            return (self.model.new_cache(rows) if self.settings.max_new_tokens else None), (0,) * rows
        if cache.batch_size != rows:
            raise ValueError(f"the cache is for {cache.batch_size} rows, the prompt has {rows}")
        cached = tuple(int(length) for length in cache.lengths.tolist())
        for row, (held, length) in enumerate(zip(cached, self.prompt.lengths, strict=True)):
            if held >= length:
                raise ValueError(
                    f"row {row}: the cache already holds {held} tokens and input_ids has {length}; input_ids is the "
                    "whole row, cached tokens included, and at least one token more"
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
            all_done = self._read_flags(token, last, step)
            yield token
            if all_done or last:
                return
            logits = self._feed(token)

    @torch.no_grad()
    def _prefill(self) -> Tensor:
        """Runs the tokens that the cache does not hold; returns the logits after each row's last token [B, vocabulary]."""
        tokens, lengths = self.prompt.tokens, self.prompt.lengths
        counts = [length - held for length, held in zip(lengths, self.cached, strict=True)]
        tokens = tokens[:, tokens.shape[1] - max(counts) :]
        mask = None
        if min(counts) != max(counts):
            new = self._right(max(counts), torch.tensor(counts, device=self.device))
            tokens, mask = tokens.masked_fill(~new, 0), torch.cat([self._past(), new], 1).long()
        return self._forward(tokens, mask, **self._visual_arguments())

    def _visual_arguments(self) -> dict[str, Any]:
        """The images and videos of the prefill: those whose tokens the cache does not hold."""
        if self.visual_inputs is None:
            return {}
        tokens, width = self.prompt.tokens, self.prompt.tokens.shape[1]
        rows = [row[width - length :] for row, length in zip(tokens, self.prompt.lengths, strict=True)]
        return self.model.visual_arguments(self.visual_inputs, rows, self.cached)

    @torch.no_grad()
    def _feed(self, token: Tensor) -> Tensor:
        """Runs one token of each row. Rows that have ended are padding: their state in the cache stays as it is."""
        mask = None
        if any(self.finished):
            ended = self.done[:, None]
            token = token.masked_fill(self.done, 0)
            mask = torch.cat([self._past(), ~ended], 1).long()
        return self._forward(token[:, None], mask)

    def _forward(self, tokens: Tensor, mask: Tensor | None, **visual: Any) -> Tensor:
        # Router logits, where the configuration has them on, are for training and not needed here.
        options = {"cache": self.cache, "logits_to_keep": 1, "output_router_logits": False, **visual}
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
            self.ids = functional.pad(self.ids, (0, max(self.width, _MIN_COLUMNS)))
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
        """Scores [B, vocabulary] after the penalties and the caller's processors: greedy decoding picks from them."""
        s = self.settings
        if s.repetition_penalty is not None and self.seen is not None:
            scores = sampling.repetition_penalty(scores, self.seen, s.repetition_penalty)
        if s.presence_penalty is not None and self.generated is not None:
            scores = sampling.presence_penalty(scores, self.generated, s.presence_penalty)
        for processor in s.logits_processor:
            scores = processor(self.ids[:, : self.width], scores)
        return scores

    def _filtered(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores to sample from: [B, vocabulary] and None, or [B, shortlist] of some tokens and the ids of these."""
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

    def _read_flags(self, token: Tensor, last: bool, step: int) -> bool:
        """Copies the step's tokens and flags from the device, in one transfer; True when every row has ended."""
        if not (self.settings.can_finish_early or last or step % _CHECK_EVERY == 0):
            return False
        tokens, done, error = torch.stack([token, self.done.long(), self.error.long()]).tolist()
        if any(error):
            rows = [row for row, flag in enumerate(error) if flag]
            raise ValueError(
                f"no token can be chosen for rows {rows} (new token {step + 1}, or shortly before): the logits hold "
                "NaN, +inf, or nothing but -inf; look at the model's weights, or at the logits_processor"
            )
        if self.stops is not None:
            for row, new in enumerate(tokens):
                if not self.finished[row] and self.stops.put(row, new) and not done[row]:
                    done[row] = 1
                    self.done[row] = True
        self.finished = [bool(flag) for flag in done]
        return all(self.finished)

    # -------------------------------------------------------------------------------------------------------- helpers

    def sequences(self) -> Tensor:
        """Everything so far, [B, prompt + new]."""
        return self.ids[:, : self.width].clone()

    def _real(self) -> Tensor:
        mask = self.prompt.mask
        return torch.ones_like(self.prompt.ids, dtype=torch.bool) if mask is None else mask != 0

    def _past(self) -> Tensor:
        """The mask [B, positions seen] of the tokens in the cache."""
        return self._right(self.cache.seen, self.cache.lengths.to(self.device))

    def _right(self, width: int, lengths: Tensor) -> Tensor:
        """[B, width] bool, True in the last lengths[r] columns of row r."""
        return torch.arange(width, device=self.device) >= width - lengths[:, None]


def _vocabulary(model: Any) -> int:
    """The rows of the model's embedding, padding rows included."""
    return int(model.get_input_embeddings().weight.shape[0])
