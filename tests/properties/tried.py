"""What the properties of this process tried, in numbers."""

from __future__ import annotations

from collections import Counter

TRIED: Counter[str] = Counter()


def tried(what: str, count: int = 1) -> None:
    """Adds to the numbers that `make soak` prints."""
    TRIED[what] += count
