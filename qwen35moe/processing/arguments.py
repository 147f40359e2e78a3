"""Arguments of a tool call, which a model writes as text, to values of the types that the tool's JSON schema declares.

Published chat templates print booleans and None as Python does, and models write them back, so both spellings are read. A text
that does not fit its schema stays text.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 32  # of references and unions in a schema, and of values in one another
MAX_LITERAL = 1 << 18  # characters of a Python literal: its parser needs a hundred times as much memory
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d{1,4000}")
_ORDER = ("null", "boolean", "integer", "number", "array", "object")
_NOTHING = object()


def schemas_of(tools: Any) -> dict[str, Mapping[str, Any]]:
    """The schema of the arguments of each function, by its name; tools as OpenAI's, Anthropic's or MCP's API takes them."""
    schemas = {}
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ValueError(f"a tool is a JSON schema, got {type(tool).__name__}")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            continue
        candidates = (function.get(key) for key in ("parameters", "input_schema", "inputSchema"))
        schemas[function["name"]] = next((schema for schema in candidates if isinstance(schema, Mapping)), {})
    return schemas


def typed_value(text: str, name: str, schema: Mapping[str, Any]) -> Any:
    """The value of the argument `name`, written as text. schema: that of all arguments of the function."""
    return _read(text, list(_alternatives(_property(schema, name, schema), schema)), schema)


def typed_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that were written as JSON: numbers and nested values as the schema declares them."""
    return {name: _coerced(value, _property(schema, name, schema), schema, 0) for name, value in arguments.items()}


def _property(schema: Any, name: str, root: Mapping[str, Any]) -> Any:
    """The schema of a key: its own, else that of additional properties."""
    for part in _alternatives(schema, root):
        properties = part.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            return properties[name]
    for part in _alternatives(schema, root):
        if isinstance(part.get("additionalProperties"), Mapping):
            return part["additionalProperties"]
    return None


def _alternatives(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The schemas without references and unions that a schema stands for."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return
    yield schema
    if isinstance(reference := schema.get("$ref"), str):
        yield from _alternatives(_referenced(reference, root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts[:MAX_DEPTH] if isinstance(parts, (list, tuple)) else ():
            yield from _alternatives(part, root, depth + 8)


def _referenced(reference: str, root: Any) -> Any:
    """The schema at "#/$defs/Name"."""
    if not reference.startswith("#"):
        return None
    for key in filter(None, reference[1:].split("/")):
        key = key.replace("~1", "/").replace("~0", "~")
        root = root.get(key) if isinstance(root, Mapping) else None
    return root


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that one schema names itself."""
    types = schema.get("type")
    listed = types if isinstance(types, (list, tuple)) else [types]
    named = {name for name in listed if isinstance(name, str)}
    if not named and isinstance(schema.get("properties"), Mapping):
        named = {"object"}
    if not named and isinstance(schema.get("items"), Mapping):
        named = {"array"}
    return named | ({"null"} if schema.get("nullable") is True else set())


def _read(text: str, alternatives: Sequence[Mapping[str, Any]], root: Mapping[str, Any]) -> Any:
    members = [member for schema in alternatives for member in _members(schema)]
    types = set().union(*map(_types, alternatives)) if alternatives else set()
    if any(isinstance(member, str) and member == text for member in members):
        return text
    for kind in _ORDER:  # enum and const name values, whatever their type
        value = _parsed(text, kind) if members else _NOTHING
        for member in members:
            if value is not _NOTHING and not isinstance(member, str) and _equal(value, member):
                return member
    if "null" in types and (value := _parsed(text, "null")) is None:
        return value
    if "string" in types or not types:
        return text
    for kind in _ORDER:
        if kind in types and (value := _parsed(text, kind)) is not _NOTHING:
            if kind not in ("array", "object"):
                return value
            fitting = next((schema for schema in alternatives if kind in _types(schema)), None)
            return _coerced(value, fitting, root, 0)
    return text


def _members(schema: Mapping[str, Any]) -> list[Any]:
    members = schema.get("enum")
    members = list(members) if isinstance(members, (list, tuple)) else []
    return [*members, schema["const"]] if "const" in schema else members


def _equal(value: Any, member: Any) -> bool:
    """Equal, and both truth values or neither is one: True == 1 in Python."""
    return isinstance(value, bool) == isinstance(member, bool) and value == member


def _parsed(text: str, kind: str) -> Any:
    """The text as a value of one type, or _NOTHING."""
    text = text.strip()
    if kind == "null":
        return None if text in ("null", "None") else _NOTHING
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.lower(), _NOTHING)
    if kind == "integer":
        if _INTEGER.fullmatch(text):
            return int(text)
        number = _parsed(text, "number")
        return int(number) if isinstance(number, float) and number.is_integer() else _NOTHING
    if kind == "number":
        if _INTEGER.fullmatch(text):
            return int(text)
        number = float(text) if _NUMBER.fullmatch(text) else math.inf
        return number if math.isfinite(number) else _NOTHING
    return _container(text, dict if kind == "object" else list)


def _container(text: str, cls: type) -> Any:
    if not text.startswith("{" if cls is dict else "["):
        return _NOTHING
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > MAX_LITERAL:
            return _NOTHING
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return _NOTHING
        if not _is_json(value, 0):
            return _NOTHING
    return value if isinstance(value, cls) else _NOTHING


def _is_json(value: Any, depth: int) -> bool:
    """Whether a literal has a JSON counterpart: no tuples, sets, bytes, complex numbers or keys that are no strings."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item, depth + 1) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item, depth + 1) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _coerced(value: Any, schema: Any, root: Mapping[str, Any], depth: int) -> Any:
    """A JSON value with integers where the schema wants them (5.0 is 5) and typed values inside."""
    alternatives = list(_alternatives(schema, root))
    types = set().union(*map(_types, alternatives)) if alternatives else set()
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return int(value)
    if depth > MAX_DEPTH or not alternatives:
        return value
    if isinstance(value, str) and types and "string" not in types:
        return _read(value, alternatives, root)
    if isinstance(value, dict):
        return {key: _coerced(item, _property(schema, key, root), root, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        items = next((part["items"] for part in alternatives if isinstance(part.get("items"), Mapping)), None)
        return [_coerced(item, items, root, depth + 1) for item in value]
    return value
