"""processing/arguments.py and reply.py: arguments of tool calls typed by JSON schema; replies in linear time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35moe.processing.arguments import typed_value
from qwen35moe.processing.reply import Reply, ToolCall, parse_call, parse_pieces

LONG = "9" * 5000
ROOT: dict[str, Any] = {
    "$defs": {"Color": {"enum": ["red", "blue"]}, "Flag": {"type": "boolean"}, "Loop": {"$ref": "#/$defs/Loop"},
              "Point": {"type": "object", "properties": {"x": {"type": "integer"}, "on": {"$ref": "#/$defs/Flag"}}}},
    "definitions": {"Old": {"type": "integer"}},
}  # fmt: skip

CASES: list[tuple[Any, str, Any]] = [
    # one type
    ({"type": "boolean"}, "true", True), ({"type": "boolean"}, "True", True), ({"type": "boolean"}, " False\n", False),
    ({"type": "boolean"}, "yes", "yes"), ({"type": "boolean"}, "1", "1"), ({"type": "integer"}, "5", 5),
    ({"type": "integer"}, "5.0", 5), ({"type": "integer"}, "-7", -7), ({"type": "integer"}, "5.5", "5.5"),
    ({"type": "integer"}, "1e3", 1000), ({"type": "integer"}, "True", "True"), ({"type": "integer"}, LONG, LONG),
    ({"type": "number"}, "5", 5), ({"type": "number"}, "5.5", 5.5), ({"type": "number"}, "-.5e-3", -0.0005),
    ({"type": "number"}, "NaN", "NaN"), ({"type": "number"}, "inf", "inf"), ({"type": "number"}, "1e999", "1e999"),
    ({"type": "number"}, "1_000", "1_000"), ({"type": "null"}, "None", None), ({"type": "null"}, "null", None),
    ({"type": "null"}, "", ""), ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
    ({"type": "object"}, '{"a": true}', {"a": True}), ({"type": "object"}, "[1]", "[1]"),
    ({"type": "object"}, "{1: 2}", "{1: 2}"),
    ({"type": "array"}, "[1, 'x', False]", [1, "x", False]), ({"type": "array"}, "(1, 2)", "(1, 2)"),
    ({"type": "array"}, "[(1, 2)]", "[(1, 2)]"), ({"type": "array"}, "[" * 3000, "[" * 3000),
    ({"type": "array"}, "[open('x')]", "[open('x')]"), ({"type": "object"}, "{'a'}", "{'a'}"),
    # text stays text
    ({"type": "string"}, "5", "5"), ({"type": "string"}, "True", "True"), ({"type": "string"}, " x ", " x "),
    ({"type": "string"}, '{"a": 1}', '{"a": 1}'), ({}, "5", "5"), (None, "5", "5"), ({"description": "d"}, "null", "null"),
    ({"type": "strange"}, "5", "5"), ({"type": 3}, "5", "5"), ("integer", "5", "5"),
    # unions
    ({"type": ["integer", "null"]}, "None", None), ({"type": ["integer", "null"]}, "4", 4),
    ({"type": ["string", "null"]}, "null", None), ({"type": ["string", "null"]}, "4", "4"),
    ({"type": ["string", "integer"]}, "4", "4"), ({"type": ["number", "boolean"]}, "True", True),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
    ({"anyOf": [{"type": "boolean"}, {"type": "integer"}]}, "3", 3),
    ({"oneOf": [{"type": "array"}, {"type": "object"}]}, "{'a': 1}", {"a": 1}),
    ({"allOf": [{"$ref": "#/$defs/Flag"}]}, "True", True),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "3", "3"), ({"type": "integer", "nullable": True}, "null", None),
    # references
    ({"$ref": "#/$defs/Flag"}, "False", False), ({"$ref": "#/definitions/Old"}, "3", 3), ({"$ref": "#/$defs/None"}, "3", "3"),
    ({"$ref": "#/$defs/Loop"}, "3", "3"), ({"$ref": "http://host/x"}, "3", "3"), ({"$ref": "#/$defs/Color"}, "red", "red"),
    ({"$ref": "#/$defs/Point"}, "{'x': 5.0, 'on': 'True'}", {"x": 5, "on": True}),
    # enum and const
    ({"enum": [1, 2, True]}, "2", 2), ({"enum": [True, False]}, "False", False), ({"enum": ["1", 2]}, "1", "1"),
    ({"enum": [None, "a"]}, "None", None), ({"enum": [0.5, 1.5]}, "1.5", 1.5), ({"const": 7}, "7.0", 7),
    ({"const": True}, "True", True),
    ({"enum": ["a"]}, "b", "b"), ({"type": "integer", "enum": [1]}, "5", 5), ({"const": [1, 2]}, "[1, 2]", [1, 2]),
    # types that the schema only implies, and what is inside
    ({"properties": {"x": {"type": "integer"}}}, "{'x': 2.0}", {"x": 2}), ({"items": {"type": "integer"}}, "[1.0, 2]", [1, 2]),
    ({"type": "array", "items": {"$ref": "#/$defs/Point"}}, "[{'x': 3.0}]", [{"x": 3}]),
    ({"type": "object", "additionalProperties": {"type": "boolean"}}, "{'k': 'False'}", {"k": False}),
    ({"type": "array", "items": {"type": "string"}}, "['1', '2']", ["1", "2"]),
]  # fmt: skip


@pytest.mark.parametrize("schema, text, expected", CASES, ids=lambda value: str(value)[:30])
def test_values_are_typed_by_schema(schema: Any, text: str, expected: Any) -> None:
    value = typed_value(text, "p", {"type": "object", "properties": {"p": schema}, **ROOT})
    assert value == expected and type(value) is type(expected) and repr(value) == repr(expected)


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}},
    {"name": "g", "input_schema": {"properties": {"n": {"type": "integer"}}}},
    {"name": "h", "inputSchema": {"anyOf": [{"properties": {"n": {"type": "integer"}}}]}},
    {"name": "i", "parameters": {"additionalProperties": {"type": "integer"}}}, {"type": "web_search"},
    {"function": {"name": 3}},
]  # fmt: skip


def parsed(text: str, tools: Any = None) -> Reply:
    pieces = [(False, "a "), (True, "<tool_call>"), (False, text), (True, "</tool_call>"), (False, "\nb")]
    return parse_pieces(pieces, tools=tools)


def test_tools_in_the_forms_of_other_apis() -> None:
    for name in "fghi":
        reply = parsed(f"\n<function={name}>\n<parameter=n>\n4\n</parameter>\n</function>\n", TOOLS)
        assert reply.tool_calls == (ToolCall(name, {"n": 4}),) and reply.content == "a \nb"
        assert parsed(f'{{"name": "{name}", "arguments": {{"n": "4"}}}}', TOOLS).tool_calls == (ToolCall(name, {"n": 4}),)
    with pytest.raises(ValueError, match="a tool is a JSON schema, got function"):
        parsed("x", [parsed])


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"name": "k", "arguments": {"a": [1, "x"], "b": "True"}}', ToolCall("k", {"a": [1, "x"], "b": "True"})),
        ('\n{"name": "k", "arguments": "{\\"a\\": 1}"}\n', ToolCall("k", {"a": 1})), ('{"name": "k"}', ToolCall("k", {})),
        ('{"name": "k", "parameters": {"a": 1}}', ToolCall("k", {"a": 1})), ('{"name": 3}', None), ("{", None), ("[1]", None),
        ('{"name": "k", "arguments": [1]}', None), ('{"name": "k", "arguments": "x"}', None), ("{" * 50_000, None),
        ("<function=k></function>", ToolCall("k", {})), ("<function=k>\n</function>", ToolCall("k", {})), ("", None),
        ("<function=k><parameter=a>1</parameter><parameter=a>2</parameter></function>", ToolCall("k", {"a": "2"})),
        ("<function=k><parameter=a>\n\n1\n\n</parameter></function>", ToolCall("k", {"a": "\n1\n"})),
        ("<function=k><parameter=a>x </function> y</parameter></function>", ToolCall("k", {"a": "x </function> y"})),
        ("<function=k><parameter=>1</parameter></function>", None), ("<function=>\n</function>", None),
        ("<function=k\n></function>", None), ("<function=k><parameter=a\n>1</parameter></function>", None),
        ("<function=k><parameter=a>1</function>", None), ("<function=k></function>x", None), ("<function=k", None),
        ("<function=k><parameter=a></parameter=b>1</parameter></function>", ToolCall("k", {"a": "</parameter=b>1"})),
    ],
)  # fmt: skip
def test_calls_are_parsed(text: str, expected: ToolCall | None) -> None:
    assert parse_call(text, {}) == expected
    reply = parsed(text)
    assert reply.tool_calls == (() if expected is None else (expected,))
    assert reply.content == ("a \nb" if expected else f"a <tool_call>{text}</tool_call>\nb")


class Counted(str):
    """Text that counts the characters that its searches may look at."""

    seen = 0

    def find(self, *args: Any) -> int:
        at = super().find(*args)
        start = args[1] if len(args) > 1 else 0
        stop = args[2] if len(args) > 2 else len(self)
        Counted.seen += (stop if at < 0 else at) - start + 1
        return at

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        Counted.seen += len(value)
        return value

    def strip(self, *args: Any) -> Any:
        return Counted(super().strip(*args))


@pytest.mark.parametrize(
    "form",
    ["<function=f>{}</function>", "<function=f><parameter=a>{}</parameter></function>", "{}", "<function=f>{}",
     "<function={}"],
)  # fmt: skip
@pytest.mark.parametrize(
    "unit", ["\n", "<parameter=a>", "</parameter>", "<parameter=a>1</parameter>", "<parameter=", ">", " x"]
)
def test_time_is_linear_in_the_reply(form: str, unit: str) -> None:
    """Twice the reply, at most a little more than twice the characters that are looked at."""
    seen = []
    for count in (500, 1000):
        Counted.seen = 0
        parse_call(Counted(form.format(unit * count)), {})
        seen.append(Counted.seen)
    assert seen[1] <= 2.2 * seen[0] + 200 and seen[1] <= 6 * 1000 * len(unit) + 200


WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "x", "\n", "<function=f>", "</function>"]


@given(st.lists(st.sampled_from(WORDS)))
def test_no_text_of_a_reply_is_lost(words: list[str]) -> None:
    """Every piece is in the reasoning, in the content, or in a call; only the marks of reasoning and of calls are not."""
    control = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    reply = parse_pieces([(word in control, word) for word in words])
    assert reply.reasoning.count("x") + reply.content.count("x") == words.count("x")


def test_many_marks() -> None:
    """120,000 pieces; a quadratic parser would need minutes for them."""
    pieces = [(True, "<think>"), (False, " ")] * 20_000 + [(True, "<tool_call>")] * 20_000
    pieces += [(True, "</think>"), (False, "x")] * 20_000
    assert parse_pieces(pieces).reasoning.count(" ") == 20_000
    assert parse_pieces(pieces[1:], thinking=False).content.count("x") <= 20_000
