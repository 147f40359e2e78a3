"""A checkpoint's chat template: messages in, prompt out, exactly as transformers renders it. Needs the extra [text] (jinja2).

A template is a program from a checkpoint and so untrusted: it runs in jinja2's immutable sandbox and sees plain data only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

# Pairs of these (which Unicode keeps for private use in programs, and never assigns) enclose what is text and no control.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _jinja() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise ModuleNotFoundError("chat templates need jinja2: pip install 'qwen35moe[text]'", name="jinja2") from None
    return jinja2


class ChatTemplate:
    """The text of a chat_template.jinja, compiled.

        template.render(messages, tools=None, add_generation_prompt=True, enable_thinking=False)

    In it, as in transformers: blocks take their line's blanks and newline with them; `raise_exception`, `strftime_now`,
    `tojson` (plain JSON, nothing escaped for HTML), `break` and `continue`, and `generation` blocks, which only mark.
    """

    def __init__(self, source: str) -> None:
        """ValueError when the source is no template."""
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except _jinja().TemplateError as error:
            raise ValueError(f"this is no chat template: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False, **variables: Any,
    ) -> str:
        """The prompt. variables: whatever the template asks for (enable_thinking, preserve_thinking, add_vision_id, ...).

        ValueError where the template refuses the messages (its own words), or does something that the sandbox forbids.
        """
        if tools is not None and not all(isinstance(each, Mapping) for each in tools):
            raise ValueError("a tool is a JSON schema: {'type': 'function', 'function': {'name': ..., 'parameters': ...}}")
        chat = [_with_reasoning(message) for message in plain(list(messages))]
        given = {"tools": None if tools is None else plain(list(tools)), "documents": None, **plain(variables)}
        try:
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is a program: it may fail in any way
            refused = isinstance(error, _jinja().TemplateError)
            raise ValueError(f"the chat template: {error if refused else f'{type(error).__name__}: {error}'}") from error


def _environment() -> Any:
    jinja2 = _jinja()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} says which text is the assistant's: here, just the text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda found: json.dumps(found[0])[1:-1], text)  # marks stay marks


def plain(value: Any) -> Any:
    """The value as JSON has it. VisualInputs and other objects become their type's name: a template asks only whether they
    are there, and would have their methods otherwise."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of a subclass: its own __str__ is not asked
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"a message is a mapping with role and content, got {message!r}")
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


# ------------------------------------------------------------------------------------- text that looks like control tokens


@dataclasses.dataclass(frozen=True)
class Marks:
    """Two characters that occur nowhere else, around every string that looks like a control token and is none."""

    start: str
    end: str

    @classmethod
    def absent_from(cls, *texts: str) -> Marks:
        free = [each for each in _NONCHARACTERS if not any(each in text for text in texts)]
        if len(free) < 2:
            raise ValueError("the text uses all of the noncharacters U+FDD0..U+FDEF: one pair is needed to mark control tokens")
        return cls(free[0], free[1])

    def around(self, value: Any, tokens: Sequence[str]) -> Any:
        """The value with the marks around each of `tokens` in its strings, and after strings that end as a token begins:
        a template that joins "<|im_" and "end|>" shall not make one."""
        pattern, beginnings = _any_of(tokens), tuple({token[:n] for token in tokens for n in range(1, len(token))})

        def marked(text: str) -> str:
            found = pattern.sub(lambda each: f"{self.start}{each[0]}{self.end}", text)
            return found + self.end if text.endswith(beginnings) else found

        return _mapped(value, marked)

    def split(self, text: str, tokens: Sequence[str]) -> list[tuple[bool, str]]:
        """(is a control token, text) in turn: the tokens that no marks enclose, and what lies between them, marks left out.

        A template may have parted a token from its marks; a mark that stands alone then still keeps what it touches text.
        """
        pieces, at = [], 0
        for found in re.finditer(f"(?<!{self.start})(?:{_any_of(tokens).pattern})(?!{self.end})", text):
            pieces += [(False, text[at : found.start()]), (True, found[0])]
            at = found.end()
        pieces.append((False, text[at:]))
        marks = str.maketrans("", "", self.start + self.end)
        return [(control, piece.translate(marks)) for control, piece in pieces if piece.translate(marks)]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Longest first: a token goes before those it contains."""
    return re.compile("|".join(re.escape(each) for each in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
