"""jinja2's immutable sandbox with transformers' extensions, in which every operation is charged to a `Budget`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

from .budget import (
    BudgetError,
    check_format,
    check_join,
    check_method,
    check_operator,
    check_percent,
    check_replace,
    counted,
    current,
    size,
)
from .optional import require

OPERATORS = frozenset(["+", "-", "*", "/", "//", "**", "%"])
# No chat template needs these, and their cost is hard to bound.
_LEFT_OUT = ("urlize", "wordwrap", "xmlattr", "pprint", "striptags")
# Filters that go once over what they are given; the others may print or compare everything inside it.
_SHALLOW = {"list", "first", "last", "length", "count", "default", "d", "items", "map", "select", "reject", "selectattr",
            "rejectattr", "batch", "slice", "reverse", "attr", "random"}  # fmt: skip
_SORTING = {"sort", "unique", "groupby", "dictsort", "min", "max"}
_DEEP_TESTS = {"in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "gt", "greaterthan", ">", "le", "<=", "ge", ">="}


def jinja() -> Any:
    return require("jinja2", "chat templates need the package jinja2", "text")


@functools.cache
def environment() -> Any:
    """The environment of all templates: a template's state is in its rendering."""
    jinja2 = jinja()
    sandbox = _sandbox_class(jinja2)(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(jinja2), "jinja2.ext.loopcontrols"],
        optimized=False, finalize=jinja2.pass_context(_finalize),
    )  # fmt: skip
    for name in _LEFT_OUT:
        del sandbox.filters[name]
    del sandbox.globals["lipsum"]
    sandbox.filters["tojson"] = tojson
    sandbox.filters.update({name: _charged(name, function) for name, function in sandbox.filters.items()})
    sandbox.tests.update({name: _charged_test(name, function) for name, function in sandbox.tests.items()})
    sandbox.filters |= {"_tick": _tick, "_weigh": _weigh, "_concat": _concat, "_iterate": _iterate}
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _sandbox_class(jinja2: Any) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    transformer = _transformer(jinja2)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = OPERATORS

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return transformer.visit(super()._parse(source, name, filename))

        def getitem(self, obj: Any, argument: Any) -> Any:
            if not isinstance(argument, (str, int)):
                current().deep(argument)  # the message about a missing key prints it
            return super().getitem(obj, argument)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
            if isinstance(__obj, BuiltinMethodType):
                args = check_method(__obj, args, kwargs)
            elif isinstance(__obj, type) or type(__obj).__name__ != "Macro":
                current().deep([list(args), kwargs])
            result = super().call(__context, __obj, *args, **kwargs)
            if isinstance(result, (str, list, tuple, dict)):
                current().shallow(result)
            return result

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None

            def limited(*args: Any, **kwargs: Any) -> str:
                check_format(value.__self__, args, kwargs)
                return wrapped(*args, **kwargs)

            return limited

    return Sandbox


def _generation(jinja2: Any) -> Any:
    from jinja2.ext import Extension

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's text for training; rendering ignores the marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


# ------------------------------------------------------------------------------------------- charges in the program itself


