"""Pages that name code are current: where.md, the call-flow drawing, and names in backticks."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

from tests.support.floors import PACKAGE, ROOT

SCRIPT = ROOT / "docs/reference/where.py"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WHERE = runpy.run_path(str(SCRIPT))


def test_the_page_of_equations_is_current() -> None:
    page = SCRIPT.with_suffix(".md").read_text(encoding="utf-8")
    assert page == WHERE["render"](), "the code has moved: run `python docs/reference/where.py`"


@pytest.mark.parametrize(
    ("name", "fragment", "message"),
    [
        ("ops/norm.py:rms_norm", "no such line", "'no such line' is on 0 lines of ops/norm.py:rms_norm"),
        ("ops/norm.py:rms_norm", "dtype", "'dtype' is on 3 lines of ops/norm.py:rms_norm"),
        ("ops/norm.py:no_such_norm", "", "no_such_norm is defined in no file"),
        ("_check", "", "_check is defined in .*, .*; correct its entry"),
    ],
)
def test_an_entry_without_a_unique_line_is_an_error(name: str, fragment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WHERE["place"](WHERE["Line"]("y = x", name, fragment), WHERE["index"]() | {"_check": [(SCRIPT, None), (SCRIPT, None)]})


def test_an_entry_is_found_by_name_whatever_stands_around_it() -> None:
    path, number = WHERE["place"](WHERE["Line"]("y = x", "ops/norm.py:rms_norm", "torch.rsqrt"), WHERE["index"]())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "torch.rsqrt" in lines[number - 1]
    start = next(i for i, line in enumerate(lines, 1) if line.startswith("def rms_norm"))
    assert start < number < start + 20


def drawn() -> list[tuple[str, str]]:
    """(file, function) of every label of the call-flow drawing in docs/architecture.md."""
    drawings = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text("utf-8"), flags=re.DOTALL)
    assert len(drawings) == 1
    return re.findall(r"([\w/]+\.py): ([\w.]+)", drawings[0])


def test_every_function_of_the_drawing_exists() -> None:
    labels = drawn()
    assert len(labels) > 20
    defined = {name: [path for path, _ in places] for name, places in WHERE["index"]().items()}
    missing = [label for label in labels if ROOT / PACKAGE / label[0] not in defined.get(label[1], [])]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_names_in_backticks_exist(page: Path) -> None:
    """`tests/ops/test_x.py`, `ops/cpu/x.py` (of the package) and `ops.x.function` or `qwen35moe.x.y`."""
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    paths = [word for span in code for word in span.split() if re.fullmatch(r"[\w/]+/[\w]+\.(py|json|md|txt)", word)]
    missing = [path for path in paths if not any((root / path).exists() for root in (ROOT, ROOT / PACKAGE))]
    names = [span for span in code if re.fullmatch(r"(qwen35moe|ops|modules|models)(\.\w+){2,}", span)]
    missing += [name for name in names if not resolves(name)]
    assert not missing, missing


def resolves(name: str) -> bool:
    """Whether a dotted name leads to a module of the package or to something in one."""
    parts = name.removeprefix(f"{PACKAGE}.").split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join([PACKAGE, *parts[:count]])
        try:
            value: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, and one that it imports does not
            continue
        for part in parts[count:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False
