"""`qwen35moe tiny`: a small random checkpoint in a published layout, for the tests of other programs."""

from __future__ import annotations

import argparse

from .inspect import size


def run(options: argparse.Namespace) -> None:
    """Write it and say what it is."""
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
        fp32_stored_as=options.islands,
        fp8=options.fp8,
        mtp=options.mtp,
    )
    written = write_tiny(options.target, config, layout, seed=options.seed, max_shard_size=options.max_shard_size)
    print(f"{options.target}: {config.architectures[0]}, {config.num_parameters(mtp=True):,} parameters, {size(written)}")
