"""Mutation testing: do the tests notice when one line of the code changes?

    make mutants                                  # the fixed sample of 100
    python -m tests.support.mutants --count 20 --area cache --jobs 1

One expression or statement is changed at a time, in a copy of the repository, and the tests that concern its file run there
until the first failure. A mutant is "found" when a test fails (or the tests do not end), and "survives" otherwise. The sample
is drawn with a fixed seed, in equal shares from the areas below.

Not changed: annotations, docstrings, decorators, `__repr__`, and what is inside `raise` and `assert`: texts, which no test is
to hold word by word. Known tools do not fit: mutmut leaves out decorated functions, which are most of the operations here;
cosmic-ray changes the annotations of parameters (`Tensor | None`) and runs one set of tests for all files.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEED = 12
SECONDS = 600  # of the tests of one mutant

# area -> (files of qwen35moe/, tests that concern them, the quickest first)
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layout": (("cache/layout.py", "models/plan.py", "models/inputs.py", "models/checks.py", "models/packing.py"),
               ("tests/models/test_errors.py", "tests/models/test_keywords.py", "tests/cache/test_cache.py",
                "tests/models/test_packing.py", "tests/models/test_laws.py", "tests/cache", "tests/models/test_transforms.py",
                "tests/models/test_inputs.py", "tests/properties/test_training.py", "tests/models/test_model.py",
                "tests/models/test_parity.py")),
    "cache": (("cache/value.py", "cache/lengths.py", "cache/static.py", "cache/states.py", "cache/view.py", "cache/snapshot.py",
               "cache/modes.py", "cache/ids.py", "cache/file.py"),
              ("tests/cache", "tests/properties/test_cache.py", "tests/modules/test_mixed_dtypes.py",
               "tests/models/test_laws.py", "tests/properties/test_files.py", "tests/generation")),
    "rollback": (("cache/rollback.py",), ("tests/cache", "tests/properties/test_cache.py", "tests/models/test_laws.py")),
    "routing": (("routing/value.py", "routing/file.py", "routing/forced.py", "routing/interventions.py",
                 "routing/statistics.py"),
                ("tests/routing", "tests/properties/test_files.py", "tests/test_files.py", "tests/models/test_model.py",
                 "tests/models/test_parity.py", "tests/cli/test_routing.py")),
    "multimodal": (("models/vision_language.py", "models/vision_inputs.py", "models/vision_positions.py"),
                   ("tests/models/test_vision_positions.py", "tests/models/test_vision_language.py",
                    "tests/models/test_vision_language_parity.py",
                    "tests/models/test_head.py", "tests/models/test_packing.py")),
    "generation": (("generation/loop.py", "generation/prompt.py", "generation/settings.py", "generation/stop.py",
                    "generation/streams.py", "generation/text.py", "generation/masks.py", "generation/defaults.py",
                    "generation/callbacks.py", "generation/output.py", "generation/decoding.py", "generation/late.py"),
                   ("tests/generation", "tests/properties/test_sampling.py", "tests/models/test_vision_language.py",
                    "tests/config/test_generation.py")),
    "sampling": (("ops/sampling.py",), ("tests/ops/test_sampling.py", "tests/properties/test_sampling.py", "tests/generation")),
    "ops": (("ops/norm.py", "ops/rope.py", "ops/mrope.py", "ops/attention.py", "ops/attention_map.py", "ops/convolution.py",
             "ops/delta_rule.py", "ops/delta_chunked.py", "ops/decode_step.py", "ops/experts.py", "ops/balancing.py",
             "ops/embedding.py", "ops/losses.py"),
            ("tests/ops", "tests/models/test_laws.py", "tests/models/test_parity.py")),
    "cpu forms": (("ops/cpu/attention.py", "ops/cpu/convolution.py", "ops/cpu/decode_step.py", "ops/cpu/delta_chunks.py",
                   "ops/cpu/delta_gradient.py", "ops/cpu/experts.py", "ops/cpu/norm.py", "ops/cpu/sorted_experts.py",
                   "ops/cpu/triangular.py"),
                  ("tests/ops", "tests/models/test_laws.py", "tests/models/test_parity.py")),
    "selection": (("checkpoint/selection.py", "checkpoint/names.py", "checkpoint/problems.py", "checkpoint/assemble.py"),
                  ("tests/checkpoint/test_parts.py", "tests/checkpoint/test_requests.py", "tests/checkpoint/test_read.py",
                   "tests/checkpoint/test_layouts.py", "tests/checkpoint/test_vision.py", "tests/checkpoint/test_published.py",
                   "tests/checkpoint/test_convert.py", "tests/checkpoint/test_describe.py", "tests/checkpoint/test_write.py")),
}  # fmt: skip

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is",
    ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*", ast.BitAnd: "|",
    ast.BitOr: "&",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the source between two offsets is replaced."""

    area: str
    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        assert source[self.start : self.end].decode() == self.old, f"{self.file}:{self.line} has changed"
        return source[: self.start] + self.new.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.old!r} -> {self.new!r}"


