"""A checkpoint's chat template: messages to a prompt, exactly as transformers renders it. Needs the extra [text] (jinja2).

A template is a program from a checkpoint and therefore untrusted: it runs in jinja2's immutable sandbox on plain data.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from .optional import require

# Two of these mark strings that look like control tokens and are text. Unicode reserves them for internal use by programs.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _jinja() -> Any:
    return require("jinja2", "chat templates need the package jinja2", "text")


class ChatTemplate:
    """The text of a chat_template.jinja, compiled.

        template.render(messages, tools=None, add_generation_prompt=True, enable_thinking=False)

    As in transformers, a block removes the blanks before it and the newline after it, and templates may use
    `raise_exception`, `strftime_now`, `tojson` (plain JSON without HTML escapes), `break`, `continue` and `generation` blocks.
    """

    def __init__(self, source: str) -> None:
        """ValueError if the source does not compile."""
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except _jinja().TemplateError as error:
            raise ValueError(f"invalid chat template: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False, **variables: Any,
    ) -> str:
        """The prompt. variables: values that the template reads (enable_thinking, preserve_thinking, add_vision_id, ...).

        ValueError if the template rejects the messages, with the template's message, or if the sandbox stops it.
        """
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError("a tool is a JSON schema: {'type': 'function', 'function': {'name': ..., 'parameters': ...}}")
        chat = [_with_reasoning(message) for message in plain_data(list(messages))]
        values = {"tools": None if tools is None else plain_data(list(tools)), "documents": None, **plain_data(variables)}
        try:
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # a template is a program and can raise anything
            from_template = isinstance(error, _jinja().TemplateError)
            raise ValueError(f"chat template: {error if from_template else f'{type(error).__name__}: {error}'}") from error


def _environment() -> Any:
    jinja2 = _jinja()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's text for training; rendering ignores the marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # The characters of `Marks` are not escaped: they are removed after rendering.
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda match: json.dumps(match[0])[1:-1], text)


def plain_data(value: Any) -> Any:
    """The value as JSON types. Images and other objects become the name of their type: a template only tests whether they
    are present, and must not reach their methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass: its own __str__ is not called
        return str.__str__(value)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read."""
    if not isinstance(message, dict):
        raise ValueError(f"a message is a mapping with role and content, got {message!r}")
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


# ------------------------------------------------------------------------------------- text that looks like control tokens


@dataclasses.dataclass(frozen=True)
class Marks:
    """Two characters that no text contains. They enclose every string that looks like a control token and is text."""

    start: str
    end: str

    @classmethod
    def absent_from(cls, *texts: str) -> Marks:
        """Marks that occur in none of the texts. ValueError if the texts leave fewer than two candidates."""
        unused = [char for char in _NONCHARACTERS if not any(char in text for text in texts)]
        if len(unused) < 2:
            raise ValueError("the text uses the noncharacters U+FDD0..U+FDEF: two must be unused, to mark control tokens")
        return cls(unused[0], unused[1])

    def escape(self, value: Any, tokens: Sequence[str]) -> Any:
        """The value with marks around each of `tokens` in its strings, and after strings that end with the beginning of a
        token: a template that joins "<|im_" and "end|>" must not form one."""
        pattern, beginnings = _any_of(tokens), tuple({token[:n] for token in tokens for n in range(1, len(token))})

        def escaped(text: str) -> str:
            marked = pattern.sub(lambda match: f"{self.start}{match[0]}{self.end}", text)
            return marked + self.end if text.endswith(beginnings) else marked

        return _mapped(value, escaped)

    def split(self, text: str, tokens: Sequence[str]) -> list[tuple[bool, str]]:
        """(is a control token, text) in order: the tokens without marks, and the text between them with its marks removed.

        A template may have separated a token from its marks; a token next to a single mark is still text.
        """
        pieces, start = [], 0
        for match in re.finditer(f"(?<!{self.start})(?:{_any_of(tokens).pattern})(?!{self.end})", text):
            pieces += [(False, text[start : match.start()]), (True, match[0])]
            start = match.end()
        pieces.append((False, text[start:]))
        marks = str.maketrans("", "", self.start + self.end)
        return [(control, piece.translate(marks)) for control, piece in pieces if piece.translate(marks)]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens; longest first, so that a token precedes those it contains."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """The value with the function applied to all its strings."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_mapped(key, function): _mapped(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, function) for item in value]
    return value
