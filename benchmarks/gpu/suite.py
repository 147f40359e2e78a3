"""The suite's tests that need a GPU, and compute-sanitizer on small sizes: programs of their own, ended before the step is."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import CUT, FAILED, NOT_RUN, RIGHT, WRONG, Rows
from benchmarks.gpu.work import Work
from benchmarks.tools.common import ROOT

MARGIN = 4.0  # seconds to report before the step's own limit
FIRST = "tests/triton/test_gpu.py"
CHECKED = [sys.executable, "-m", "benchmarks.gpu.suite"]  # `main` below


def tests(rows: Rows, work: Work) -> None:
    rows.measure("suite/gpu", lambda: gpu_tests(work))


def gpu_tests(work: Work) -> dict[str, Any]:
    """`pytest -m gpu tests`, with as many workers as pytest-xdist is there for."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"verdict": NOT_RUN, "note": f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-rfE",
               "--continue-on-collection-errors", *([FIRST] if work.small else files())]  # fmt: skip
    if importlib.util.find_spec("xdist") and not work.small:
        command += ["-n", str(min(6, max(1, (os.cpu_count() or 2) // 2)))]
    code, output = limited(command, work.left - MARGIN, work.out / "logs" / "pytest.log")
    counts = outcomes(output)
    note = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no test has ended"
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)[:3]
    note += f"; {', '.join(failures)}" if failures else ""
    if counts.get("failed") or counts.get("error"):
        return {"verdict": WRONG, "note": note, "log": output[-3000:]}
    if code is None:
        return {"verdict": CUT, "note": f"{note} in {work.limit:.0f} s"}
    if not counts.get("passed"):
        return {"verdict": NOT_RUN if code in (0, 5) else FAILED, "note": note, "log": output[-3000:]}
    return {"verdict": RIGHT if code == 0 else FAILED, "measured": counts["passed"], "unit": "passed", "note": note}


def files() -> list[str]:
    """The files with tests that need a GPU, kernels first: others may need packages that a GPU machine does not have."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in marked)
    return sorted(names, key=lambda name: (name != FIRST, not name.startswith("tests/triton/")))


def outcomes(output: str) -> dict[str, int]:
    """Tests by outcome, in the output of `pytest -v`, also where it was cut."""
    output = output.split(" short test summary info ")[0]  # which names failures once more
    words = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b(?= +tests/| *\[| \()", output)
    counts: dict[str, int] = {}
    for word in words:
        counts[word.lower()] = counts.get(word.lower(), 0) + 1
    return counts


def limited(command: list[str], seconds: float, log: Path, environment: dict[str, str] | None = None) -> tuple[int | None, str]:
    """(exit status, output) of a program; status None if it was ended after `seconds`."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | (environment or {}))  # fmt: skip
        try:
            code = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_text(errors="replace")


def warm(rows: Rows, work: Work) -> None:
    rows.measure("warm/kernels", lambda: warmed(work))


def cache(work: Work) -> dict[str, str]:
    """Of the compiled kernels at small sizes, which `warm` fills and `memcheck` uses."""
    return {"TRITON_CACHE_DIR": str(work.out / "triton-cache-small")}


def warmed(work: Work) -> dict[str, Any]:
    """Compile and run what `memcheck` runs, without compute-sanitizer, under which compilation is slow."""
    if work.small:
        return {"verdict": NOT_RUN, "note": "there is no GPU"}
    code, output = limited(CHECKED, work.left - MARGIN, work.out / "logs" / "warm.kernels.log", cache(work))
    note = f"checked {', '.join(checked(output)) or 'nothing'}"
    if code is None:
        return {"verdict": CUT, "note": f"{note} in {work.limit:.0f} s"}
    if code:
        return {"verdict": FAILED, "note": f"it ended with {code}; {note}", "log": output[-3000:]}
    return {"verdict": RIGHT, "note": note}


def checked(output: str) -> list[str]:
    """The operations that `main` has run."""
    return re.findall(r"^checked (\S+)", output, re.MULTILINE)


def memcheck(rows: Rows, work: Work) -> None:
    rows.measure("memcheck/kernels", lambda: sanitized(work))


def sanitized(work: Work) -> dict[str, Any]:
    """The kernels' checks at small sizes under compute-sanitizer, without PyTorch's caching of memory."""
    installed = Path("/usr/local/cuda/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or (str(installed) if installed.exists() else None)
    if work.small or tool is None:
        return {"verdict": NOT_RUN, "note": "there is no GPU" if work.small else "compute-sanitizer is not installed"}
    command, log = [tool, "--tool", "memcheck", *CHECKED], work.out / "logs" / "memcheck.kernels.log"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **cache(work)}
    code, output = limited(command, work.left - MARGIN, log, environment)
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
    faults = re.findall(r"^=+ (Invalid [^\n]*|Program hit [^\n]*)", output, re.MULTILINE)
    note = f"checked {', '.join(checked(output)) or 'nothing'}"
    if faults or any(errors):
        return {"verdict": WRONG, "note": f"{faults[0] if faults else f'{max(errors)} errors'}; {note}", "log": output[-4000:]}
    if code is None:
        return {"verdict": CUT, "note": f"{note} in {work.limit:.0f} s"}
    if not errors or code:
        return {"verdict": FAILED, "note": f"it ended with {code}; {note}", "log": output[-3000:]}
    return {"verdict": RIGHT, "measured": 0, "unit": "errors", "note": note}


def main() -> None:
    """Runs the Triton implementations of every operation at small sizes on the GPU, for `warm` and `memcheck`."""
    from benchmarks.gpu import checks
    from benchmarks.gpu.cases import CASES, SMALL, Draw
    from qwen35moe import backends

    for operation in CASES:
        entry = next((e for e in backends.implementations(operation) if e.name == "triton" and not e.missing), None)
        if entry is None or entry.fn is None:
            continue
        for training in (False, True):
            for args, kwargs in CASES[operation](Draw(checks.DTYPES["bf16"], "cuda", SMALL, training)):
                if checks._refusal(entry, (args, kwargs), training) is None:
                    checks.verification._run(entry.fn, (args, kwargs), None, 0, training and entry.differentiable)
        print(f"checked {operation}", flush=True)


if __name__ == "__main__":
    main()
