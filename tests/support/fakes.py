"""Fakes: a language model in thirty lines with the interface of the real one, and a small tokenizer.

The logits after a token are a pseudo-random function of the row's whole history, so a missing, repeated or padding token
changes all later ones; `script` sets the next token of a row.
"""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SPECIAL, ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>"]


class FakeCache:
    def __init__(self, batch_size: int, max_length: int | None = None) -> None:
        self.batch_size, self.max_length = batch_size, max_length
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.seen = 0
        self.frozen: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.rows])

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, real, held) in enumerate(zip(input_ids, mask, self.rows, strict=True)):
            if ids[real.bool()][: len(held)].tolist() != held:
                raise ValueError(f"row {row}: the cache belongs to another text")

    def freeze(self, rows: Tensor) -> None:
        self.frozen = rows

    def settle(self, lengths: list[int], seen: int) -> None:
        self.frozen = None
        assert lengths == [len(row) for row in self.rows]
        self.seen = seen

    def reorder(self, rows: Any) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]
        self.batch_size = len(self.rows)


class FakeModel(nn.Module):
    """script(history) returns the next token of the row, or None for the pseudo-random one."""

    def __init__(self, vocabulary: int = 41, script: Any = None, generation_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 1)
        self.config = SimpleNamespace(text_config=SimpleNamespace(eos_token_id=None, pad_token_id=None))
        self.generation_config = generation_config or {}
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.script = script
        self.calls: list[tuple[tuple[int, ...], Tensor | None]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def new_cache(self, batch_size: int, max_length: int | None = None) -> FakeCache:
        return FakeCache(batch_size, max_length)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int = 0,
        output_router_logits: bool | None = None,
    ) -> Any:
        self.calls.append((tuple(input_ids.shape), attention_mask))
        assert not torch.is_grad_enabled()
        rows, tokens = input_ids.shape
        assert rows == cache.batch_size
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, cache.seen :]
        assert new.shape == input_ids.shape
        if attention_mask is not None:
            assert torch.equal(attention_mask[:, : cache.seen].sum(1), cache.lengths)
        cache.seen += tokens
        if cache.frozen is not None:
            new = new.masked_fill(cache.frozen[:, None], 0)
        for row, ids, real in zip(cache.rows, input_ids.tolist(), new.tolist(), strict=True):
            row.extend(token for token, keep in zip(ids, real, strict=True) if keep)
        if cache.max_length is not None:
            assert int(cache.lengths.max()) <= cache.max_length
        assert logits_to_keep == 1
        return SimpleNamespace(logits=torch.stack([self.logits(row) for row in cache.rows])[:, None], cache=cache)

    def logits(self, history: list[int]) -> Tensor:
        vocabulary = self.embedding.num_embeddings
        seed = int.from_bytes(hashlib.sha256(repr(history).encode()).digest()[:6], "little")
        logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
        token = self.script(history) if self.script else None
        if token is not None:
            logits[token] = logits.max() + 5
        return logits

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The expected output of generate(), computed in the slow and obvious way."""
        history = list(prompt)
        for _ in range(new):
            history.append(int(self.logits(history).argmax()))
        return history[len(prompt) :]


def tokenizer_definition() -> dict[str, Any]:
    """A byte-level BPE tokenizer with the added tokens of the published ones: some special, some not."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()  # type: ignore[assignment]
    split = Regex(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    library.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    library.train_from_iterator(["In the beginning God created the heaven and the earth; think, im_end, tool"] * 3, trainer)
    library.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return json.loads(library.to_str())
