"""A model's reply, parsed: reasoning, answer and tool calls.

    reasoning </think> answer <tool_call><function=NAME><parameter=KEY> value </parameter></function></tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINK_START, THINK_END, CALL_START, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKUP = (THINK_START, THINK_END, CALL_START, CALL_END)

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


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


def parse_pieces(
    pieces: Sequence[tuple[bool, str]], *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
) -> Reply:
    """A Reply from (is a control token, text) in order. thinking: the prompt ended inside <think>."""
    reasoning, content, calls = "", "", []
    functions = (tool.get("function", tool) for tool in tools or ())
    schemas = {function["name"]: function for function in functions if function.get("name")}
    call_text: str | None = None  # the text of an open call so far
    for control, text in pieces:
        token = text if control else None
        if token == THINK_END and thinking:
            thinking = False
        elif token == THINK_START and not thinking and not content.strip() and not calls and call_text is None:
            thinking = True
        elif thinking:
            reasoning += text
        elif token == CALL_START:
            content += "" if call_text is None else CALL_START + call_text
            call_text = ""
        elif token == CALL_END and call_text is not None:
            call = _parse_call(call_text, schemas)
            if call is None:
                content += CALL_START + call_text + CALL_END
            else:
                calls.append(call)
            call_text = None
        elif call_text is not None:
            call_text += text
        else:
            content += text
    content += "" if call_text is None else CALL_START + call_text
    return Reply(reasoning.strip("\n"), content.strip("\n"), tuple(calls), thinking)


def _parse_call(text: str, schemas: Mapping[str, Any]) -> ToolCall | None:
    """The tool call written in the text, or None if it is malformed."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return None
    name, body = function[1].strip(), function[2]
    if _PARAMETER.sub("", body).strip():
        return None
    types = (schemas.get(name, {}).get("parameters") or {}).get("properties") or {}
    parameters = ((match[1].strip(), match[2]) for match in _PARAMETER.finditer(body))
    return ToolCall(name, {key: _value(text, types.get(key)) for key, text in parameters})


def _value(text: str, schema: Any) -> Any:
    """The text itself, or its JSON value if the schema does not allow a string."""
    types = schema.get("type") if isinstance(schema, Mapping) else None
    types = [types] if isinstance(types, str) else types or ["string"]
    if "string" in types:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
