"""docs/guide/from_transformers.md is generated from the tables of qwen35moe.compat, and every row names a test that exists."""

from __future__ import annotations

import ast
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen35moe
from qwen35moe.compat import TABLE, Keyword, read_keywords
from qwen35moe.compat.attributes import ATTRIBUTES
from tests.support.floors import ROOT

GENERATOR = ROOT / "docs/guide/from_transformers.py"


def rows() -> Iterator[tuple[str, str]]:
    """(name of a row, the test that it names)."""
    for method, table in TABLE.items():
        yield from ((f"{method}: {keyword.name}", keyword.tested_by) for keyword in table)
    yield from ((f"attribute: {row.name}", row.tested_by) for row in ATTRIBUTES)


def collected(path: Path) -> set[str]:
    """The names of the tests that pytest collects in a file: functions, and methods of classes as Class::test."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            names |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef) and f.name[:4] == "test"}
    return names


def test_the_page_is_up_to_date() -> None:
    generator = runpy.run_path(str(GENERATOR))
    assert generator["PAGE"].read_text(encoding="utf-8") == generator["page"](), f"run python {GENERATOR.relative_to(ROOT)}"


def test_every_row_names_a_test_that_exists() -> None:
    tests: dict[str, set[str]] = {}
    wrong = []
    for name, tested_by in rows():
        path, _, function = tested_by.partition("::")
        file = ROOT / path
        if not path.startswith("tests/") or not file.name.startswith("test_") or not file.is_file():
            wrong.append(f"{name}: {tested_by!r} is no file of tests")
            continue
        tests.setdefault(path, collected(file))
        if function and function.partition("[")[0] not in tests[path]:
            wrong.append(f"{name}: {path} has no test {function}")
        elif not function:
            wrong.append(f"{name}: {tested_by!r} names no test")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("method", TABLE)
def test_every_row_says_what_happens(method: str) -> None:
    """A row is translated, accepted or refused with a way out, and no name comes twice."""
    table = TABLE[method]
    names = [keyword.name for keyword in table]
    assert len(set(names)) == len(names)
    for keyword in table:
        assert keyword.becomes or keyword.does or keyword.instead or keyword.neutral, keyword.name
        if not keyword.does and not keyword.becomes and not callable(keyword.neutral):
            with pytest.raises(ValueError, match=keyword.name):
                read_keywords(method, [keyword], {keyword.name: object()}, ())


def test_rows_of_a_methods_own_keywords_are_in_its_signature() -> None:
    parameters = inspect.signature(qwen35moe.Qwen3_5MoeForCausalLM.forward).parameters
    missing = [keyword.name for keyword in TABLE["forward"] if keyword.does and keyword.name not in parameters]
    assert not missing, missing


def test_values_that_mean_the_same_are_compared() -> None:
    import torch

    table = [Keyword("a", becomes="b"), Keyword("c", becomes="b", convert=lambda value: value + 1)]
    x = torch.arange(3)
    assert read_keywords("f", table, {"a": x, "b": x.clone()}, ("b",))["b"] is not None
    assert read_keywords("f", table, {"a": 3, "c": 2}, ()) == {"b": 3}
    for keywords in ({"a": x, "b": x + 1}, {"a": x, "b": x[:2]}, {"a": x, "b": 3}, {"a": 3, "c": 3}):
        with pytest.raises(ValueError, match="mean the same: give b"):
            read_keywords("f", table, keywords, ("b",))


def test_values_that_python_does_not_print_are_refused_with_the_way_out() -> None:
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep]
    table = [Keyword("beams", neutral=(1,), instead="give 1")]
    for value, text in ((10**5000, "an integer of 16610 bits"), (deep, "<list>")):
        with pytest.raises(ValueError, match=rf"f\(beams={text}\) is not supported: give 1"):
            read_keywords("f", table, {"beams": value}, ())
    while deep:  # a list as deep as this one is freed level by level
        deep = deep.pop()  # type: ignore[assignment]
