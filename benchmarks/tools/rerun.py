"""Run the cases of a result file again: `python -m benchmarks rerun FILE [--json out.json] [--trust]`.

The file names its benchmark and arguments. --impl imports code by name and is accepted only with --trust, since the file
may come from anybody. Other arguments (--json, --plot, ...) are passed on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tools.compare import read

_WRITING = ("--json", "--plot", "--markdown", "--append", "--profile")


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.__main__ import load, suites

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rerun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--trust", action="store_true", help="also import the code that --impl names")
    options, more = parser.parse_known_args(None if argv is None else list(argv))
    report = read(options.file)
    name, recorded = report.get("benchmark"), report.get("arguments")
    if name not in suites() or not isinstance(recorded, list) or not all(isinstance(word, str) for word in recorded):
        parser.error(f"{options.file} names benchmark {name!r} with arguments {recorded!r}: it cannot be run again")
    flags = [word.split("=")[0] for word in recorded if word.startswith("--")]
    if any(long.startswith(flag) for flag in flags for long in _WRITING):
        parser.error(f"{options.file} would write files: {recorded}")
    if any("--impl".startswith(flag) for flag in flags) and not options.trust:
        parser.error(f"{options.file} names code to import: {recorded}; check it, then add --trust")
    print(f"python -m benchmarks {name} {' '.join([*recorded, *more])}", file=sys.stderr)
    return load(name).main([*recorded, *more]) or 0
