"""Seconds of `import qwen35moe` beyond `import torch`, and of loading every public name.

Each run is a fresh process that imports torch first and then times the rest. The first round writes bytecode and fills the
page cache; it is not counted. There is no answer to check: an import that fails stops the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.tools.common import Report, Timing, arguments, fresh_process, limit_dtypes

FIRST, REST = "import time; start = time.perf_counter()", "print(time.perf_counter() - start)"
PROGRAMS = {
    "torch": f"{FIRST}; import torch; {REST}",
    "qwen35moe": f"import torch; {FIRST}; import qwen35moe; {REST}",
    "every public name": f"import torch, qwen35moe as q; {FIRST}; [getattr(q, name) for name in q.__all__]; {REST}",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__).parse_args(argv)
    report = Report("imports", rounds=options.rounds, dtypes=limit_dtypes(options, torch.float32))
    with report.case("import/process") as case:
        rounds = [{name: fresh_process("-c", program) for name, program in PROGRAMS.items()} for _ in range(options.rounds + 1)]
        case.timings = {name: Timing(tuple(times[name] for times in rounds[1:])) for name in PROGRAMS}
        case.baseline = "torch"
    return report.finish(options)
