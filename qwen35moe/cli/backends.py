"""`qwen35moe backends`: the table of implementations, and their errors with --verify."""

from __future__ import annotations

import argparse

HELP = "List the implementations of every operation and whether they run on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--verify", action="store_true", help="compare each with its definition, forward and backward")


def run(options: argparse.Namespace) -> None:
    """Print the table; with --verify compare every implementation with its definition and fail if an error is too large."""
    from .. import backends

    print(backends.describe())
    if options.verify:
        report = backends.verify()
        print(f"\n{report}")
        if not report.ok:
            raise ValueError("an implementation differs from its definition by more than its bound, see above")
