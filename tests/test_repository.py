"""Rules of the repository: import floors, light public imports, pages whose examples run, no traces of one machine."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qwen35moe
from tests.support.floors import DOORS, OPTIONAL, PACKAGE, ROOT, Import, files, height, imports, part_of

SOURCES = files("qwen35moe", "kernels")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -------------------------------------------------------------------------------------------------------- import floors


def violation(path: Path, imported: Import) -> str | None:
    """Why this import breaks the floors, or None."""
    target = part_of(imported.module)
    if target is None or imported.typing_only:
        return None
    own = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
    if target in (own, "", "__version__"):
        return None
    if height(target) < height(own):
        return None
    if imported.function and target in DOORS.get((name_of(path), imported.function), ()):
        return None
    where = f"in {imported.function}()" if imported.function else "at the top"
    return f"{name_of(path)}:{imported.line} ({own}) imports {imported.module} {where}: not below it, and not in DOORS"


@pytest.mark.parametrize("path", files(PACKAGE), ids=name_of)
def test_a_file_imports_only_from_floors_below_it(path: Path) -> None:
    if path == ROOT / PACKAGE / "__init__.py":
        assert all(imported.typing_only for imported in imports(path) if part_of(imported.module))
        return
    problems = [problem for imported in imports(path) if (problem := violation(path, imported))]
    assert not problems, "\n".join(problems)


def test_every_listed_door_is_used() -> None:
    """An unused entry of DOORS would permit an import that nobody has reviewed."""
    for (name, function), parts in DOORS.items():
        used = {part_of(imported.module) for imported in imports(ROOT / name) if imported.function == function}
        assert set(parts) <= used, f"{name} {function}() no longer imports {sorted(set(parts) - used)}"


def test_imports_of_all_forms_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.support.floors as floors

    folder = tmp_path / PACKAGE / "ops"
    folder.mkdir(parents=True)
    for module in ("norm", "wide"):
        (folder / f"{module}.py").write_text("")
    (tmp_path / PACKAGE / "models").mkdir()
    (folder / "norm.py").write_text(
        "from qwen35moe import models, Config\nfrom .wide import x\nfrom ..config import y\n"
        "def f():\n    import qwen35moe.cli\n"
    )
    monkeypatch.setattr(floors, "ROOT", tmp_path)
    assert [(i.module, i.function) for i in floors.imports(folder / "norm.py")] == [
        ("qwen35moe.models", None),
        ("qwen35moe.Config", None),
        ("qwen35moe.ops.wide", None),
        ("qwen35moe.config", None),
        ("qwen35moe.cli", "f"),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_optional_packages_are_imported_inside_functions(path: Path) -> None:
    """The library runs with torch, safetensors, einops and tqdm; other packages are imported inside a function."""
    if PACKAGE not in path.relative_to(ROOT).parts[0]:
        return
    eager = [
        i for i in imports(path) if i.function is None and not i.typing_only and i.module.split(".")[0] in OPTIONAL
    ]
    assert not eager, [f"{name_of(path)}:{i.line} imports {i.module}" for i in eager]


def test_the_kernels_never_import_the_library() -> None:
    upward = [(name_of(p), i.line) for p in files("kernels") for i in imports(p) if i.module.split(".")[0] == PACKAGE]
    assert not upward, upward


def test_nothing_is_importable_under_the_name_kernels() -> None:
    """`kernels` is a PyPI package that transformers looks for: this repository must neither shadow nor overwrite it."""
    everything = files("qwen35moe", "kernels", "tests", "benchmarks")
    assert not [name_of(p) for p in everything for i in imports(p) if i.module.split(".")[0] == "kernels"]
    assert not list((ROOT / "kernels").glob("*.py"))
    for folder in ("tests", "benchmarks", "qwen35moe"):
        assert not (ROOT / folder / "kernels").exists()


def test_every_folder_of_the_packages_is_a_package() -> None:
    """A folder without __init__.py imports from a checkout and is missing from the wheel (`namespaces = false`)."""
    folders = {path.parent for path in SOURCES} - {ROOT / "kernels"}
    assert not [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()]


def operations_by_string(tree: ast.AST) -> list[int]:
    """Lines of calls such as `backends.run("rms_norm", ...)`, and of `run("rms_norm", ...)` after a from-import."""
    doors = {"run", "resolve"}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in doors and isinstance(node.args[0].value, str):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", files("qwen35moe/modules", "qwen35moe/models"), ids=name_of)
def test_modules_call_operations_as_functions(path: Path) -> None:
    """`ops.rms_norm(...)` leads an editor to the definition, `backends.run("rms_norm", ...)` does not."""
    lines = operations_by_string(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, f"{name_of(path)} names an operation by a string on lines {lines}"


def test_an_operation_named_by_a_string_is_found() -> None:
    source = 'backends.run("rms_norm", x)\nops.rms_norm(x)\nresolve("router", x, caller=self)\nrun(self._mix, x)\n'
    assert operations_by_string(ast.parse(source)) == [1, 3]


# -------------------------------------------------------------------------------------------------------- public names


def modules_after(statement: str) -> set[str]:
    """Modules that `statement` imports in a new process, without those of `import torch`."""
    program = (
        f"import json, sys, torch; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_library_imports_no_model_code() -> None:
    assert {m for m in modules_after("import qwen35moe") if part_of(m)} == set()


def test_the_public_names_import_nothing_optional_or_slow() -> None:
    heavy = {*OPTIONAL, "torch._dynamo", "torch._inductor", "sympy", "networkx", "torch.onnx", "torch.distributed.fsdp"}
    modules = modules_after("import qwen35moe; [getattr(qwen35moe, name) for name in qwen35moe.__all__]")
    assert {
        f"{PACKAGE}.{name}" for name in ("config", "models", "cache", "routing", "backends", "taps", "loading")
    } <= modules
    assert not {m for m in modules if any(m == h or m.startswith(h + ".") for h in heavy)}


def test_every_public_name_resolves_and_an_unknown_one_raises_with_the_list() -> None:
    for name in qwen35moe.__all__:
        assert getattr(qwen35moe, name) is not None
    assert set(qwen35moe.__all__) <= set(dir(qwen35moe))
    unknown = "nothing_like_it"
    with pytest.raises(AttributeError, match=r"no attribute 'nothing_like_it'; it has .*Qwen3_5MoeForCausalLM"):
        getattr(qwen35moe, unknown)


@pytest.mark.parametrize("name, words", [
    ("AutoModelForCausualLM", "did you mean AutoModelForCausalLM"), ("Qwen3_5MoeForCausalLm", "did you mean Qwen3_5MoeForC"),
    ("Qwen35MoeForCausalLM", "did you mean Qwen3_5MoeForCausalLM"), ("loads", "did you mean load?"),
    ("Qwen3MoeForCausalLM", "another architecture.*Qwen3_5MoeForCausalLM"), ("LlamaForCausalLM", "another architecture"),
    ("Qwen3_5MoeConfig", "use qwen35moe.Config,"), ("Qwen3_5TextConfig", "use qwen35moe.TextConfig,"),
    ("Qwen3_5MoeVisionConfig", "use qwen35moe.VisionConfig,"), ("Qwen3_5VisionModel", "use qwen35moe.Qwen3_5MoeVisionModel"),
    ("Qwen3_5Tokenizer", "use qwen35moe.AutoTokenizer"), ("Qwen3VLProcessor", "use qwen35moe.AutoProcessor"),
    ("AutoModelForSequenceClassification", "no classification heads.*AutoModel"), ("TextStreamer", "streamer="),
    ("BitsAndBytesConfig", "torchao"), ("Trainer", "transformers.Trainer"),
])  # fmt: skip
def test_a_misspelt_name_and_one_of_transformers_say_what_to_use(name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=f"'{name}'.*{words}") as error:
        getattr(qwen35moe, name)
    assert len(str(error.value)) < 300
    with pytest.raises(ImportError, match=name):
        exec(f"from qwen35moe import {name}", {})


def test_the_typing_imports_of_the_package_are_the_names_it_resolves() -> None:
    names = set()
    for node in ast.walk(ast.parse((ROOT / PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            home = node.module
            names |= {(alias.name, home) for alias in node.names}
    assert names == set(qwen35moe._HOMES.items())
    assert {*qwen35moe._HOMES, "__version__"} == set(qwen35moe.__all__)


@pytest.mark.parametrize("command", ["", "generate", "inspect", "convert", "tiny", "backends", "demo"])
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen35moe.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: qwen35moe" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ documents


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line, source) of the python blocks of a page, except those below `<!-- not run: reason -->`."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"(<!-- not run: .+? -->\n+)?```python\n(.*?)```", text, flags=re.DOTALL)
    return [(text.count("\n", 0, b.start(2)) + 1, b.group(2)) for b in matches if not b.group(1)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_the_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__example__"}
    for line, source in python_blocks(page):
        # Blank lines in front give tracebacks the line numbers of the page.
        exec(compile("\n" * (line - 1) + source, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_have_targets(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, dead


def undocumented(value: object, name: str) -> list[str]:
    """Public names without a docstring: the value itself and, of a class, its own methods (not properties)."""
    missing = [] if inspect.getdoc(value) else [name]
    if inspect.isclass(value):
        own = {n: getattr(v, "__func__", v) for n, v in vars(value).items() if not n.startswith("_")}
        missing += [f"{name}.{n}" for n, v in own.items() if inspect.isroutine(v) and not inspect.getdoc(v)]
    return missing


def test_public_names_have_docstrings() -> None:
    missing = []
    for name in set(qwen35moe.__all__) - {"__version__"}:
        value = getattr(qwen35moe, name)
        missing += undocumented(value, name)
        for inner in getattr(value, "__all__", ()) if inspect.ismodule(value) else ():
            if callable(member := getattr(value, inner)):
                missing += undocumented(member, f"{name}.{inner}")
    assert not missing, missing


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_long_definitions_have_docstrings(path: Path) -> None:
    """Every file, and every class or function without an underscore and longer than six lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the file itself"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and (node.end_lineno or 0) - node.lineno > 6:
                missing.append(f"{node.name} (line {node.lineno})")
    assert not missing, f"{name_of(path)}: no docstring: {', '.join(missing)}"