# ---------------------------------------------------------------------------------------------------------- finding mutants


class Finder(ast.NodeVisitor):
    """Collects (node whose source is replaced, replacement)."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.changes: list[tuple[Any, str]] = []
        self.lines = [0]  # the offset of every line
        for line in self.source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def span(self, node: Any) -> tuple[int, int]:
        """Offsets of a node's source, in bytes."""
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        if isinstance(node, ast.If) and self.text(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name != "__repr__":
                self.visit_body(node)
            return
        super().visit(node)

    def visit_body(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if isinstance(node, ast.FunctionDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            self.changes.append((node, "pass"))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.changes.append((node, "pass"))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets):
            self.changes.append((node, "pass"))
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp | ast.While) -> None:
        self.changes.append((node.test, f"not ({self.text(node.test)})"))
        self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.changes.extend((test, f"not ({self.text(test)})") for test in node.ifs)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            left, right = self.text(node.left), self.text(node.comparators[0])
            self.changes.append((node, f"{left} {COMPARISONS[type(node.ops[0])]} {right}"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not isinstance(getattr(node.left, "value", 0), str):
            self.changes.append((node, f"({self.text(node.left)}) {ARITHMETIC[type(node.op)]} ({self.text(node.right)})"))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = " or " if isinstance(node.op, ast.And) else " and "
        self.changes.append((node, word.join(f"({self.text(value)})" for value in node.values)))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.changes.append((node, f"({self.text(node.operand)})"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.changes.append((node, str(not node.value)))
        elif isinstance(node.value, int):
            self.changes.append((node, str(node.value + 1)))


def mutants_of(area: str, file: str) -> Iterator[Mutant]:
    """Every change of one file of the package."""
    source = (ROOT / "qwen35moe" / file).read_text()
    finder = Finder(source)
    finder.visit(ast.parse(source))
    for node, new in finder.changes:
        yield Mutant(area, f"qwen35moe/{file}", node.lineno, *finder.span(node), finder.text(node), new)


def is_python(mutant: Mutant) -> bool:
    try:
        compile(mutant.apply((ROOT / mutant.file).read_bytes()), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def sample(count: int, areas: list[str], seed: int = SEED) -> list[Mutant]:
    """`count` mutants, at most one of a line, in equal shares from the areas; always the same ones for the same sources."""
    chosen: list[Mutant] = []
    for number, area in enumerate(areas):
        share = count * (number + 1) // len(areas) - count * number // len(areas)
        everything = [mutant for file in AREAS[area][0] for mutant in mutants_of(area, file)]
        random.Random(f"{seed} {area}").shuffle(everything)
        lines: set[tuple[str, int]] = set()
        for mutant in everything:
            if len(lines) == share:
                break
            if (mutant.file, mutant.line) not in lines and is_python(mutant):
                lines.add((mutant.file, mutant.line))
                chosen.append(mutant)
    return chosen


# ---------------------------------------------------------------------------------------------------------- running the tests


def run(mutant: Mutant, folder: Path) -> tuple[bool, str]:
    """Whether a test in this copy of the repository notices the mutant, and which."""
    path = folder / mutant.file
    original = path.read_bytes()
    stem = path.stem.removesuffix("s")
    own = [str(test.relative_to(folder)) for test in sorted((folder / "tests").glob(f"*/test_*{stem}*.py"))]
    tests = [*(test for test in own if "triton" not in test), *AREAS[mutant.area][1]]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}", "OMP_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    path.write_bytes(mutant.apply(original))
    command = [sys.executable, "-m", "pytest", "-xq", "-n0", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return True, f"no end after {SECONDS} s"
    finally:
        path.write_bytes(original)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode != 0, failed[0][:160] if failed else done.stdout.strip().splitlines()[-1][:160]


def copies(count: int, where: Path) -> list[Path]:
    """Copies of the repository's tracked files."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    folders = []
    for number in range(count):
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (where / str(number) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, where / str(number) / name)
        folders.append(where / str(number))
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--area", choices=list(AREAS), action="append", help="only this area (repeatable)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="where to write one line per mutant, as soon as it is known")
    parser.add_argument("--list", action="store_true", help="print the sample and end")
    options = parser.parse_args()
    chosen = sample(options.count, options.area or list(AREAS), options.seed)
    random.Random(options.seed).shuffle(chosen)  # so that the first results are of every area
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as where:
        folders = copies(options.jobs, Path(where))

        def judge(mutant: Mutant) -> None:
            folder = folders.pop()
            noticed, by = run(mutant, folder)
            folders.append(folder)
            print(f"{'found   ' if noticed else 'SURVIVES'}  {mutant}  [{by}]", flush=True)
            if not noticed:
                survivors.append(mutant)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps({**asdict(mutant), "found": noticed, "by": by}) + "\n")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(judge, chosen))
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} mutants found; survivors:")
    print("\n".join(f"  {mutant}" for mutant in survivors) or "  none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
