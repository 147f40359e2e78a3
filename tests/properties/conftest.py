"""Counts what the properties tried, for `make soak`: one JSON line per process in the file $QWEN35MOE_TRIED."""

from __future__ import annotations

import json
import os

from tests.properties.tried import TRIED


def pytest_sessionfinish() -> None:
    path = os.environ.get("QWEN35MOE_TRIED")
    if path and TRIED:
        with open(path, "a") as file:
            file.write(json.dumps(TRIED) + "\n")
