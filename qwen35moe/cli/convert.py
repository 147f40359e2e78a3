"""`qwen35moe convert`: writes a checkpoint in another layout, dtype or number of layers, without loading all of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

from .options import add_ignore, add_layouts, add_max_shard_size
from .terminal import format_bytes

HELP = "Write a checkpoint in another layout, dtype or number of layers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", help="a folder with config.json and safetensors files, or a Hub name")
    parser.add_argument("target", help="the folder to write; replaced only when everything is written")
    add_layouts(parser, "unchanged", "that of --layout")
    parser.add_argument("--dtype", help="bfloat16, float16, float32 or float64; dequantises FP8 (default: as stored)")
    parser.add_argument("--layers", type=_layers, metavar="LIST", help="keep only these layers, renumbered: 0-3 or 0,4,8-11")
    add_max_shard_size(parser)
    add_ignore(parser)


def _layers(text: str) -> list[int]:
    """[0, 1, 2, 3, 7] for 0-3,7."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(part) > 20:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not a layer or a range of layers such as 0-3")
        layers += range(int(first), min(int(last), int(first) + 10_000) + 1) if dash else [int(first)]
    return layers


def run(options: argparse.Namespace) -> None:
    """Convert, with a progress bar on a terminal."""
    from tqdm import tqdm

    from ..checkpoint.convert import convert
    from ..checkpoint.headers import read_headers
    from ..loading import find

    with ExitStack() as stack:

        def progress(total: int) -> Callable[[int], object]:
            bar = tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None)  # None: terminals only
            return stack.enter_context(bar).update

        convert(
            find(options.source),
            options.target,
            layout=options.layout,
            mtp_layout=options.mtp_layout,
            dtype=options.dtype,
            layers=options.layers,
            max_shard_size=options.max_shard_size,
            ignore=options.ignore,
            progress=progress,
        )
    new = read_headers(options.target)
    print(f"{options.target}: {len(new.tensors)} tensors in {len(new.files)} file(s), {format_bytes(new.nbytes)}")
