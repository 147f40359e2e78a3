"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

CHECKPOINT = "a checkpoint folder, a Hub name, or tiny (the bundled checkpoint)"
LAYOUTS = ("grouped", "per_expert")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--dtype and --device, for commands that load a model."""
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    parser.add_argument("--device", default="cpu", type=_devices,
                        help="cpu, cuda:1, ...; cuda:0,cuda:1 or auto (all GPUs) spread the layers (default: cpu)")  # fmt: skip


def _devices(text: str) -> str | list[str]:
    """["cuda:0", "cuda:1"] for cuda:0,cuda:1."""
    return text.split(",") if "," in text else text


def add_images(parser: argparse.ArgumentParser, place: str) -> None:
    """--image and --video. place: where they go, for the help."""
    for name, noun in (("--image", "an image"), ("--video", "a video")):
        parser.add_argument(name, action="append", default=[], metavar="FILE", help=f"{noun} {place}; may be repeated")


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """--max-new-tokens."""
    parser.add_argument("--max-new-tokens", type=int, default=default, metavar="N",
                        help=f"generate at most N tokens (default: {default})")  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The sampling options of `generate`; `sampling` reads them."""
    parser.add_argument("--temperature", type=float, metavar="T", help="divide the logits by T")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of total probability P")
    parser.add_argument("--min-p", type=float, metavar="P",
                        help="sample from tokens at least P times as likely as the most likely one")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")


def sampling(options: argparse.Namespace, do_sample: bool, way_out: str) -> dict[str, Any]:
    """do_sample and the sampling options as keywords of `generate`. ValueError for options without effect, as there; way_out:
    what to do about it."""
    values = {name: getattr(options, name) for name in SAMPLING}
    unused = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None]
    if unused and not do_sample:
        raise ValueError(f"{', '.join(unused)} has an effect only when sampling: {way_out}")
    return values | {"do_sample": do_sample}


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """--max-shard-size, for commands that write a checkpoint."""
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE",
                        help="largest size of a file: 500MB, 2GiB (default: 5GB)")  # fmt: skip


def add_ignore(parser: argparse.ArgumentParser) -> None:
    """--ignore, for commands that read a checkpoint."""
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                        help="leave out the tensors of these names, such as 'score.*'; may be repeated")  # fmt: skip


def refuse_without_effect(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """ValueError if one of these options (None when absent) was given, because it would have no effect."""
    unused = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if unused:
        raise ValueError(f"{', '.join(unused)}: no effect, because {reason}: omit {'it' if len(unused) == 1 else 'them'}")


def add_layouts(parser: argparse.ArgumentParser, default: str, mtp_default: str) -> None:
    """--layout and --mtp-layout, for commands that write a checkpoint. The defaults are text for the help."""
    parser.add_argument("--layout", choices=LAYOUTS, help=f"layout of the experts (default: {default})")
    parser.add_argument("--mtp-layout", choices=LAYOUTS, help=f"layout of the MTP head's experts (default: {mtp_default})")
