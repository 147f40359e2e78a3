"""`qwen35moe generate`: continues a prompt on standard output; the speed goes to standard error."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .options import CHECKPOINT, add_device, add_images, add_max_new_tokens, add_sampling, sampling
from .streams import checked_text, read_input
from .terminal import write_stream
from .visual import visual_inputs

HELP = "Continue a prompt; greedy unless --sample is given."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help=CHECKPOINT)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads standard input")
    add_images(parser, "to put before the prompt")
    parser.add_argument("--special", action="store_true", help="encode <|...|> in the prompt as control tokens")
    add_max_new_tokens(parser, 128)
    parser.add_argument("--sample", action="store_true", help="draw the tokens (default: always the most likely one)")
    add_sampling(parser)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Stream the continuation of the prompt."""
    values = sampling(options, options.sample, "add --sample, or leave it out")
    prompt = read_input() if options.prompt == "-" else checked_text(options.prompt, "--prompt")
    stop = [checked_text(text, "--stop") for text in options.stop or []] or None
    from ..loading.load import load_with_tokenizer

    # Files are read before the model is loaded: they may be missing.
    inputs = _inputs(options, prompt) if options.image or options.video else {}
    model, tokenizer = load_with_tokenizer(options.folder, dtype=options.dtype, device=options.device)
    ids = inputs["input_ids"][0].tolist() if inputs else tokenizer.encode(prompt, special=options.special)
    values |= {"max_new_tokens": options.max_new_tokens, "stop": stop}
    timer = write_stream(model, tokenizer, ids, **values, **visual_inputs(model, inputs))
    print()
    print(timer.summary(len(ids)), file=sys.stderr)


def _inputs(options: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The inputs of a prompt with images and videos before it."""
    from ..loading import load_processor

    processor = load_processor(options.folder)
    return processor.completion_inputs(prompt, options.image, options.video, special=options.special, progress=True)
