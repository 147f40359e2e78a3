"""100 images of one megapixel to pixel values, beside transformers' Pillow-based processor; the values are bit-equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.tools.common import Report, arguments, limit_dtypes
from qwen35moe.processing import ImageProcessor


def random_images(count: int) -> list[Any]:
    """Images of 1 MP in three shapes: smoothed noise, so that the resampling filter matters."""
    from PIL import Image

    generator, images = torch.Generator().manual_seed(0), []
    for number in range(count):
        height, width = ((1000, 1000), (750, 1333), (1250, 800))[number % 3]
        noise = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
        coarse = Image.frombytes("RGB", (width // 8, height // 8), bytes(noise.flatten().tolist()))
        images.append(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return images


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=20, help="images per call: 24 MB of values each")
    options = parser.parse_args(argv)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    published = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "temporal_patch_size": 2,
                 "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    theirs, ours = Qwen2VLImageProcessorPil(**published), ImageProcessor()
    images = random_images(options.images)
    batches = [images[start : start + options.batch] for start in range(0, len(images), options.batch)]
    report = Report("processing", rounds=options.rounds, dtypes=limit_dtypes(options, torch.float32))
    with report.case(f"images/N{options.images}/1MP") as case:
        for batch in (images[:3], images[-2:]):
            case.check("ours", ours(batch)["pixel_values"], theirs(batch, return_tensors="pt")["pixel_values"], bound=0.0)
        implementations = {
            "transformers": lambda: [theirs(batch, return_tensors="pt") and None for batch in batches],
            "ours": lambda: [ours(batch) and None for batch in batches],
        }
        case.time(implementations, baseline="transformers", warmup=0)
    return report.finish(options)
