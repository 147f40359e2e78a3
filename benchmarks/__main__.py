"""`python -m benchmarks [NAME [arguments of NAME]]`: run a benchmark, or list them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import benchmarks

NOT_BENCHMARKS = {"__main__", "common", "machine"}


def names() -> list[str]:
    """The modules of this package that are benchmarks."""
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in NOT_BENCHMARKS)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [--device cpu] [--json out.json]   (NAME --help tells more)\n")
        for name in names():
            summary = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().split("\n")[0]
            print(f"  {name:<14} {summary}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in names():
        print(f"no benchmark {name!r}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
