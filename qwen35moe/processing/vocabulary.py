"""Single tokens of a tokenizer under transformers' names: convert_tokens_to_ids, eos_token, all_special_ids, ..."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..compat import short


class Vocabulary:
    """The part of `Tokenizer` that deals with single tokens.

    vocab_size: the number of tokens, including added ones (an embedding may have more rows, as padding).
    added_tokens: the control tokens and their ids.
    special_tokens: those of them that decode(skip_special_tokens=True) leaves out.
    named_tokens: eos_token, pad_token, image_token, ... of tokenizer_config.json. `tokenizer.image_token` and
        `tokenizer.image_token_id` read them; a token without a name is None for bos, unk, sep, cls and mask.
    eos_token_ids, pad_token_id: from generation_config.json, else config.json, else tokenizer_config.json. They can be set,
        as can eos_token_id, eos_token and pad_token.
    """

    _tokenizer: Any
    added_tokens: dict[str, int]
    special_tokens: frozenset[str]
    named_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    vocab_size: int

    def __len__(self) -> int:
        return self.vocab_size

    def __bool__(self) -> bool:
        return True

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, spelled exactly as in the vocabulary ("<|im_end|>"), or None."""
        return self._tokenizer.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """`token_to_id` of a token or of each token of a list."""
        return self.token_to_id(tokens) if isinstance(tokens, str) else [self.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int] | Tensor, skip_special_tokens: bool = False) -> Any:
        """The token, as the vocabulary spells it ("Ġthe"), of an id or of each id of a row; None outside the vocabulary."""
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        if not isinstance(ids, Iterable):
            return self._token(int(ids))
        row = [int(number) for number in ids]
        hidden = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._token(number) for number in row if number not in hidden]

    def _token(self, number: int) -> str | None:
        if number < 0:
            raise ValueError(f"token ids must not be negative, got {number}")
        return self._tokenizer.id_to_token(number) if number < 1 << 32 else None

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens as the vocabulary spells them."""
        return self._tokenizer.decoder.decode(list(tokens))

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)

    def get_added_vocab(self) -> dict[str, int]:
        """`added_tokens`, under transformers' name."""
        return dict(self.added_tokens)

    added_tokens_encoder = property(get_added_vocab)

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` underneath. It marks all added tokens as special."""
        return self._tokenizer

    # ------------------------------------------------------------------------------------------------- tokens with a role

    @property
    def eos_token_id(self) -> int | None:
        """The first of eos_token_ids."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @eos_token_id.setter
    def eos_token_id(self, value: int | None) -> None:
        self.eos_token_ids = () if value is None else (int(value),)

    @property
    def eos_token(self) -> str | None:
        """The text of eos_token_id."""
        return None if self.eos_token_id is None else self._token(self.eos_token_id)

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self.eos_token_id = self._id("eos_token", token)

    @property
    def pad_token(self) -> str | None:
        """The text of pad_token_id."""
        return None if self.pad_token_id is None else self._token(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self.pad_token_id = self._id("pad_token", token)

    def _id(self, name: str, token: str | None) -> int | None:
        number = None if token is None else self.token_to_id(token)
        if token is not None and number is None:
            some = ", ".join(sorted(self.added_tokens)[:3])
            raise ValueError(f"{name} = {short(token)} is not in the vocabulary: give one of its tokens, such as {some}")
        return number

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The named tokens as they are now: {"eos_token": ..., "pad_token": ..., ...}."""
        named: dict[str, str | None] = {**self.named_tokens, "eos_token": self.eos_token, "pad_token": self.pad_token}
        return {name: token for name, token in named.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that tokenizer.json marks as special, in the order of their ids."""
        return sorted(self.special_tokens, key=self.added_tokens.__getitem__)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return sorted(self.added_tokens[token] for token in self.special_tokens)

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens without eos_token and pad_token."""
        return [token for token in self.all_special_tokens if token not in (self.eos_token, self.pad_token)]

    def __getattr__(self, name: str) -> Any:
        if name.endswith(("_token", "_token_id")) and "named_tokens" in self.__dict__:
            kind = name.removesuffix("_id")
            if kind in self.named_tokens or kind in ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token"):
                token = self.named_tokens.get(kind)
                return token if name == kind or token is None else self.token_to_id(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """eos_token, pad_token, image_token, ... of tokenizer_config.json; templates may read them."""
    extra = settings.get("extra_special_tokens")
    values = {**settings, **(extra if isinstance(extra, dict) else {})}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
