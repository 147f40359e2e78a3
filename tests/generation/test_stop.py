"""Stop strings and text pieces against their definitions: each is a function of the whole text so far."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen35moe.generation import StopStrings, TextStream, generate, stream_text
from qwen35moe.generation.stop import Cut
from tests.support.fakes import FakeModel

STRINGS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
PIECES = st.lists(st.text("ab", max_size=4), max_size=6)


class Bytes:
    """A tokenizer whose tokens are bytes; 250 is a special token."""

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        kept = [token for token in ids if token != 250]
        text = bytes(kept).decode("utf-8", errors="replace")
        return text if skip_special_tokens or len(kept) == len(ids) else text + "<end>"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def held(text: str, strings: list[str]) -> int:
    """The length of the longest end of `text` with which a stop string may begin."""
    return max(n for n in range(len(text) + 1) if n == 0 or any(s[:n] == text[-n:] and n < len(s) for s in strings))


@given(PIECES, STRINGS)
@example(["a", "b"], ["ab"])
@example(["aab", "b"], ["aabb", "b"])
@example(["ba", "aa"], ["aaa"])
@example(["abaaba"], ["abaabaab", "ba"])
def test_a_cut_returns_at_once_what_cannot_belong_to_a_stop_string(pieces: list[str], strings: list[str]) -> None:
    """After every piece: all text before the first stop string that is complete, else all but the end that may be one."""
    cut, returned, whole = Cut(strings), "", ""
    for piece in pieces:
        whole += piece
        returned += cut.put(piece)
        places = [whole.find(string) for string in strings if string in whole]
        if places:
            assert cut.stopped and returned == whole[: min(places)]
            assert cut.put("more") == "" and cut.end() == ""
            return
        assert not cut.stopped and returned == whole[: len(whole) - held(whole, strings)]
    assert returned + cut.end() == whole and cut.end() == ""


@given(st.text("abé", max_size=14), st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=3))
@example("aab", ["ab"])
@example("xxabcd", ["abcd"])
def test_a_row_stops_with_the_last_byte_of_its_string(text: str, strings: list[str]) -> None:
    """However long before its beginning was, and however many tokens it takes."""
    for row in range(2):  # the rows do not see each other
        stops = StopStrings(strings, Bytes(), 2)
        data = text.encode()
        stops.put(1 - row, ord("a"))
        for end in range(1, len(data) + 1):
            whole = data[:end].decode("utf-8", errors="ignore")
            stopped = stops.put(row, data[end - 1])
            assert stopped == any(string in whole for string in strings)
            if stopped:
                break


@pytest.mark.parametrize("length", [1, 2, 3, 17, 40])
def test_a_stop_string_longer_than_the_window_of_tokens(length: int) -> None:
    string = "xyz" * 14
    stops = StopStrings([string[:length]], Bytes(), 1)
    data = ("-" * 23 + string[: length - 1] + "-" + string[:length] + "--").encode()
    first = data.decode().index(string[:length]) + length
    assert [stops.put(0, byte) for byte in data[:first]] == [False] * (first - 1) + [True]


def test_the_text_of_special_tokens_can_stop_a_row() -> None:
    stops = StopStrings(["<end>"], Bytes(), 1)
    assert [stops.put(0, token) for token in (97, 250)] == [False, True]


def test_what_is_held_back_comes_at_the_end() -> None:
    texts: dict[str, str] = {}
    for new in range(1, 9):
        model = FakeModel(256, script=lambda history: b"ab<sto!."[len(history) - 1] if len(history) < 9 else 0)
        pieces = list(stream_text(model, Bytes(), ">", max_new_tokens=new, stop=["<stop>"], eos_token_id=[]))
        texts["".join(pieces)] = pieces[-1]
    assert texts == {"a": "a", "ab": "b", "ab<": "<", "ab<s": "<s", "ab<st": "<st", "ab<sto": "<sto", "ab<sto!": "<sto!",
                     "ab<sto!.": "."}  # fmt: skip


def test_rows_stop_one_by_one_within_a_character_and_a_token() -> None:
    """Row 0 in the middle of a run of unfinished characters, row 1 at once, row 2 never; what follows is padding."""
    rows = {ord("a"): "é日x日".encode(), ord("b"): "日x".encode() + b"....", ord("c"): b"y" * 12}
    model = FakeModel(256, script=lambda history: rows[history[0]][len(history) - 1] if len(history) <= 9 else ord("y"))
    out = generate(model, [[row] for row in rows], max_new_tokens=9, stop=["日x", "z"], tokenizer=Bytes(), pad_token_id=0,
                   eos_token_id=[])  # fmt: skip
    ends = [bytes(row[1:].tolist()).rstrip(b"\0").decode() for row in out]
    assert ends == ["é日x", "日x", "y" * 9]


def test_a_decoder_that_changes_its_earlier_text_repeats_nothing() -> None:
    """Some decoders clean spaces up once the next token is known: what was returned stays, and nothing after it is lost."""

    class Cleaning(Bytes):
        def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
            return super().decode(ids).replace(" .", ".")

    text = TextStream(Cleaning())
    data = b"a .b " + b"c . " * 12 + b"d"
    pieces = [text.put(byte) for byte in data]
    assert "".join(pieces) + text.end() == data.decode() and pieces[:5] == ["a", " ", ".", "b", " "]
