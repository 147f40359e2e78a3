"""Standard streams, which may be closed, broken, or hold bytes that are no UTF-8."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def open_missing() -> list[str]:
    """Opens the null device for each standard stream that is closed, and returns the names of these streams.

    Otherwise the next file that is opened, such as a checkpoint's, gets the number of the closed stream, and everything that a
    C library writes to that stream.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if is_closed(getattr(sys, name))]
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in closed:
        if name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
    return closed


def is_closed(stream: Any) -> bool:
    """Whether a standard stream cannot be used."""
    return stream is None or getattr(stream, "closed", False)


def say(text: str) -> None:
    """A line on standard error, if there is anybody to read it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def discard(stream: Any) -> None:
    """Sends what is still to be written to a broken stream nowhere: Python writes it again when the process ends."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def flush() -> None:
    """Writes what standard output still holds; OSError where that fails, and then nothing is left to be written."""
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        raise


def checked_text(text: str, source: str) -> str:
    """The text; ValueError if it was made of bytes that are no UTF-8, which Python keeps as lone surrogates."""
    for index, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise ValueError(f"{source} is no UTF-8 text: byte 0x{ord(character) & 0xFF:02x} after {index} characters")
    return text


def read_input() -> str:
    """All of standard input as text."""
    return _read("read")


def read_line() -> str:
    """The next line of standard input, "" at its end."""
    return _read("readline")


def read_file(path: str) -> str:
    """A UTF-8 text file; - is standard input."""
    return read_input() if path == "-" else decoded(Path(path).read_bytes(), path)


def decoded(content: bytes, source: str) -> str:
    """UTF-8 as text, with any line ends; ValueError for other bytes."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text: byte 0x{content[error.start]:02x} at {error.start}") from None


def _read(method: str) -> str:
    stream = sys.stdin
    if is_closed(stream):
        raise ValueError("standard input is closed: give a text, or connect standard input")
    try:
        text: str = getattr(stream, method)()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no UTF-8 text: byte 0x{error.object[error.start]:02x}") from None
    return checked_text(text, "standard input")
