"""Draws vision_positions.png: `python docs/figures/vision_positions.py` (needs matplotlib and Pillow).

The photograph of Grace Hopper (U.S. Navy, public domain) is part of matplotlib. The same versions give the same figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor

from qwen35moe import Config
from qwen35moe.models.vision_inputs import token_types
from qwen35moe.processing import ImageProcessor
from qwen35moe.processing.plots import draw_vision


def prompt() -> dict[str, Tensor]:
    """Text, an image, text, a smaller image, text, with the ids of the 35B model; text tokens are 0."""
    config = Config.preset("35b-a3b")
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    images = [photograph.crop((0, 0, 512, 384)), photograph.crop((165, 80, 357, 336)).resize((96, 128))]
    pixels = ImageProcessor()(images, min_pixels=4_096, max_pixels=49_152)  # small, so that the numbers of tokens fit
    ids = [0] * 6
    for tokens, words in zip((pixels["image_grid_thw"].prod(1) // 4).tolist(), (5, 6), strict=True):
        ids += [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id, *[0] * words]
    ids = torch.tensor([ids])
    return {"input_ids": ids, "mm_token_type_ids": token_types(ids, config), **pixels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("vision_positions.png"))
    out = parser.parse_args().out
    draw_vision(prompt(), out)
    with Image.open(out) as page:
        page.convert("RGB").quantize(256).save(out, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
