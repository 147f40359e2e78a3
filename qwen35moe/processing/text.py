"""Text <-> token ids: a thin layer over the `tokenizers` library and a checkpoint's tokenizer.json. Needs the extra [text].

User text stays text: a prompt that contains "<|im_end|>" or "<think>" must not be able to end a turn, so such strings become
control tokens only with `special=True`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json
from .optional import require


def _library() -> Any:
    return require("tokenizers", "reading tokenizer.json needs the package `tokenizers`", "text")


class Tokenizer:
    """A checkpoint's tokenizer.

        tokenizer = Tokenizer.from_pretrained(folder)
        ids = tokenizer.encode("In the beginning")               # a list of ids
        inputs = tokenizer(["one", "two and more"])              # {"input_ids", "attention_mask"}: [2, T], padded on the left
        text = tokenizer.decode(ids)

    vocab_size: the number of tokens, including added ones (an embedding may have more rows, as padding).
    added_tokens: the control tokens and their ids.
    special_tokens: those of them that decode(skip_special_tokens=True) leaves out.
    stripping_tokens: those of them that also match the blanks beside them.
    eos_token_ids, pad_token_id: from generation_config.json, else config.json, else tokenizer_config.json.
    """

    def __init__(self, definition: str, *, eos_token_ids: Sequence[int] = (), pad_token_id: int | None = None) -> None:
        """definition: the content of a tokenizer.json."""
        library = _library()
        try:
            fields = json.loads(definition)
            added = fields.get("added_tokens") or []
            self._special = frozenset(int(token["id"]) for token in added if token.get("special"))
            self._added = frozenset(int(token["id"]) for token in added)
            self.added_tokens: dict[str, int] = {token["content"]: int(token["id"]) for token in added}
            self.special_tokens = frozenset(token["content"] for token in added if token.get("special"))
            # Code that splits a text at its control tokens cannot reproduce these.
            self.stripping_tokens = frozenset(
                token["content"] for token in added if any(token.get(key) for key in ("lstrip", "rstrip", "single_word"))
            )
            # The library can encode special tokens as text, but not added tokens such as <think> that are not special.
            # So all are marked special for the library; decode() uses the original marks, kept above.
            for token in added:
                token["special"] = True
            fields["truncation"] = fields["padding"] = None  # never truncate or pad a caller's ids silently
            self._tokenizer = library.Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"invalid tokenizer.json: {error}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder. ValueError if it has no tokenizer.json."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        _library()  # a missing package is reported before a bad file
        try:
            tokenizer = cls(file.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {error}") from error
        settings = [read_json(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
        tokenizer.eos_token_ids = tokenizer._token_ids("eos", settings)
        tokenizer.pad_token_id = next(iter(tokenizer._token_ids("pad", settings)), None)
        return tokenizer

    def _token_ids(self, kind: str, settings: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The ids of the "eos" or "pad" token from the first file that has any."""
        for values in settings:
            for section in (values, values.get("text_config") or {}):
                ids = section.get(f"{kind}_token_id")
                if ids is not None:
                    return tuple(ids) if isinstance(ids, list) else (ids,)
                name = section.get(f"{kind}_token")
                name = name.get("content") if isinstance(name, dict) else name
                if isinstance(name, str) and (number := self._tokenizer.token_to_id(name)) is not None:
                    return (number,)
        return ()

    @property
    def eos_token_id(self) -> int | None:
        """The first of eos_token_ids."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def __len__(self) -> int:
        return self.vocab_size

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, spelled exactly as in the vocabulary ("<|im_end|>"), or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of a text, without added start or end tokens.

        special: encode the names of control tokens as these tokens. False for text that users write.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        self._tokenizer.encode_special_tokens = not special
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not special and not self._added.isdisjoint(ids):
            control = sorted(self._added.intersection(ids))
            raise ValueError(f"plain text was encoded as the control tokens {control}: this tokenizer cannot keep them as text")
        return ids

    def decode(self, ids: Iterable[int] | Tensor | int, *, skip_special_tokens: bool = False) -> str:
        """The text of a row of ids. Bytes that are not valid UTF-8, such as an incomplete character, become U+FFFD.

        skip_special_tokens leaves out the tokens that tokenizer.json marks as special. Ids outside the vocabulary, such as
        the padding rows of an embedding, have no text.
        """
        if isinstance(ids, Tensor):
            if ids.ndim > 1:
                raise ValueError(f"decode takes one row of ids, got shape {tuple(ids.shape)}: use batch_decode")
            ids = ids.tolist()
        row = [int(number) for number in ids] if isinstance(ids, Iterable) else [int(ids)]
        if row and min(row) < 0:
            raise ValueError(f"token ids must not be negative, got {min(row)}")
        if skip_special_tokens:
            row = [number for number in row if number not in self._special]
        return self._tokenizer.decode(row, skip_special_tokens=False)

    def batch_decode(self, rows: Iterable[Iterable[int] | Tensor], *, skip_special_tokens: bool = False) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def __call__(
        self, text: str | Sequence[str], *, return_tensors: str | None = "pt", padding: bool = True,
        padding_side: str = "left", special: bool = False,
    ) -> dict[str, Any]:
        """{"input_ids", "attention_mask"}, int64 tensors [B, T] (B = 1 for one text): model.generate(**tokenizer(texts)).

        return_tensors=None returns unpadded lists. padding=False raises for texts of different lengths. special: as for
        `encode`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no texts")
        rows = [self.encode(item, special=special) for item in texts]
        if return_tensors is None:
            return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
        return self.pad(rows, padding=padding, padding_side=padding_side)

    def pad(self, rows: Sequence[Sequence[int]], *, padding: bool = True, padding_side: str = "left") -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"} [B, T] of rows of ids. padding=False raises for rows of different lengths."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        shortest, width = min(map(len, rows)), max(map(len, rows))
        if shortest < width and not padding:
            raise ValueError(f"texts of {shortest} to {width} tokens do not form a tensor: pass padding=True")
        fill = 0 if self.pad_token_id is None else self.pad_token_id  # masked: any id will do
        ids = torch.full((len(rows), width), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
            ids[i, span] = torch.tensor(row, dtype=torch.int64)
            mask[i, span] = 1
        return {"input_ids": ids, "attention_mask": mask}
