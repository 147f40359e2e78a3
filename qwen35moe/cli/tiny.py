"""`qwen35moe tiny`: writes a small random checkpoint in a published layout, for the tests of other programs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_layouts, add_max_shard_size, refuse_without_effect
from .terminal import format_bytes

HELP = "Write a small random checkpoint in a published layout, for tests."
# Keys of text_config that an option sets too.
_SET_BY = {"num_hidden_layers": "layers", "layer_types": "layers", "num_experts": "experts", "num_experts_per_tok": "top_k",
           "tie_word_embeddings": "tied", "mtp_num_hidden_layers": "mtp", "model_type": "dense"}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--layers", type=int, metavar="N",
                        help="number of decoder layers, every fourth with attention (default: 4)")  # fmt: skip
    parser.add_argument("--experts", type=int, metavar="N", help="routed experts per layer (default: 8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="experts per token (default: 2)")
    parser.add_argument("--dense", action="store_true", help="a dense model (qwen3_5) without experts")
    parser.add_argument("--vision", action="store_true", help="add a vision tower; config.json is nested")
    parser.add_argument("--mtp", action="store_true", help="add a multi-token-prediction head")
    add_layouts(parser, "grouped; per_expert with --fp8", "per_expert, as in Qwen3.5")
    parser.add_argument("--fp8", action="store_true", help="block-FP8 as published: blocks of 128 x 128, weight_scale_inv")
    parser.add_argument("--fp32-stored-as", choices=("F32", "BF16"),
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


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of text_config that --set names; ValueError for one that is set twice, or by another option too."""
    changes: dict[str, Any] = {}
    for key, value in options.changes:
        if key in changes:
            raise ValueError(f"--set {key} is given twice")
        changes[key] = value
    for key, option in _SET_BY.items():
        if key in changes and getattr(options, option):
            raise ValueError(f"--set {key} and --{option.replace('_', '-')} set the same: give one of them")
    return {"tie_word_embeddings": options.tied} | changes


def run(options: argparse.Namespace) -> None:
    """Write the checkpoint and print its size."""
    from ..checkpoint.published import Layout
    from ..checkpoint.tiny import tiny_config, write_tiny

    if options.dense:
        refuse_without_effect(options, ("experts", "top_k", "layout", "mtp_layout"), "a dense model (--dense) has no experts")
    if not options.mtp:
        refuse_without_effect(options, ("mtp_layout",), "there is no MTP head without --mtp")
    changes = _changes(options)
    config = tiny_config(
        layers=4 if options.layers is None else options.layers,
        experts=8 if options.experts is None else options.experts,
        top_k=2 if options.top_k is None else options.top_k,
        vision=options.vision,
        mtp=options.mtp,
        dense=options.dense,
        changes=changes,
    )
    if "linear_attention" not in config.text_config.layer_types:
        refuse_without_effect(options, ("fp32_stored_as",), "no layer is a Gated DeltaNet")
    mtp = config.text_config.mtp_num_hidden_layers > 0
    layout = Layout(
        experts=options.layout or ("per_expert" if options.fp8 else "grouped"),
        mtp_experts=options.mtp_layout or "per_expert",
        fp32_stored_as=options.fp32_stored_as or "F32",
        fp8=options.fp8,
        mtp=mtp,
    )
    nbytes = write_tiny(options.target, config, layout, seed=options.seed, max_shard_size=options.max_shard_size)
    parameters = f"{config.num_parameters(mtp=True):,} parameters"
    print(f"{options.target}: {config.architectures[0]}, {parameters}, {format_bytes(nbytes)}")
