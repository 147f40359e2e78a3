"""Benchmarks under test measure small limits, and do not collect garbage before every run: tenths of a second each."""

from __future__ import annotations

import types

import pytest

from benchmarks.tools import common, limits


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = types.SimpleNamespace(collect=lambda: 0, disable=lambda: None, enable=lambda: None)
    monkeypatch.setattr(common, "gc", quiet)
    monkeypatch.setattr(limits, "_COPY", 1 << 16)
    monkeypatch.setattr(limits, "_WIDTH", {"cpu": 32})
    monkeypatch.setattr(limits, "_WAIT", 0.0)