def _transformer(jinja2: Any) -> Any:
    from jinja2.visitor import NodeTransformer

    nodes = jinja2.nodes

    def apply(name: str, node: Any, *args: Any, lineno: int) -> Any:
        return nodes.Filter(node, name, [nodes.Const(value, lineno=lineno) for value in args], [], None, None, lineno=lineno)

    def tick(body: list[Any], item: Any, lineno: int) -> Any:
        """A statement that charges for one run of a body: its nodes and its constant text."""
        cost = 1 + sum(_cost(nodes, node) for node in body)
        return nodes.ExprStmt(apply("_tick", item, cost, lineno=lineno), lineno=lineno)

    class Charges(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            named = isinstance(node.target, nodes.Name) and node.target.name != "loop"
            item = nodes.Name(node.target.name, "load", lineno=node.lineno) if named else nodes.Const(None, lineno=node.lineno)
            body = tick(node.body, item, node.lineno)
            node = self.generic_visit(node)
            node.body.insert(0, body)
            node.iter = apply("_iterate", node.iter, lineno=node.lineno)
            if node.test is not None:
                charge = apply("_tick", nodes.Const(True, lineno=node.lineno), 4, lineno=node.lineno)
                node.test = nodes.And(charge, node.test, lineno=node.lineno)
            return node

        def _body(self, node: Any) -> Any:
            body = tick(node.body, nodes.Const(None, lineno=node.lineno), node.lineno)
            node = self.generic_visit(node)
            node.body.insert(0, body)
            return node

        visit_Macro = visit_CallBlock = _body

        def visit_Concat(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return apply("_concat", nodes.List(node.nodes, lineno=node.lineno), lineno=node.lineno)

        def visit_Compare(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.expr = apply("_weigh", node.expr, lineno=node.lineno)
            for operand in node.ops:
                operand.expr = apply("_weigh", operand.expr, lineno=node.lineno)
            return node

        def visit_Getitem(self, node: Any) -> Any:
            node = self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = apply("_iterate", node.node, lineno=node.lineno)
            return node

    return Charges()


def _cost(nodes: Any, node: Any) -> int:
    count = len(node.data) // 16 if isinstance(node, nodes.TemplateData) else 0
    return 1 + count + sum(_cost(nodes, child) for child in node.iter_child_nodes())


def _tick(item: Any, cost: int) -> bool:
    budget = current()
    budget.charge(cost)
    if type(item) is dict:
        budget.turn = budget.turns.get(id(item), budget.turn)
    return True


def _weigh(value: Any) -> Any:
    current().deep(value)
    return value


def _iterate(value: Any) -> Any:
    current().shallow(value)
    return value


def _concat(values: list[Any]) -> str:
    budget = current()
    budget.deep(values)
    text = "".join(map(str, values))
    budget.text(len(text))
    return text


def _finalize(context: Any, value: Any) -> Any:
    current().deep(value)
    return value


# ------------------------------------------------------------------------------------------------------ filters and tests


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for what it is given before it runs, and for its result."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget, arguments = current(), list(args[skipped:])
        value = arguments[0] if arguments else None
        if isinstance(value, Iterator):
            value = arguments[0] = counted(value)
        for other in arguments if name not in _SHALLOW else arguments[1:]:
            budget.deep(other)
        budget.deep(kwargs)
        if name in _SORTING:
            for _ in range(size(value).bit_length()):
                budget.deep(value)
        if name in _SHALLOW or name in _SORTING:
            budget.charge(1 + size(value))  # a list of characters has as many elements
        arguments = _guarded(name, arguments, kwargs)
        result = function(*args[:skipped], *arguments, **kwargs)
        if isinstance(result, Iterator):
            return counted(result)
        if isinstance(result, (str, bytes, list, tuple, dict)):
            budget.shallow(result)
        return result

    return charged


def _guarded(name: str, arguments: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a filter whose result may be much larger than they are, charged for the result."""
    budget = current()

    def argument(index: int, key: str, default: Any) -> Any:
        return arguments[index] if len(arguments) > index else kwargs.get(key, default)

    def number(index: int, key: str, default: int) -> int:
        value = argument(index, key, default)
        return max(0, value) if isinstance(value, int) else 0

    if name in ("title", "wordcount") and arguments:
        budget.charge(size(arguments[0]))  # a list of words
    elif name == "center":
        budget.text(number(1, "width", 80))
    elif name in ("batch", "slice"):
        budget.charge(number(1, "linecount" if name == "batch" else "slices", 1))
    elif name == "round" and number(1, "precision", 0) > 100:
        raise BudgetError("round to more than 100 digits")
    elif name == "sum" and not isinstance(argument(2, "start", 0), (int, float)):
        raise BudgetError("a sum of other values than numbers")
    elif name == "indent":
        width = argument(1, "width", 4)
        width = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
        budget.text(max(0, width) * (str(arguments[0]).count("\n") + 1))
    elif name == "replace" and len(arguments) > 2:
        check_replace(str(arguments[0]), arguments[1], arguments[2])
    elif name == "join" and arguments:
        arguments = [check_join(str(argument(1, "d", "")), arguments[0]), *arguments[1:]]
    elif name == "format" and arguments:
        check_percent(str(arguments[0]), kwargs or tuple(arguments[1:]))
    elif name == "tojson":
        for key, position in (("indent", 2), ("separators", 3)):
            value = argument(position, key, None)
            if (value if isinstance(value, int) else size(value)) > 100 or any(map(lambda part: size(part) > 100, value)
                    if isinstance(value, (list, tuple)) else ()):  # fmt: skip
                raise BudgetError(f"tojson with {key} of more than 100 characters")
    return arguments


def _charged_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        if name in _DEEP_TESTS:
            current().deep(list(args))
        else:
            current().charge(1)
            if name in ("upper", "lower") and args:
                current().shallow(args[0])
        return function(*args, **kwargs)

    return charged


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON, without the HTML escapes of jinja2's filter of this name."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # The characters of `Marks` are not escaped: they are removed after rendering.
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda match: json.dumps(match[0])[1:-1], text)


def _raise_exception(message: Any) -> None:
    raise jinja().TemplateError(str(message)[:1000])


def _strftime_now(form: Any) -> str:
    if not isinstance(form, str) or len(form) > 1000 or re.search(r"%[-_0^#+]*\d", form):
        raise BudgetError("strftime_now with a format of more than 1,000 characters or with a width")
    return datetime.now().strftime(form)
