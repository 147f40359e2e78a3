"""Text <-> token ids: a thin layer over the `tokenizers` library and a checkpoint's tokenizer.json. Needs the extra [text].

User text stays text: a prompt that contains "<|im_end|>" or "<think>" must not be able to end a turn, so such strings become
control tokens only with `special=True` (the default with `TRANSFORMERS`, as there).
"""

from __future__ import annotations

import json
import logging
import operator
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compat import TOKENIZER, read_keywords, short
from ..files import parse_json
from .batch import BatchEncoding, as_tensor, tensor_kind
from .files import MAX_TOKENIZER_VALUES, find_file, read_json, read_text, template_source
from .optional import require
from .padding import LARGE, as_lists, columns_of, pad_rows, padding_width, truncation_limit
from .pieces import Pieces, RenderedPrompt
from .vocabulary import Vocabulary, named_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallDefaults:
    """The values of return_tensors, padding and special in calls that leave them out."""

    return_tensors: str | None = "pt"
    padding: bool = True
    special: bool = False


_CALL = ("text", "padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "add_special_tokens",
         "return_tensors", "return_attention_mask", "special")  # fmt: skip
OWN = CallDefaults()
TRANSFORMERS = CallDefaults(return_tensors=None, padding=False, special=True)  # of `AutoTokenizer`


def _library() -> Any:
    return require("tokenizers", "reading tokenizer.json needs the package `tokenizers`", "text")


