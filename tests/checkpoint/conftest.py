"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import os
import sys

import pytest


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces os.fsync, which takes most of the time of a small save, by a list of the synced files.

    Writes of a killed process survive it without fsync; only a power failure would need it.
    """
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                        if sys.platform == "linux" else None)  # fmt: skip
    return synced
