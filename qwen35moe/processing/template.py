"""A checkpoint's chat template: messages to a prompt, exactly as transformers renders it. Needs the extra [text] (jinja2).

A template is a program from a checkpoint and therefore untrusted: it runs in jinja2's immutable sandbox on plain data, with a
budget of time and memory (`budget.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..compat import short
from .budget import Budget, enter, leave
from .sandbox import environment, jinja

# Two of these mark strings that look like control tokens and are text. Unicode reserves them for internal use by programs.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field of a message
MAX_SOURCE = 1 << 19  # characters of a template; the published ones have 8,000
_INPUTS = ("tools", "documents", "enable_thinking", "preserve_thinking", "add_vision_id")  # suggested for misspelt names


class ChatTemplate:
    """The text of a chat_template.jinja, compiled.

        template.render(messages, tools=None, add_generation_prompt=True, enable_thinking=False)

    As in transformers, a block removes the blanks before it and the newline after it, and templates may use
    `raise_exception`, `strftime_now`, `tojson` (plain JSON without HTML escapes), `break`, `continue` and `generation` blocks.

    variables: the names that the template reads and does not set itself.
    """

    def __init__(self, source: str) -> None:
        """ValueError if the source does not compile."""
        if not isinstance(source, str):
            raise ValueError(f"a chat template is a str, got {type(source).__name__}")
        if len(source) > MAX_SOURCE:
            raise ValueError(f"invalid chat template: it has {len(source):,} characters; at most {MAX_SOURCE:,} are compiled")
        self.source = source
        sandbox, meta = environment(), _meta()
        try:
            self._template = sandbox.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(sandbox.parse(source)))
        except Exception as error:  # also RecursionError and MemoryError of a program that is nested too deeply
            text = str(error) if isinstance(error, jinja().TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"invalid chat template: {text[:500]}") from error

    def __reduce__(self) -> Any:
        return type(self), (self.source,)

    def __deepcopy__(self, memo: Any) -> ChatTemplate:
        return self  # it is never changed

    def __repr__(self) -> str:
        return f"ChatTemplate({len(self.source)} characters, reads {', '.join(sorted(self.variables))})"

    def check_variables(self, variables: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
        """The variables that the template reads. ValueError, which suggests a name, for one that it does not read and that
        would change nothing. known: further names to suggest."""
        kept = {}
        for name, value in variables.items():
            if name in self.variables:
                kept[name] = value
            elif value is not None and not self._has_no_effect(name, value):
                names = [*(self.variables - {"raise_exception", "strftime_now", "namespace", "range"}), *known, *_INPUTS]
                near = difflib.get_close_matches(name, [other for other in names if other != name], n=1)
                raise ValueError(
                    f"the chat template does not read {short(name)}, so {name}={short(value)} would have no effect: "
                    + (f"did you mean {near[0]!r}?" if near else "leave it out")
                )
        return kept

    def _has_no_effect(self, name: str, value: Any) -> bool:
        """Values of the published templates' variables that a template which does not read them fulfils anyway."""
        if name == "enable_thinking":
            return value is True or "<think>" not in self.source
        return name in ("preserve_thinking", "add_vision_id", "add_generation_prompt") and value is False or (
            name in ("tools", "documents") and not value
        )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False, **variables: Any,
    ) -> str:
        """The prompt. variables: values that the template reads (enable_thinking, preserve_thinking, add_vision_id, ...).

        ValueError if the template rejects the messages, with the template's message, if the sandbox stops it, or if it
        exceeds its budget. The message names the message and the line of the template.
        """
        own = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        self.check_variables(own)
        return self.run(messages, own)

    def run(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
        """The prompt, from variables that are not checked: the template may ignore any of them."""
        tools = variables.get("tools")
        check_tools(tools)
        chat = [_with_reasoning(message) for message in plain_data(list(messages))]
        values = {"documents": None, **plain_data(variables), "tools": None if tools is None else plain_data(list(tools))}
        values.setdefault("add_generation_prompt", False)
        budget = Budget(chat, values)
        token = enter(budget)
        try:
            return self._template.render({**values, "messages": chat})
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(self._described(error, budget, chat)) from error
        finally:
            leave(token)

    def _described(self, error: Exception, budget: Budget, chat: list[dict[str, Any]]) -> str:
        own = isinstance(error, jinja().TemplateError)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        text = text if len(text) <= 1000 else text[:996] + " ..."
        if own and type(error) is jinja().TemplateError:  # raise_exception: the template's own words suffice
            return f"chat template: {text}"
        where = []
        if budget.turn is not None:
            where.append(f"at message {budget.turn} ({short(chat[budget.turn].get('role'))})")
        line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__))
                     if frame.filename == "<template>"), None)  # fmt: skip
        if line is not None and 0 < line <= self.source.count("\n") + 1:
            where.append(f"line {line}, {short(self.source.splitlines()[line - 1].strip())}")
        return f"chat template: {text}" + (f" ({'; '.join(where)})" if where else "")


def check_tools(tools: Any) -> None:
    """ValueError for tools that are no JSON schemas."""
    if tools is None:
        return
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
        raise ValueError(f"tools is a list of JSON schemas, got {type(tools).__name__}")
    for tool in tools:
        if not isinstance(tool, Mapping):
            hint = "; transformers.utils.get_json_schema makes one of a function" if callable(tool) else ""
            raise ValueError(
                "a tool is a JSON schema: {'type': 'function', 'function': {'name': ..., 'parameters': ...}}, got "
                f"{short(tool)}{hint}"
            )
        _check_json(tool)


def _check_json(value: Any) -> None:
    """ValueError for an object in a schema that JSON has no form for: a prompt would show the name of its type."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        elif value is not None and not isinstance(value, (str, int, float)) and not dataclasses.is_dataclass(value):
            raise ValueError(f"a tool is a JSON schema, which cannot hold {short(value)} ({type(value).__name__})")


def _meta() -> Any:
    jinja()
    from jinja2 import meta

    return meta


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
        raise ValueError(f"a message is a mapping with role and content, got {short(message)}")
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
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