class Tokenizer(Vocabulary):
    """A checkpoint's tokenizer.

        tokenizer = Tokenizer.from_pretrained(folder)
        ids = tokenizer.encode("In the beginning")               # a list of ids
        inputs = tokenizer(["one", "two and more"])              # {"input_ids", "attention_mask"}: [2, T], padded on the left
        text = tokenizer.decode(ids)
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

    It has the methods and attributes of transformers' tokenizers; `docs/guide/from_transformers.md` lists the keywords. Its
    own defaults are tensors, padded on the left, and text that stays text. `AutoTokenizer` and `defaults=TRANSFORMERS`
    take transformers' defaults: lists, without padding, and names of control tokens become control tokens.

    stripping_tokens: the control tokens that also match the blanks beside them.
    chat_template: the source of the chat template or None; it can be set. padding_side, truncation_side: "left" or "right".
    """

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True
    bos_token: str | None
    bos_token_id: int | None

    def __init__(
        self, definition: str, *, eos_token_ids: Sequence[int] = (), pad_token_id: int | None = None,
        settings: Mapping[str, Any] | None = None, chat_template: str | None = None, padding_side: str | None = None,
        defaults: CallDefaults = OWN, name_or_path: str = "",
    ) -> None:
        """definition: the content of a tokenizer.json. settings: the object of a tokenizer_config.json."""
        self.definition, self.settings = definition, dict(settings or {})
        self.defaults, self.name_or_path, self.chat_template = defaults, name_or_path, chat_template
        self.named_tokens = named_tokens(self.settings)
        self._build()
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.settings_text: str | None = None  # of the tokenizer_config.json that settings come from
        self.padding_side = self.configured_padding_side() if padding_side is None else padding_side
        self.truncation_side = self.settings.get("truncation_side", "right")
        length = self.settings.get("model_max_length")
        self.model_max_length = int(length) if isinstance(length, (int, float)) and 0 < length < LARGE else LARGE

    def _build(self) -> None:
        """Everything that follows from the definition."""
        library = _library()
        try:
            fields = parse_json(self.definition.encode("utf-8"), most=MAX_TOKENIZER_VALUES)
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
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and BaseException where its own code panics
            raise ValueError(f"invalid tokenizer.json: {str(error)[:500]}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._lock = threading.Lock()  # the library's switch for special tokens is shared by all calls

    def configured_padding_side(self) -> str:
        """The default side: "left"; with transformers' defaults the checkpoint's, else "right"."""
        return self.settings.get("padding_side", "right") if self.defaults == TRANSFORMERS else "left"

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_tokenizer", "_lock", "_chat")  # made from the others
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def __repr__(self) -> str:
        return (f"Tokenizer({self.vocab_size} tokens, {len(self.added_tokens)} of them control tokens, "
                f"eos_token={self.eos_token!r}, pad_token={self.pad_token!r}, padding_side={self.padding_side!r}, "
                f"chat_template={'no' if self.chat_template is None else 'yes'})")  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, padding_side: str | None = None, defaults: CallDefaults = OWN, **keywords: Any
    ) -> Tokenizer:
        """Read a checkpoint folder. ValueError if it has no tokenizer.json.

        keywords: pad_token, eos_token, chat_template and others that set the attribute of that name, and transformers'
        keywords without effect here (use_fast, trust_remote_code, ...).
        """
        settable = ("pad_token", "eos_token", "chat_template", "model_max_length", "truncation_side")
        keywords = read_keywords("from_pretrained", TOKENIZER, keywords, settable)
        folder = Path(path)
        if find_file(folder / "tokenizer.json") is None:
            raise ValueError(f"{folder} has no tokenizer.json")
        _library()  # a missing package is reported before a bad file
        settings = [read_json(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
        definition, template = read_text(folder / "tokenizer.json"), template_source(folder)
        try:
            tokenizer = cls(definition, settings=settings[-1], padding_side=padding_side, defaults=defaults,
                            chat_template=template, name_or_path=str(path))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from error
        if find_file(folder / "tokenizer_config.json"):
            tokenizer.settings_text = read_text(folder / "tokenizer_config.json")
        tokenizer.eos_token_ids = tokenizer._token_ids("eos", settings)
        tokenizer.pad_token_id = next(iter(tokenizer._token_ids("pad", settings)), None)
        for name, value in keywords.items():
            if value is not None:
                setattr(tokenizer, name, value)
        return tokenizer

    def save_pretrained(self, path: str | os.PathLike[str], **keywords: Any) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja into a folder; returns their
        paths. Files of a tokenizer that was not changed equal those that were read."""
        from .saving import save_tokenizer

        return save_tokenizer(self, path, keywords)

    def _token_ids(self, kind: str, settings: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """The ids of the "eos" or "pad" token from the first file that has any."""
        for values in settings:
            nested = values.get("text_config")
            for section in (values, nested if isinstance(nested, dict) else {}):
                ids = section.get(f"{kind}_token_id")
                if ids is not None:
                    ids = ids if isinstance(ids, list) else [ids]
                    if not all(type(number) is int for number in ids):
                        raise ValueError(f"{kind}_token_id must be an integer or a list of integers, got {short(ids)}")
                    return tuple(ids)
                name = section.get(f"{kind}_token")
                name = name.get("content") if isinstance(name, dict) else name
                if isinstance(name, str) and (number := self._tokenizer.token_to_id(name)) is not None:
                    return (number,)
        return ()

    # ------------------------------------------------------------------------------------------------------ text to ids

    def encode(
        self, text: str, *, special: bool | None = None, add_special_tokens: bool | None = None, **keywords: Any
    ) -> Any:
        """The token ids of a text, a list.

        special: encode the names of control tokens as these tokens. False for text that users write. add_special_tokens:
        add the tokens that tokenizer.json adds to every text; the published ones add none. Other keywords are those of a
        call (truncation=, max_length=, padding=, return_tensors=).
        """
        if keywords:
            options: dict[str, Any] = {"return_tensors": None, "padding": False} | keywords
            return self(text, special=special, add_special_tokens=add_special_tokens, **options)["input_ids"]
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        if isinstance(text, RenderedPrompt) and special is None:
            return self.ids_of_pieces(text.pieces)
        special = self.defaults.special if special is None else bool(special)
        add = self.defaults == TRANSFORMERS if add_special_tokens is None else bool(add_special_tokens)
        try:
            with self._lock:
                self._tokenizer.encode_special_tokens = not special
                ids = self._tokenizer.encode(text, add_special_tokens=add).ids
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair
            raise ValueError(f"the text is not valid Unicode: {str(error)[:200]}") from None
        if not special and not add and not self._added.isdisjoint(ids):
            control = sorted(self._added.intersection(ids))
            raise ValueError(f"plain text was encoded as the control tokens {control}: this tokenizer cannot keep them as text")
        return ids

    def ids_of_pieces(self, pieces: Pieces) -> list[int]:
        """The ids of (is a control token, text) in order."""
        ids: list[int] = []
        for control, group in groupby(pieces, key=lambda piece: piece[0]):
            if control:
                ids += [self.added_tokens[text] for _, text in group]
            else:
                ids += self.encode("".join(text for _, text in group), special=False, add_special_tokens=False)
        return ids

    def tokenize(self, text: str, *, special: bool | None = None, **keywords: Any) -> list[str]:
        """The tokens of a text, as the vocabulary spells them."""
        return self.convert_ids_to_tokens(self.encode(text, special=special, **keywords))

    def __call__(
        self, text: str | Sequence[str], text_pair: Any = None, *, padding: bool | str | None = None,
        truncation: bool | str | None = None, max_length: int | None = None, padding_side: str | None = None,
        pad_to_multiple_of: int | None = None, add_special_tokens: bool | None = None, return_tensors: Any = "auto",
        return_attention_mask: bool | None = None, special: bool | None = None, **keywords: Any,
    ) -> BatchEncoding:
        """{"input_ids", "attention_mask"}, int64 tensors [B, T] (B = 1 for one text): model.generate(**tokenizer(texts)).

        return_tensors: "pt", "np", or None for unpadded lists (one list for one text). padding: True or "longest",
        "max_length", or False, which raises for texts of different lengths. truncation=True cuts to max_length (else
        model_max_length) tokens at truncation_side. pad_to_multiple_of: round the width up. special and add_special_tokens:
        as for `encode`. The defaults of return_tensors, padding and special are `defaults`.
        """
        keywords = read_keywords("tokenizer", TOKENIZER, {"text_pair": text_pair, "special": special, **keywords}, _CALL)
        special = keywords["special"]
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text must be a str or a list of str, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no texts")
        if special is None and not self.defaults.special:
            self._warn_of_control_names(texts)
        rows = [self.encode(item, special=special, add_special_tokens=add_special_tokens) for item in texts]
        limit = truncation_limit(truncation, max_length, padding, self.model_max_length)
        if limit is not None:
            rows = [row[-limit:] if self.truncation_side == "left" else row[:limit] for row in rows]
        kind = tensor_kind(self.defaults.return_tensors if _is_auto(return_tensors) else return_tensors)
        if padding is None and kind is None:
            padding = False  # lists need none
        out = self.pad(rows, padding=padding, max_length=max_length, padding_side=padding_side,
                       pad_to_multiple_of=pad_to_multiple_of, return_attention_mask=return_attention_mask,
                       return_tensors=kind)  # fmt: skip
        if kind is None and isinstance(text, str):
            return BatchEncoding({name: values[0] for name, values in out.items()})
        return out

    def _warn_of_control_names(self, texts: Sequence[Any]) -> None:
        """Warns of a rendered prompt that lost its pieces (prompt + "..."): it would be encoded as text."""
        for text in texts:
            if type(text) is str and any(token in text for token in self.special_tokens):
                log.warning(
                    "a text spells control tokens, which are encoded as text: for a prompt that a template rendered, pass "
                    "special=True; special=False keeps text as text without this warning"
                )
                return

    def pad(
        self, rows: Any = None, padding: bool | str | None = None, *, max_length: int | None = None,
        padding_side: str | None = None, pad_to_multiple_of: int | None = None, return_attention_mask: bool | None = None,
        return_tensors: Any = "auto", **keywords: Any,
    ) -> BatchEncoding:
        """{"input_ids", "attention_mask"} [B, T] of rows of ids, or of transformers' features: a mapping with "input_ids" or a
        list of such mappings, whose other values must already have one length.

        padding: as for a call; True with return_tensors=None pads lists. padding=False raises for rows of different lengths
        that are to be a tensor.
        """
        keywords = read_keywords("pad", TOKENIZER, keywords, ("rows",))
        rows = keywords.get("rows", rows)
        kind = tensor_kind(self.defaults.return_tensors if _is_auto(return_tensors) else return_tensors)
        side = self.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}")
        padding = self.defaults.padding if padding is None else padding
        fill = 0 if self.pad_token_id is None else self.pad_token_id  # masked: any id will do
        columns = columns_of(rows)
        lengths = [len(row) for row in columns["input_ids"]]
        width = padding_width(lengths, padding, max_length, pad_to_multiple_of, self.model_max_length)
        if width is None and kind is not None and len(set(lengths)) > 1:
            raise ValueError(f"texts of {min(lengths)} to {max(lengths)} tokens do not form a tensor: pass padding=True")
        if return_attention_mask is not False and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * length for length in lengths]
        elif return_attention_mask is False:
            columns.pop("attention_mask", None)
        fills = {"input_ids": fill, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
        out = BatchEncoding()
        for name, values in columns.items():
            if width is not None and name in fills:
                values = pad_rows(values, width, fills[name], side)
            out[name] = as_tensor(name, values, kind)
        return out

    # ------------------------------------------------------------------------------------------------------ ids to text

    def decode(
        self, ids: Iterable[Any] | Tensor | int | None = None, skip_special_tokens: bool = False, **keywords: Any
    ) -> Any:
        """The text of a row of ids, or the texts of several rows. Bytes that are not valid UTF-8, such as an incomplete
        character, become U+FFFD.

        skip_special_tokens leaves out the tokens that tokenizer.json marks as special. Ids outside the vocabulary, such as
        the padding rows of an embedding, have no text.
        """
        ids = read_keywords("decode", TOKENIZER, keywords, ("ids",)).get("ids", ids)
        if isinstance(ids, Mapping):
            ids = ids["input_ids"]
        ids = as_lists(ids)
        row: list[Any] = list(ids) if isinstance(ids, Iterable) else [ids]
        if row and (isinstance(row[0], (list, tuple)) or getattr(row[0], "ndim", 0)):
            return [self.decode(item, skip_special_tokens) for item in row]
        try:
            row = [operator.index(number) for number in row]
        except (TypeError, ValueError):
            raise ValueError(f"decode takes ids, a row or several rows of them, got {short(row[0])}") from None
        if row and min(row) < 0:
            hint = ": replace the -100 of labels first" if min(row) == -100 else ""
            raise ValueError(f"token ids must not be negative, got {min(row)}{hint}")
        if skip_special_tokens:
            row = [number for number in row if number not in self._special]
        return self._tokenizer.decode([number for number in row if number < 1 << 32], skip_special_tokens=False)

    def batch_decode(self, rows: Any = None, skip_special_tokens: bool = False, **keywords: Any) -> list[str]:
        """`decode` for each row; a single row of ids gives a list of one text."""
        rows = read_keywords("batch_decode", TOKENIZER, keywords, ("rows",)).get("rows", rows)
        if isinstance(rows, Mapping):
            rows = rows["input_ids"]
        texts = self.decode(rows, skip_special_tokens) if not isinstance(rows, (list, tuple)) or rows else []
        return [texts] if isinstance(texts, str) else texts

    # ---------------------------------------------------------------------------------------------------------- messages

    def apply_chat_template(self, messages: Any = None, tools: Any = None, **keywords: Any) -> Any:
        """The inputs of a model for a conversation or a list of conversations; with tokenize=False their text.

        documents, chat_template, add_generation_prompt, continue_final_message, tokenize, special and variables of the
        template (enable_thinking=False): see `Processor.apply_chat_template`. padding, truncation, max_length,
        return_tensors: as for a call; return_dict=False returns input_ids alone.
        """
        from .chat import tokenizer_chat

        return tokenizer_chat(self, messages, tools, keywords)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The source of the chat template. ValueError if there is none."""
        source = self.chat_template if chat_template is None else chat_template
        if source is None:
            raise ValueError("this checkpoint has no chat template (chat_template.jinja): pass chat_template=")
        return source


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"
