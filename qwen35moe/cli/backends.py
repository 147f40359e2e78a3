"""`qwen35moe backends`: the table of implementations, and on request their errors."""

from __future__ import annotations

import argparse


def run(options: argparse.Namespace) -> None:
    """Print the table; with --verify judge every implementation, and fail when one is too far off."""
    from .. import backends

    print(backends.describe())
    if options.verify:
        report = backends.verify()
        print(f"\n{report}")
        if not report.ok:
            raise ValueError("an implementation is further from its definition than it may be, see above")
