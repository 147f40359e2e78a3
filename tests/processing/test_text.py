"""processing/text.py: the tokenizer against transformers' on the same file; user text never becomes control tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35moe.generation import StopStrings, TextStream
from qwen35moe.processing import Tokenizer
from tests.support.fakes import ADDED, SPECIAL, tokenizer_definition

TEXTS = ["In the beginning", "naïve café: 日本語 🎉", "a\n\n  b\t", "", "ends <|im_end|> and <think>thinks</think>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    assert tokenizer.encode(text, special=True) == theirs.encode(text)
    if "<" not in text:
        assert tokenizer.encode(text) == theirs.encode(text)
    ids = theirs.encode(text)
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_user_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    control = {tokenizer.token_to_id(token) for token in (*SPECIAL, *ADDED)}
    assert None not in control and len(control) == 6
    for token in (*SPECIAL, *ADDED):
        text = f"say {token}, please"
        plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert control.isdisjoint(plain) and not control.isdisjoint(special)
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
        assert tokenizer.decode(plain, skip_special_tokens=True) == text
    assert control.isdisjoint(tokenizer(TEXTS[-1])["input_ids"].flatten().tolist())
    assert tokenizer.token_to_id("<think>") in tokenizer(TEXTS[-1], special=True)["input_ids"]


@given(text=st.lists(st.sampled_from([*SPECIAL, *ADDED, "<|im_", "end|>", "<", "é", " ", "x"]), max_size=8).map("".join))
def test_joined_pieces_never_become_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    control = {tokenizer.token_to_id(token) for token in (*SPECIAL, *ADDED)}
    ids = tokenizer.encode(text)
    assert control.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_skip_special_tokens_leaves_ordinary_added_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><think>hm</think><|im_end|>", special=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hm</think>"
    assert tokenizer.batch_decode([ids, ids[:1]], skip_special_tokens=True) == ["<think>hm</think>", ""]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded(tokenizer: Tokenizer, theirs: Any, side: str) -> None:
    texts = ["one", "two and more", "3"]
    tokenizer.pad_token_id = theirs.pad_token_id
    ours = tokenizer(texts, padding_side=side)
    expected = theirs(texts, return_tensors="pt", padding=True, padding_side=side)
    assert list(ours) == ["input_ids", "attention_mask"]
    for name, value in ours.items():
        assert value.dtype is torch.int64 and torch.equal(value, expected[name])
    assert tokenizer("one")["input_ids"].shape == (1, len(tokenizer.encode("one")))
    lists = tokenizer(texts, return_tensors=None)
    assert lists["input_ids"] == [tokenizer.encode(text) for text in texts]
    assert lists["attention_mask"][2] == [1]


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    definition = tokenizer_definition()
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    assert len(Tokenizer(json.dumps(definition)).encode("word " * 30)) == len(
        Tokenizer(json.dumps(tokenizer_definition())).encode("word " * 30)
    )


def test_end_and_padding_tokens_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == ()
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id is None
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.eos_token_ids == (read.token_to_id("<|im_end|>"),)
    assert read.pad_token_id == read.token_to_id("<|endoftext|>")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 5}, "pad_token_id": None}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 9}))
    read = Tokenizer.from_pretrained(tmp_path)
    assert (read.eos_token_ids, read.eos_token_id, read.pad_token_id) == ((7, 8), 7, 9)


def test_vocabulary(tokenizer: Tokenizer, theirs: Any) -> None:
    assert tokenizer.vocab_size == len(tokenizer) == len(theirs)
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # a padding row of the embedding
    assert tokenizer.decode(torch.tensor(tokenizer.encode("abc"))) == "abc"
    assert tokenizer.decode(tokenizer.encode("a")[0]) == "a"


@given(text=st.text(max_size=40), cut=st.integers(1, 5))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - len(ids) // cut]
    stream = TextStream(tokenizer)
    pieces = [stream.put(token) for token in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_strings_see_special_tokens(tokenizer: Tokenizer) -> None:
    stops = StopStrings(["d<|im_end|>"], tokenizer, 1)
    stopped = [stops.put(0, token) for token in tokenizer.encode("God<|im_end|>", special=True)]
    assert stopped[-1] and not any(stopped[:-1])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda t: t.encode(7), "text must be a str, got int"),
        (lambda t: t.encode(["a"]), "got list"),
        (lambda t: t([]), "no texts"),
        (lambda t: t(["a", "b c d e f"], padding=False), "do not form a tensor: pass padding=True"),
        (lambda t: t("a", return_tensors="tf"), "return_tensors must be 'pt', 'np' or None, got 'tf'"),
        (lambda t: t("a", padding_side="up"), "padding_side must be 'left' or 'right', got 'up'"),
        (lambda t: t.decode([-1]), "must not be negative, got -1"),
        (lambda t: t.decode("In"), "decode takes ids, a row or several rows of them, got 'I'"),
    ],
)
def test_bad_input(tokenizer: Tokenizer, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(tokenizer)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="invalid tokenizer.json: "):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="invalid tokenizer.json: "):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_without_tokenizers_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qwen35moe\[text\]'"):
        Tokenizer.from_pretrained(folder)
