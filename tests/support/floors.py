"""The import floors of docs/architecture.md as data, and the functions that read a file's imports.

`FLOORS` is in order from bottom to top, each floor from left to right. A file may import from all floors below its own, from
parts of its own floor further left, and from its own part.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "qwen35moe"

# A part is a file or a package directly inside qwen35moe/. Some parts do not exist yet.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("names", "files", "figures", "compat"),
    ("config",),
    ("taps", "backends"),
    ("ops",),
    ("cache", "routing"),
    ("modules",),
    ("models",),
    ("checkpoint", "processing"),
    ("generation", "training"),
    ("loading",),
    ("surgery", "parity"),
    ("cli",),
    ("__main__",),
)

# The only allowed upward imports, inside a function: (file, function) -> parts that it may import.
DOORS: dict[tuple[str, str], tuple[str, ...]] = {
    ("qwen35moe/models/pretrained.py", "from_pretrained"): ("checkpoint",),
    ("qwen35moe/models/pretrained.py", "checkpoint_folder"): ("checkpoint",),
    ("qwen35moe/models/pretrained.py", "save_pretrained"): ("checkpoint",),
    ("qwen35moe/models/base.py", "generate"): ("generation",),
    ("qwen35moe/models/base.py", "stream"): ("generation",),
}

# Not imported at the top of any file of qwen35moe/: the library runs without them.
OPTIONAL = (
    *("transformers", "tokenizers", "jinja2", "huggingface_hub", "matplotlib", "numpy", "PIL", "av"),
    *("triton", "fla", "causal_conv1d", "flash_attn", "qwen35moe_kernels"),
)


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute dotted name, and the line and function that import it."""

    module: str
    line: int
    function: str | None  # None: executed when the file is imported
    typing_only: bool  # under `if TYPE_CHECKING:`


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; `from . import x` counts as the module x."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    yield from _walk(ast.parse(path.read_text(encoding="utf-8")), package, None, False)


def _walk(node: ast.AST, package: str, function: str | None, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, function, typing_only)
        elif isinstance(child, ast.ImportFrom):
            for module in _from(child, package):
                yield Import(module, child.lineno, function, typing_only)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, package, function or child.name, typing_only)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), package, function, True)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), package, function, typing_only)
        else:
            yield from _walk(child, package, function, typing_only)


def _from(node: ast.ImportFrom, package: str) -> list[str]:
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
    # In `from package import name`, name may be a module. For the top package every name counts as one, so that
    # `from qwen35moe import Config` is an error in all other files.
    names = [f"{base}.{alias.name}" for alias in node.names]
    return names if base == PACKAGE else [name if _is_module(name) else base for name in names]


def _is_module(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def part_of(module: str) -> str | None:
    """'qwen35moe.ops.norm' -> 'ops'; 'qwen35moe' -> ''; any other package -> None."""
    head, _, rest = module.partition(".")
    return rest.split(".")[0] if head == PACKAGE else None


def height(part: str) -> tuple[int, int]:
    """(floor, index on it); ValueError for a part without a floor."""
    for floor, parts in enumerate(FLOORS):
        if part in parts:
            return floor, parts.index(part)
    raise ValueError(f"{PACKAGE}/{part} has no floor: add it to FLOORS and to docs/architecture.md")


def files(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )
