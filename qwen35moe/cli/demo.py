"""`qwen35moe demo`: a model loads, writes, says what it sees, and shows what ran and where its tokens went."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .generate import can_print, printable, write_stream

EXAMPLE = "example.png"
BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*#%@"


def run(options: argparse.Namespace) -> None:
    """Load, stream a text, look at a picture if the model sees, then print speed, implementations and expert load."""
    from .. import backends
    from ..loading import find, load

    model, tokenizer = load(options.folder, dtype=options.dtype, device=options.device)
    config = model.config.text_config
    what = f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers"
    if config.is_moe:
        what += f", {config.num_experts} experts of which {config.num_experts_per_tok} per token"
    print(f"{options.folder}: {what}, {model.dtype}")

    ids = tokenizer.encode(options.prompt)
    print(f"\n{printable(options.prompt)}", end="", flush=True)
    sampling: dict[str, Any] = dict(do_sample=True, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=options.seed)
    with backends.ran() as ran:
        clock = write_stream(model, tokenizer, ids, max_new_tokens=options.max_new_tokens, **sampling)
        print(f"\n\n{clock.summary(len(ids))}\n")
        _look(model, find(options.folder), options.image)
    print(what_ran(ran.counts))
    if config.is_moe:
        print("\n" + expert_load(model, ids + clock.ids))


def _look(model: Any, folder: Path, image: str | None) -> None:
    """What the model says of an image, by default of the one that its checkpoint brings."""
    from ..processing import Processor
    from .look import look

    if image is None and not (folder / EXAMPLE).is_file():
        return
    if not hasattr(model, "visual"):
        raise ValueError(f"{type(model).__name__} has no vision tower: images need a multimodal checkpoint")
    try:
        print(look(model, Processor.from_pretrained(folder), image or folder / EXAMPLE) + "\n")
    except ModuleNotFoundError as error:  # text needs no Pillow
        if image is not None:
            raise
        print(f"{EXAMPLE} is not shown: {error}\n")


def what_ran(counts: Mapping[tuple[str, str], int]) -> str:
    """One line per operation and implementation; `backends.ran()` itself also knows layers and shapes."""
    lines = [f"{'operation':<20}{'ran on':<14}{'calls':>7}"]
    lines += [f"{operation:<20}{name:<14}{count:>7}" for (operation, name), count in counts.items()]
    return "\n".join(lines)


def expert_load(model: Any, ids: Sequence[int]) -> str:
    """How the choices of each layer's router spread over its experts, for one text: a row of bars per layer.

    A bar's height is the expert's share of the choices; the even share 1/E stands in the middle of the scale.
    """
    import torch

    from ..routing import expert_load as load_of

    with torch.no_grad():
        out = model(torch.tensor([list(ids)], device=model.device), output_routing=True, logits_to_keep=1)
    load = load_of(out.routing).cpu()  # [L, E]
    even = 1 / load.shape[1]
    lines = [f"share of each of {load.shape[1]} experts, over {len(ids)} tokens (even: {even:.1%}, full bar: {2 * even:.1%})"]
    for layer, shares in zip(out.routing.layers, load.tolist(), strict=True):
        bars = "".join(bar(share / (2 * even)) for share in shares)
        lines.append(f"  layer {layer:<3} |{bars}|  from {min(shares):.1%} to {max(shares):.1%}")
    return "\n".join(lines)


def bar(height: float) -> str:
    """One character for a height in 0..1; what is used at all never looks empty."""
    scale = BLOCKS if can_print(BLOCKS) else PLAIN
    step = round(height * (len(scale) - 1))
    return scale[min(max(step, 1 if height > 0 else 0), len(scale) - 1)]
