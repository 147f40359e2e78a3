"""`qwen35moe convert`: a checkpoint in another layout, dtype or number of layers, without holding it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

from .inspect import size


def run(options: argparse.Namespace) -> None:
    """Convert, with a bar of bytes where there is a terminal."""
    from tqdm import tqdm

    from ..checkpoint.convert import convert
    from ..checkpoint.headers import read_headers
    from ..loading import find

    with ExitStack() as stack:

        def bar(total: int) -> Callable[[int], object]:
            drawn = tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None)  # None: terminals only
            return stack.enter_context(drawn).update

        convert(
            find(options.source),
            options.target,
            layout=options.layout,
            mtp_layout=options.mtp_layout,
            dtype=options.dtype,
            layers=options.layers,
            max_shard_size=options.max_shard_size,
            progress=bar,
        )
    new = read_headers(options.target)
    print(f"{options.target}: {len(new.tensors)} tensors in {len(new.files)} file(s), {size(new.nbytes)}")
