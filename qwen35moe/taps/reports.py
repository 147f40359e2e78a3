"""Warnings of taps: maps that a pattern records by the way, and, at the end of a block, what no forward has reached."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

from .names import glob_of, matches


def warn_of_unreached(
    kind: str, patterns: Sequence[str], targets: Mapping[Any, tuple[str, Any]], reached: Container[str],
    single_names: bool = False,
) -> None:
    """UserWarning with the names of the patterns without any value that was computed; single_names=True: also with the names
    of a pattern that were not, except in parts of the model (the vision tower, the MTP head) that did not run.

    A value is not computed where the user's own module or operation replaces what computes it, in compiled code, and in parts
    of the model that a forward does not run.
    """
    names = [name for name, _ in targets.values()]
    missing: list[str] = []
    for pattern in patterns:
        matched = [name for name in names if matches(name, glob_of(pattern))]
        unreached = [name for name in matched if name not in reached]
        if len(unreached) == len(matched):
            missing.append(pattern)
        elif single_names:
            ran = {name.partition(".")[0] for name in matched if name in reached}
            missing += [name for name in unreached if name.partition(".")[0] in ran]
    if missing:
        some = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        warnings.warn(
            f"no forward has reached this {kind} of {some}: it had no effect. The value is not computed where a module or "
            "operation of your own, or compiled code, runs in its place, or the block held no forward of this model",
            UserWarning, stacklevel=3,
        )


def warn_of_maps(patterns: Sequence[str], targets: Mapping[Any, tuple[str, Any]]) -> None:
    """UserWarning where a pattern that does not name the attention maps records them too: [T, T] for every head."""
    named = [glob for glob in map(glob_of, patterns) if glob.endswith("scores")]
    maps = [name for name, _ in targets.values() if name.endswith(".scores")]
    unnamed = [name for name in maps if not any(matches(name, glob) for glob in named)]
    if unnamed:
        warnings.warn(
            f"{', '.join(patterns)!r:.100} also records {len(unnamed)} attention maps [B, H, T, T] (scores), which a forward "
            "does not compute otherwise: name the values that you want, or the maps by a pattern that ends in 'scores'",
            UserWarning, stacklevel=4,
        )
