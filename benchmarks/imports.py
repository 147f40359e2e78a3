"""What `import qwen35moe` costs beyond `import torch`, and what loading every public name costs.

Each contestant is a fresh process; the first rounds fill the page cache and write bytecode. The difference of the
minima is the cost. There is no answer to check: an import that fails stops the benchmark.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Report, arguments

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "torch": "import torch",
    "torch + qwen35moe": "import torch, qwen35moe",
    "torch + every public name": "import torch, qwen35moe; [getattr(qwen35moe, n) for n in qwen35moe.__all__]",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__).parse_args(argv)
    report = Report("imports", rounds=options.rounds)
    with report.case("import/process") as case:
        case.time({name: lambda p=program: _run(p) for name, program in PROGRAMS.items()}, baseline="torch")
    base = case.timings["torch"].min
    for name in list(PROGRAMS)[1:]:
        print(f"{name}: {case.timings[name].min - base:+.3f} s beyond torch")
    return report.finish(options)


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
