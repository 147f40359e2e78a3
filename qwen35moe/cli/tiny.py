"""`qwen35moe tiny`: writes a small random checkpoint in a published layout, for the tests of other programs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_layouts, add_max_shard_size
from .terminal import format_bytes

HELP = "Write a small random checkpoint in a published layout, for tests."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--layers", type=int, default=4, metavar="N",
                        help="number of decoder layers, every fourth with attention (default: 4)")  # fmt: skip
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="routed experts per layer (default: 8)")
    parser.add_argument("--top-k", type=int, default=2, metavar="N", help="experts per token (default: 2)")
    parser.add_argument("--dense", action="store_true", help="a dense model (qwen3_5) without experts")
    parser.add_argument("--vision", action="store_true", help="add a vision tower; config.json is nested")
    parser.add_argument("--mtp", action="store_true", help="add a multi-token-prediction head")
    add_layouts(parser, "grouped; per_expert with --fp8", "per_expert, as in Qwen3.5")
    parser.add_argument("--fp8", action="store_true", help="block-FP8 as published: blocks of 128 x 128, weight_scale_inv")
    parser.add_argument("--fp32-stored-as", choices=("F32", "BF16"), default="F32",
                        help="dtype of A_log and linear_attn.norm.weight: F32 (Qwen3.5, default), BF16 (Qwen3.6)")  # fmt: skip
    parser.add_argument("--tied", action="store_true", help="tie the output head to the embedding")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="set a key of text_config, such as hidden_size=192; may be repeated")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: 0)")
    add_max_shard_size(parser)


def _setting(text: str) -> tuple[str, Any]:
    """("hidden_size", 192) for hidden_size=192; the value is JSON."""
    key, _, value = text.partition("=")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE with a value in JSON") from None


def run(options: argparse.Namespace) -> None:
    """Write the checkpoint and print its size."""
    from ..checkpoint.published import Layout
    from ..checkpoint.tiny import tiny_config, write_tiny

    config = tiny_config(
        layers=options.layers,
        experts=options.experts,
        top_k=options.top_k,
        vision=options.vision,
        mtp=options.mtp,
        dense=options.dense,
        changes={"tie_word_embeddings": options.tied} | dict(options.changes),
    )
    layout = Layout(
        experts=options.layout or ("per_expert" if options.fp8 else "grouped"),
        mtp_experts=options.mtp_layout or "per_expert",
        fp32_stored_as=options.fp32_stored_as,
        fp8=options.fp8,
        mtp=options.mtp,
    )
    nbytes = write_tiny(options.target, config, layout, seed=options.seed, max_shard_size=options.max_shard_size)
    parameters = f"{config.num_parameters(mtp=True):,} parameters"
    print(f"{options.target}: {config.architectures[0]}, {parameters}, {format_bytes(nbytes)}")
