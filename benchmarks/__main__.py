"""`python -m benchmarks [NAME [arguments of NAME]]`: run a suite or a tool, or list them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

import benchmarks

TOOLS = ("compare", "numerics", "report", "rerun", "routing_numerics", "synthetic")  # the modules of `tools` that are commands


def suites() -> list[str]:
    """The modules of this package that measure."""
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ("__main__", "tools"))


def load(name: str) -> ModuleType:
    """The module of a suite or a tool."""
    return importlib.import_module(f"benchmarks.tools.{name}" if name in TOOLS else f"benchmarks.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [--device cpu] [--json out.json]   (NAME --help shows all options)")
        for title, names in (("suites", suites()), ("tools", TOOLS)):
            print(f"\n{title}:")
            for name in names:
                print(f"  {name:<16} {(load(name).__doc__ or '').strip().splitlines()[0]}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in (*suites(), *TOOLS):
        print(f"no benchmark {name!r}; there are {', '.join([*suites(), *TOOLS])}", file=sys.stderr)
        return 2
    try:
        return load(name).main(rest) or 0
    except (ValueError, OSError, ImportError) as error:  # a file that is missing or no report, a wrong --impl
        print(f"python -m benchmarks {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
