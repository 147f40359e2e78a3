"""`make mutants`: its areas name files and tests that exist, and every mutant of its sample is a change that Python accepts."""

from __future__ import annotations

import ast

from tests.support import mutants


def test_areas_name_what_exists() -> None:
    for area, (files, tests) in mutants.AREAS.items():
        missing = [f for f in files if not (mutants.ROOT / "qwen35moe" / f).is_file()]
        missing += [t for t in tests if not (mutants.ROOT / t).exists()]
        assert not missing, f"{area}: {missing}"


def test_the_sample_is_the_same_every_time_and_changes_one_line_of_code_each() -> None:
    sample = mutants.sample(100, list(mutants.AREAS))
    assert len(sample) == 100 and mutants.sample(100, list(mutants.AREAS)) == sample
    assert len({(mutant.file, mutant.line) for mutant in sample}) == 100
    for mutant in sample:
        source = (mutants.ROOT / mutant.file).read_bytes()
        assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source)), str(mutant)


def test_texts_and_annotations_are_left_alone() -> None:
    finder = mutants.Finder(source := '''
def f(x: int | None = 3) -> int | None:
    """1 + 1"""
    if x is None:
        raise ValueError(f"{x + 1}")
    return x * 2
''')
    finder.visit(ast.parse(source))
    assert sorted(new for _, new in finder.changes) == ["(x) / (2)", "3", "4", "not (x is None)", "x is not None"]
