"""Tokens that may not be chosen at a step: their scores become -inf.

As in transformers: end tokens before the shortest allowed length, suppress_tokens, begin_suppress_tokens at the first step,
and the last token of a sequence of bad_words_ids where the tokens before it stand at the end of the row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends.values import send
from .prompt import Prompt
from .settings import Settings


class TokenMasks:
    """The masks of one call; a step calls `apply`, and `put` with its tokens. Neither reads a value on the host.

    ValueError for an id that the vocabulary does not have. `active` is False when no score can change.
    """

    def __init__(self, settings: Settings, prompt: Prompt, vocabulary: int) -> None:
        self.vocabulary, self.device = vocabulary, prompt.ids.device
        ends = self._mask("eos_token_id", (token for token in settings.eos_token_ids if 0 <= token < vocabulary))
        single = [word[0] for word in settings.bad_words_ids if len(word) == 1]
        always = self._mask("suppress_tokens", settings.suppress_tokens) | self._mask("bad_words_ids", single)
        first = self._mask("begin_suppress_tokens", settings.begin_suppress_tokens)
        least = settings.min_new_tokens
        # At how many steps a token is banned: later the host leaves the masks out.
        self.limit = max(least, 1 if settings.begin_suppress_tokens else 0)
        if settings.suppress_tokens or single:
            self.limit = settings.max_new_tokens
        # Of the first step, of the others before the shortest allowed length, and of those after it.
        self.banned = torch.stack([always | first | ends if least else always | first, always | ends, always])
        self.bounds = send(torch.tensor([1, max(least, 1)], device="cpu"), self.device)
        words = [word for word in settings.bad_words_ids if len(word) > 1]
        for word in words:
            self._mask("bad_words_ids", word)
        # Each as its tokens but the last one, and the mask of that.
        self.words = [
            (send(torch.tensor(word[:-1], device="cpu"), self.device), self._mask("bad_words_ids", word[-1:]))
            for word in words
        ]
        # The last tokens of each row without its padding, -1 before its beginning.
        keep = max((len(word) for word in words), default=1) - 1
        self.history = prompt.ids.new_full((prompt.ids.shape[0], keep), -1)
        if keep:
            width = prompt.tokens.shape[1]
            lengths = send(torch.tensor(prompt.lengths, device="cpu"), self.device)
            real = torch.arange(width, device=self.device) >= width - lengths[:, None]
            tokens = prompt.tokens.masked_fill(~real, -1)[:, -keep:]
            self.history[:, keep - tokens.shape[1] :].copy_(tokens)

    @property
    def active(self) -> bool:
        return bool(self.limit or self.words)

    def apply(self, scores: Tensor, step: Tensor, number: int) -> Tensor:
        """Scores [B, vocabulary] of new token `step` [1], counted from 0. number: the same as the host counts, from 1."""
        for prefix, last in self.words:
            after = (self.history[:, -len(prefix) :] == prefix).all(-1)
            scores = scores.masked_fill(after[:, None] & last, -torch.inf)
        if number > self.limit:
            return scores
        return scores.masked_fill(self.banned.index_select(0, (step >= self.bounds).sum(0, keepdim=True)), -torch.inf)

    def put(self, token: Tensor) -> None:
        """Adds each row's chosen token [B]."""
        if self.words:
            self.history.copy_(torch.cat([self.history[:, 1:], token[:, None]], 1))

    def _mask(self, name: str, tokens: Iterable[int]) -> Tensor:
        """[vocabulary] bool."""
        mask = torch.zeros(self.vocabulary, dtype=torch.bool, device="cpu")
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"{name} has token {token}, the vocabulary has 0..{self.vocabulary - 1}")
            mask[token] = True
        return send(mask, self.device)
