"""`make soak`: the properties of tests/properties with new examples in every round, for MINUTES (30).

A round is one run of pytest with another seed of hypothesis. The first failure ends it: hypothesis prints the smallest example
and the seed with which `pytest tests/properties --hypothesis-profile=soak --hypothesis-seed=...` repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--seed", type=int, help="of the first round; the next rounds count on (default: random)")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    start, rounds, total = time.monotonic(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / "tried.jsonl"
        while time.monotonic() - start < 60 * options.minutes:
            command = [sys.executable, "-m", "pytest", "-q", "-n", str(options.workers), "-p", "no:cacheprovider",
                       "--no-header", "--hypothesis-profile=soak", f"--hypothesis-seed={seed + rounds}",
                       "tests/properties"]  # fmt: skip
            environment = {**os.environ, "QWEN35MOE_TRIED": str(tried)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            rounds += 1
            total = Counter[str]()
            for line in tried.read_text().splitlines() if tried.exists() else ():
                total.update(json.loads(line))
            minutes = (time.monotonic() - start) / 60
            result = done.stdout.strip().splitlines()[-1]
            print(f"{minutes:5.1f} min, round {rounds}, seed {seed + rounds - 1}: {result}", flush=True)
            if done.returncode:
                print(done.stdout[-20_000:], done.stderr[-2_000:])
                return 1
    print("\ntried in all:")
    for what, count in sorted(total.items()):
        print(f"{count:10,d}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
