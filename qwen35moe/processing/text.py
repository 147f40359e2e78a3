"""Text <-> token ids: a thin layer over the `tokenizers` library and a checkpoint's tokenizer.json.

What it adds: text from users stays text. A prompt that contains "<|im_end|>" or "<think>" must not be able to end a
turn, so such strings become control tokens only where the caller says that they are meant (`special=True`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise ModuleNotFoundError(
            "reading tokenizer.json needs the package `tokenizers`: pip install 'qwen35moe[text]'", name="tokenizers"
        ) from None
    return tokenizers


class Tokenizer:
    """A checkpoint's tokenizer.

        tokenizer = Tokenizer.from_pretrained(folder)
        ids = tokenizer.encode("In the beginning")                     # list of ids
        inputs = tokenizer(["one", "two and more"])                    # {"input_ids", "attention_mask"}: [2, T],
        left-padded text = tokenizer.decode(ids)

    vocab_size: the number of tokens, added ones included (an embedding may have more rows, as padding). added_tokens: the
    control tokens and their ids, of which special_tokens are those that decode() can leave out. eos_token_ids,
    pad_token_id: from generation_config.json, else config.json, else tokenizer_config.json.
    """

    def __init__(self, definition: str, *, eos_token_ids: Sequence[int] = (), pad_token_id: int | None = None) -> None:
        """definition: the text of a tokenizer.json."""
        library = _library()
        try:
            described = json.loads(definition)
            added = described.get("added_tokens") or []
            self._special = frozenset(int(token["id"]) for token in added if token.get("special"))
            self._added = frozenset(int(token["id"]) for token in added)
            self.added_tokens: dict[str, int] = {token["content"]: int(token["id"]) for token in added}
            self.special_tokens = frozenset(token["content"] for token in added if token.get("special"))
            # Tokens that take blanks beside them with them: whoever cuts a text at its control tokens must know.
            self.greedy_tokens = frozenset(
                token["content"] for token in added if any(token.get(each) for each in ("lstrip", "rstrip", "single_word"))
            )
            # The library can leave special tokens in a text alone, but not added tokens like <think> that are marked
            # as ordinary. Here all of them are marked special; which ones decode() leaves out is kept above.
            for token in added:
                token["special"] = True
            described["truncation"] = described["padding"] = None  # a caller's ids are never cut or filled up silently
            self._tokenizer = library.Tokenizer.from_str(json.dumps(described))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"this is no tokenizer.json: {error}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder. ValueError when it holds no tokenizer.json."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} holds no tokenizer.json")
        _library()  # its absence is the more useful error than a bad file
        try:
            tokenizer = cls(file.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {error}") from error
        settings = [_json(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
        tokenizer.eos_token_ids = tokenizer._find("eos", settings)
        tokenizer.pad_token_id = next(iter(tokenizer._find("pad", settings)), None)
        return tokenizer

    def _find(self, what: str, settings: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The ids of the end or padding token from the first file that names any."""
        for values in settings:
            for part in (values, values.get("text_config") or {}):
                found = part.get(f"{what}_token_id")
                if found is not None:
                    return tuple(found) if isinstance(found, list) else (found,)
                name = part.get(f"{what}_token")
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
        """The id of a token given exactly as the vocabulary has it ("<|im_end|>"), or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of a text; nothing is added at its ends.

        special: whether strings that look like control tokens become them. False for anything a user wrote.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        self._tokenizer.encode_special_tokens = not special
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not special and not self._added.isdisjoint(ids):
            control = sorted(self._added.intersection(ids))
            raise ValueError(f"plain text was encoded as the control tokens {control}: this tokenizer cannot keep them apart")
        return ids

    def decode(self, ids: Iterable[int] | Tensor | int, *, skip_special_tokens: bool = False) -> str:
        """The text of a row of ids. Bytes that are no UTF-8, such as an unfinished character, become U+FFFD.

        skip_special_tokens leaves out the tokens that tokenizer.json marks as special. Ids that the tokenizer does
        not have, such as the padding rows of an embedding, have no text.
        """
        if isinstance(ids, Tensor):
            if ids.ndim > 1:
                raise ValueError(f"decode takes one row of ids, got shape {tuple(ids.shape)}: use batch_decode")
            ids = ids.tolist()
        row = [int(each) for each in ids] if isinstance(ids, Iterable) else [int(ids)]
        if row and min(row) < 0:
            raise ValueError(f"token ids are not negative, got {min(row)}")
        if skip_special_tokens:
            row = [each for each in row if each not in self._special]
        return self._tokenizer.decode(row, skip_special_tokens=False)

    def batch_decode(self, rows: Iterable[Iterable[int] | Tensor], *, skip_special_tokens: bool = False) -> list[str]:
        """`decode` for each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str = "left",
        special: bool = False,
    ) -> dict[str, Any]:
        """{"input_ids", "attention_mask"}, int64 tensors [B, T] (B = 1 for one text):
        model.generate(**tokenizer(texts)).

        return_tensors=None gives lists of their own lengths. padding=False refuses texts of different lengths.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text was given")
        rows = [self.encode(each, special=special) for each in texts]
        if return_tensors is None:
            return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
        return self.pad(rows, padding=padding, padding_side=padding_side)

    def pad(self, rows: Sequence[Sequence[int]], *, padding: bool = True, padding_side: str = "left") -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"} [B, T] of rows of ids; padding=False refuses rows of different lengths."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        shortest, width = min(map(len, rows)), max(map(len, rows))
        if shortest < width and not padding:
            raise ValueError(f"texts of {shortest} to {width} tokens make no tensor: pass padding=True")
        fill = 0 if self.pad_token_id is None else self.pad_token_id  # masked: which id it is does not matter
        ids = torch.full((len(rows), width), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
            ids[number, place] = torch.tensor(row, dtype=torch.int64)
            mask[number, place] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {type(found).__name__}")
    return found