def test_long_files_and_functions_are_reported() -> None:
    """More than about 400 lines per file or 60 per function is a warning, not a failure."""
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{name_of(path)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                long.append(f"{name_of(path)}:{node.lineno} {node.name}: {(node.end_lineno or 0) - node.lineno} lines")
    if long:
        warnings.warn("longer than 400 lines (files) or 60 (functions):\n  " + "\n  ".join(long), stacklevel=1)


# -------------------------------------------------------------------------------------------- no traces of one machine


def text_files() -> list[Path]:
    """Files that git tracks or would track."""
    run = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in run.stdout.splitlines())
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:4096]]


def test_no_file_names_a_path_or_a_registry_of_one_machine() -> None:
    # Spelled so that this file does not match.
    folders = re.compile(r"(?<![\w.~:/-])/(?:work|root|farm|home|opt|tmp)" + r"/[a-z]")
    hosts = re.compile(
        "|".join(h.replace(" ", r"\.") for h in ("pypi org", "pythonhosted org", "deb debian org", "npmjs org"))
    )
    matches = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if (folders.search(line) and path.parts[len(ROOT.parts)] != "tests") or hosts.search(line):
                matches.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not matches, "\n".join(matches)


def test_no_file_but_the_bundled_checkpoint_is_large() -> None:
    large = [f"{name_of(p)} ({p.stat().st_size >> 10} KiB)" for p in text_files() if p.stat().st_size > 1 << 20]
    assert not [name for name in large if not name.startswith("qwen35moe/assets/tiny/")], large


def test_every_requirement_has_a_pinned_version() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in wanted} - {PACKAGE}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    assert not [name for name in names if not re.search(rf"^{name}==", pinned, flags=re.MULTILINE)]
