"""`DecodingState`: everything between the logits of one step and its tokens, in tensors of fixed size on the model's device.

    logits -> penalties -> masks -> the caller's processors -> temperature, top-k, top-p, min-p -> token -> ids, done, failed

`pick` reads no value on the host and writes in place, so that a GPU runs ahead of the host and a CUDA graph can hold the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.values import send
from ..cache.modes import ordinary_tensors
from ..ops import sampling
from .callbacks import scores_of, verdicts
from .masks import TokenMasks
from .prompt import Prompt
from .settings import Settings
from .streams import Uniforms

_ROOM = 16384  # columns for new tokens allocated at a time, at most


class DecodingState:
    """The rows' tokens so far and which of them have ended. B: rows, V: vocabulary.

    ids [B, columns]: the prompt as the caller padded it, then the new tokens; `width` columns are in use. token [B]: the last
    step's, and input [B, 1] the same for the model, 0 in rows that have ended. done [B]: rows that have ended. failed [B]: the
    first step at which a row had no usable logit, -1 for none. report [4, B] int64: token, done, failed and input after the
    last step, for one copy to the host. step [1]: the number of new tokens. scores, logits: lists of every step's [B, V] where
    they are to be returned, else None.

    Before each `pick` the host calls `reserve`, which is no part of a captured graph.
    """

    def __init__(self, settings: Settings, prompt: Prompt, vocabulary: int, device: torch.device) -> None:
        with ordinary_tensors(), torch.no_grad():  # an iterator may be read in another mode than it was made in
            self._allocate(settings, prompt, vocabulary, device)

    def _allocate(self, settings: Settings, prompt: Prompt, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        rows, self.width = prompt.ids.shape
        self.first_column = self.width
        self.masks = TokenMasks(settings, prompt, vocabulary)
        self.uniforms = Uniforms(settings.seed, rows, device) if settings.do_sample else None
        self.ids = prompt.ids.new_zeros(rows, self.width + min(settings.max_new_tokens, _ROOM))
        self.ids[:, : self.width].copy_(prompt.ids)
        pad = settings.pad_token_id
        self.pad = torch.full((), 0 if pad is None else pad, device=device)  # without one no row can need it
        self.eos = send(torch.tensor(settings.eos_token_ids, dtype=torch.int64, device="cpu"), device)
        self._counters = send(torch.tensor([0, self.width], device="cpu"), device)
        self.step, self._column = self._counters[:1], self._counters[1:]
        self.report = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.token, self.input = self.report[0], self.report[3][:, None]
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.failed = torch.full((rows,), -1, device=device)
        self.scores: list[Tensor] | None = None
        self.logits: list[Tensor] | None = None
        self.seen = self.generated = None
        if settings.repetition_penalty is not None:
            real = torch.ones_like(prompt.ids, dtype=torch.bool) if prompt.mask is None else prompt.mask != 0
            self.seen = sampling.seen_tokens(prompt.ids.masked_fill(~real, 0), vocabulary, real)
        if settings.presence_penalty is not None:
            self.generated = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)

    @property
    def capturable(self) -> bool:
        """Whether `pick` runs no function of the caller and keeps nothing of a step but what it writes in place."""
        callbacks = self.settings.logits_processor or self.settings.stopping_criteria
        return not callbacks and self.scores is None and self.logits is None

    def reserve(self) -> bool:
        """Makes room for one more token, and draws random numbers where they are used up. True: `ids` was replaced, so that
        a captured graph would write into the old tensor."""
        if self.uniforms is not None:
            self.uniforms.reserve()
        self.width += 1
        if self.width <= self.ids.shape[1]:
            return False
        with ordinary_tensors(), torch.no_grad():
            self.ids = torch.cat([self.ids, self.ids.new_zeros(self.ids.shape[0], self.ids.shape[1] + _ROOM)], 1)
        return True

    @torch.no_grad()
    def pick(self, logits: Tensor) -> None:
        """One token for each row from logits [B, V]; rows that end with it are marked done. Rows that have ended get the
        padding token."""
        wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
        if self.logits is not None:
            self.logits.append(wide.clone())  # a processor may write into its scores
        scores, ids = self._penalised(wide), None
        if self.uniforms is None:
            token, best = sampling.greedy(scores), scores.amax(-1)  # NaN if any score is
            usable = best > -torch.inf
        else:
            scores, ids = self._filtered(scores)
            best = scores.amax(-1)
            usable = (best > -torch.inf) & (best < torch.inf)
            token = sampling.sample(scores, self.uniforms.take())
            token = token if ids is None else ids.gather(1, token[:, None])[:, 0]
        if self.scores is not None:
            self.scores.append(scores if ids is None else torch.full_like(wide, -torch.inf).scatter(1, ids, scores.to(wide)))
        fails = ~(usable | self.done) & (self.failed < 0)
        self.failed.copy_(torch.where(fails, self.step, self.failed))
        self._put(torch.where(self.done, self.pad, token))

    def _put(self, token: Tensor) -> None:
        """Appends each row's token [B]; which rows end with it."""
        self.ids.index_copy_(1, self._column, token[:, None])
        self._counters += 1
        for marks in (self.seen, self.generated):
            if marks is not None:
                marks.scatter_(1, token.masked_fill(self.done, 0)[:, None], True)
        self.masks.put(token)
        if self.settings.eos_token_ids:
            self.done |= (token[:, None] == self.eos).any(-1)
        so_far = None if self.scores is None else tuple(self.scores)
        for criterion in self.settings.stopping_criteria:
            self.done |= verdicts(criterion, self.ids[:, : self.width], so_far, self.ids.shape[0])
        torch.stack([token, self.done.long(), self.failed, token.masked_fill(self.done, 0)], out=self.report)

    def _penalised(self, scores: Tensor) -> Tensor:
        """Scores [B, V] after the penalties, the token masks and the caller's processors: greedy decoding picks from them."""
        s = self.settings
        if s.repetition_penalty is not None and self.seen is not None:
            scores = sampling.repetition_penalty(scores, self.seen, s.repetition_penalty)
        if s.presence_penalty is not None and self.generated is not None:
            scores = sampling.presence_penalty(scores, self.generated, s.presence_penalty)
        if self.masks.active:
            scores = self.masks.apply(scores, self.step, self.width - self.first_column)
        for processor in s.logits_processor:
            scores = scores_of(processor, self.ids[:, : self.width - 1], scores)
        return scores

    def _filtered(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores to sample from: [B, V] and None, or [B, shortlist] of some tokens and the ids of these."""
        s, ids = self.settings, None
        if s.temperature is not None:
            scores = sampling.temperature(scores, s.temperature)
        top_p = s.top_p
        if s.top_k is not None:
            if scores.is_cpu:
                scores, ids = sampling.shortlist(scores, s.top_k)
            elif top_p is not None:
                scores, top_p = sampling.top_k_top_p(scores, s.top_k, top_p), None
            else:
                scores = sampling.top_k(scores, s.top_k)
        if top_p is not None:
            scores = sampling.top_p(scores, top_p)
        if s.min_p is not None:
            scores = sampling.min_p(scores, s.min_p)
        return scores, ids

    def column(self, step: int) -> Tensor:
        """The tokens [B] of one step."""
        return self.ids[:, self.first_column + step].clone()

    def end_row(self, row: int, step: int) -> None:
        """A row has ended with the token of `step`: what it has got since becomes padding."""
        self.done[row].fill_(True)
        self.ids[row, self.first_column + step + 1 : self.width].copy_(self.pad)

    def cut(self, steps: int) -> None:
        """Keeps the first `steps` new tokens, and the scores and logits of these."""
        self.width = self.first_column + steps
        for values in (self.scores, self.logits):
            if values is not None:
                del values[steps:]

    def sequences(self) -> Tensor:
        """Everything so far, [B, prompt + new]."""
        return self.ids[:, : self.width].clone()
