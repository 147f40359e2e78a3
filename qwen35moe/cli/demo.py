"""`qwen35moe demo`: generates a text, describes an image, and prints the speed, the implementations and the expert load."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import CHECKPOINT, add_device, add_max_new_tokens
from .streams import checked_text
from .terminal import can_print, printable, write_stream

HELP = "Generate a text, describe an image, show the implementations that ran and the expert load."
EXAMPLE = "example.png"
BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#%@"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", nargs="?", default="tiny", help=f"{CHECKPOINT}; default: tiny")
    parser.add_argument("--prompt", metavar="TEXT", default="In the beginning", help="the text to continue")
    add_max_new_tokens(parser, 120)
    parser.add_argument("--image", metavar="FILE", help=f"the image to describe (default: {EXAMPLE} of the checkpoint, if any)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Load the model, generate a text, describe an image if the model has a vision tower, then print the tables."""
    from .. import backends
    from ..loading import find
    from ..loading.load import load_with_tokenizer

    prompt = checked_text(options.prompt, "--prompt")
    model, tokenizer = load_with_tokenizer(options.folder, dtype=options.dtype, device=options.device)
    config = model.config.text_config
    summary = f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers"
    if config.is_moe:
        summary += f", {config.num_experts} experts ({config.num_experts_per_tok} per token)"
    print(printable(f"{options.folder}: {summary}, {str(model.dtype).removeprefix('torch.')}"))

    ids = tokenizer.encode(prompt)
    print(f"\n{printable(prompt)}", end="", flush=True)
    sampling: dict[str, Any] = dict(do_sample=True, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=options.seed)
    with backends.ran() as ran:
        timer = write_stream(model, tokenizer, ids, max_new_tokens=options.max_new_tokens, **sampling)
        print(f"\n\n{timer.summary(len(ids))}\n")
        _describe_image(model, find(options.folder), options.image)
    print(implementation_table(ran.counts))
    if config.is_moe:
        print("\n" + expert_load(model, ids + timer.ids))


def _describe_image(model: Any, folder: Path, image: str | None) -> None:
    """Print the model's description of an image, by default of the checkpoint's example."""
    from ..processing import Processor
    from .image_demo import describe
    from .visual import check_vision

    if image is None and not (folder / EXAMPLE).is_file():
        return
    check_vision(model)
    try:
        print(describe(model, Processor.from_pretrained(folder), image or folder / EXAMPLE) + "\n")
    except ModuleNotFoundError as error:  # the text demo works without Pillow
        if image is not None:
            raise
        print(f"{EXAMPLE} is skipped: {error}\n")


def implementation_table(counts: Mapping[tuple[str, str], int]) -> str:
    """One line per operation and implementation with its number of calls."""
    lines = [f"{'operation':<20}{'implementation':<16}{'calls':>7}"]
    lines += [f"{operation:<20}{name:<16}{count:>7}" for (operation, name), count in counts.items()]
    return "\n".join(lines)


def expert_load(model: Any, ids: Sequence[int]) -> str:
    """The load of each layer's experts for one text: one row of bars per layer.

    A bar's height is the expert's share of the assignments; the even share 1/E is the middle of the scale.
    """
    import torch

    from ..routing import expert_load as load_of

    with torch.no_grad():
        out = model(torch.tensor([list(ids)], device=model.device), output_routing=True, logits_to_keep=1)
    load = load_of(out.routing).cpu()  # [L, E]
    even = 1 / load.shape[1]
    scale = f"even load {even:.1%}, full bar {2 * even:.1%}"
    lines = [f"load of the {load.shape[1]} experts of each layer over {len(ids)} tokens ({scale})"]
    for layer, shares in zip(out.routing.layers, load.tolist(), strict=True):
        bars = "".join(bar(share / (2 * even)) for share in shares)
        lines.append(f"  layer {layer:<3} |{bars}|  {min(shares):.1%} to {max(shares):.1%}")
    return "\n".join(lines)


def bar(height: float) -> str:
    """One character for a height in 0..1; heights above 0 are never blank."""
    scale = BLOCKS if can_print(BLOCKS) else ASCII
    step = round(height * (len(scale) - 1))
    return scale[min(max(step, 1 if height > 0 else 0), len(scale) - 1)]
