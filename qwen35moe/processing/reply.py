"""A model's reply, parsed: reasoning, answer and tool calls.

    reasoning </think> answer <tool_call><function=NAME><parameter=KEY> value </parameter></function></tool_call>
    reasoning </think> answer <tool_call>{"name": NAME, "arguments": {KEY: value}}</tool_call>
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..compat import short
from .arguments import schemas_of, typed_arguments, typed_value
from .padding import as_lists
from .pieces import Pieces
from .template import Marks

if TYPE_CHECKING:
    from .text import Tokenizer

THINK_START, THINK_END, CALL_START, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKUP = (THINK_START, THINK_END, CALL_START, CALL_END)

_FUNCTION, _FUNCTION_END, _PARAMETER, _PARAMETER_END = "<function=", "</function>", "<parameter=", "</parameter>"


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments: strings, or values of the types that the tool's schema declares."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """reasoning and content without newlines at their ends; a malformed tool call stays in the content.

    thinking: the reply ended inside its reasoning.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    thinking: bool = False

    def message(self) -> dict[str, Any]:
        """The reply as an assistant message, to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls]
            message["tool_calls"] = calls
        return message


def split_reply(tokenizer: Tokenizer, reply: str | Tensor | Sequence[int]) -> Pieces:
    """A reply or prompt split at its control tokens; of ids, special tokens are left out, of text, end tokens."""
    names = {number: text for text, number in tokenizer.added_tokens.items()}
    if isinstance(reply, str):
        ends = [names[number] for number in tokenizer.eos_token_ids if number in names]
        return [piece for piece in Marks.absent_from(reply).split(reply, [*MARKUP, *ends]) if piece[1] not in ends]
    ids: Any = as_lists(reply)
    try:
        ids = [operator.index(number) for number in ids]
    except TypeError:
        raise ValueError(
            f"a reply or prompt is text or one row of ids, got {short(ids)}: pass ids[0] of a batch of one"
        ) from None
    pieces: Pieces = []
    for control, group in groupby(ids, key=lambda number: number in names):
        if control:
            tokens = (names[number] for number in group)
            pieces += [(True, token) for token in tokens if token not in tokenizer.special_tokens]
        else:
            pieces.append((False, tokenizer.decode(list(group))))
    return pieces


def starts_in_reasoning(reply: Pieces, prompt: Pieces | None) -> bool:
    """Whether a reply begins inside <think>: the prompt opened it last, or, without the prompt, </think> comes first."""
    if prompt is None:
        return _first_think_token(reply) == THINK_END
    return _first_think_token(reversed(prompt)) == THINK_START


def _first_think_token(pieces: Iterable[tuple[bool, str]]) -> str | None:
    return next((text for control, text in pieces if control and text in (THINK_START, THINK_END)), None)


def parse_pieces(
    pieces: Sequence[tuple[bool, str]], *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
) -> Reply:
    """A Reply from (is a control token, text) in order, in time linear in the text. thinking: the prompt ended inside
    <think>."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    schemas = schemas_of(tools)
    call: list[str] | None = None  # the text of an open call so far
    blank = True  # the content has no other characters than blanks
    for control, text in pieces:
        token = text if control else None
        if token == THINK_END and thinking:
            thinking = False
        elif token == THINK_START and not thinking and blank and not calls and call is None:
            thinking = True
        elif thinking:
            reasoning.append(text)
        elif token == CALL_START:
            if call is not None:
                content += [CALL_START, *call]
                blank = False
            call = []
        elif token == CALL_END and call is not None:
            parsed = parse_call("".join(call), schemas)
            if parsed is None:
                content += [CALL_START, *call, CALL_END]
                blank = False
            else:
                calls.append(parsed)
            call = None
        elif call is not None:
            call.append(text)
        else:
            content.append(text)
            blank = blank and not text.strip()
    if call is not None:
        content += [CALL_START, *call]
    return Reply("".join(reasoning).strip("\n"), "".join(content).strip("\n"), tuple(calls), thinking)


def parse_call(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """The tool call written in the text, or None if it is malformed. schemas: of the arguments, by the function's name.

    Qwen3.5's form is <function=NAME><parameter=KEY>VALUE</parameter></function>, older models' is JSON: {"name": ...,
    "arguments": {...}}. Each character is looked at a fixed number of times.
    """
    text = text.strip()
    if text.startswith("{"):
        return _parse_json_call(text, schemas)
    start = text.find(">")
    if not text.startswith(_FUNCTION) or start < 0 or not text.endswith(_FUNCTION_END):
        return None
    name, at, end = text[len(_FUNCTION) : start], start + 1, len(text) - len(_FUNCTION_END)
    if not name or "\n" in name or at > end:
        return None
    name, arguments = name.strip(), {}
    schema = schemas.get(name, {})
    while True:
        while at < end and text[at].isspace():
            at += 1
        if at == end:
            return ToolCall(name, arguments)
        start, stop = text.find(">", at, end), text.find(_PARAMETER_END, at, end)
        key = text[at + len(_PARAMETER) : start] if start >= 0 else ""
        if not text.startswith(_PARAMETER, at) or not key or "\n" in key or stop < start:
            return None
        value = text[start + 1 : stop].removeprefix("\n").removesuffix("\n")
        arguments[key.strip()] = typed_value(value, key.strip(), schema)
        at = stop + len(_PARAMETER_END)


def _parse_json_call(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    try:
        call = json.loads(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, typed_arguments(arguments, schemas.get(name, {})))
