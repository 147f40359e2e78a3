"""What a model answered, taken apart: its reasoning, the answer, the calls of tools.

    reasoning </think> answer <tool_call><function=NAME><parameter=KEY> value </parameter></function></tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINK, THOUGHT, CALL, CALLED = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKUP = (THINK, THOUGHT, CALL, CALLED)

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments: strings as written, or values where the tool's schema says their type."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """reasoning and content without the newlines at their ends; a call that cannot be read stays in the content.

    thinking: the reply ended before its reasoning did.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    thinking: bool = False

    def message(self) -> dict[str, Any]:
        """The reply as a message, to go on with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls]
            message["tool_calls"] = calls
        return message


def parse_pieces(
    pieces: Sequence[tuple[bool, str]], *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
) -> Reply:
    """A Reply from (is a control token, text) in turn. thinking: the prompt ended inside <think>, so the reply begins there."""
    reasoning, content, calls = "", "", []
    schemas = {each["name"]: each for tool in tools or () if (each := tool.get("function", tool)).get("name")}
    inside: str | None = None  # the text of a call so far
    for control, text in pieces:
        mark = text if control else None
        if mark == THOUGHT and thinking:
            thinking = False
        elif mark == THINK and not thinking and not content.strip() and not calls and inside is None:
            thinking = True
        elif thinking:
            reasoning += text
        elif mark == CALL:
            content += "" if inside is None else CALL + inside
            inside = ""
        elif mark == CALLED and inside is not None:
            call = _call(inside, schemas)
            if call is None:
                content += CALL + inside + CALLED
            else:
                calls.append(call)
            inside = None
        elif inside is not None:
            inside += text
        else:
            content += text
    content += "" if inside is None else CALL + inside
    return Reply(reasoning.strip("\n"), content.strip("\n"), tuple(calls), thinking)


def _call(text: str, schemas: Mapping[str, Any]) -> ToolCall | None:
    """The call written in the text, or None."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return None
    name, body = function[1].strip(), function[2]
    if _PARAMETER.sub("", body).strip():
        return None
    types = (schemas.get(name, {}).get("parameters") or {}).get("properties") or {}
    return ToolCall(name, {each[1].strip(): _value(each[2], types.get(each[1].strip())) for each in _PARAMETER.finditer(body)})


def _value(text: str, schema: Any) -> Any:
    """The text, or its value where the schema allows no string."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [kinds] if isinstance(kinds, str) else kinds or ["string"]
    if "string" in kinds:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
