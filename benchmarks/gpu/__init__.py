"""One command for a GPU's first minutes: every kernel against its definition, then speeds against targets.

    python -m benchmarks.gpu --minutes 9 [--out DIR] [--only ID] [--list] [--wheels DIR] [--profile NAME]

docs/guide/gpu.md explains the steps, the time plan and the verdicts. Each step runs in a process of its own that is ended at
its time limit, so that a kernel that hangs, or an error that spoils a CUDA context, ends one step. The command's own process
never uses CUDA. A row is written to OUT/rows.jsonl as soon as it is measured. Without a GPU the same steps run on the CPU in
a small form, with Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.gpu.command import main

    return main(argv)
