"""`qwen35moe generate | chat | inspect | convert | tiny | routing | backends | demo`: the library from the command line.

Errors are one line on stderr and exit status 2; --debug shows where they come from. Imports stand inside the
commands, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    # torch says so while it is imported where NumPy is not installed. No command needs it but plots, whose extra brings it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    # Warnings of the library (a part that was left out, a fast path that was refused) as lines of their own.
    logging.basicConfig(level=logging.INFO if options.debug else logging.WARNING, format="%(message)s")
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        expected = isinstance(error, (ValueError, OSError, ImportError))
        text = " ".join(str(error).split()) or "no message"
        print(
            f"qwen35moe: {text if expected else f'{type(error).__name__}: {text} (--debug says where)'}",
            file=sys.stderr,
        )
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qwen35moe", description="Qwen3.5-MoE in PyTorch.")
    parser.add_argument("--version", action="version", version=f"qwen35moe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_inspect(commands)
    _add_routing(commands)
    _add_convert(commands)
    _add_tiny(commands)
    _add_backends(commands)
    _add_demo(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: str, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.add_argument("--debug", action="store_true", help="show tracebacks and what the library logs")

    def call(options: argparse.Namespace) -> None:
        import importlib

        importlib.import_module(f"{__name__}.{run}").run(options)

    command.set_defaults(run=call)
    return command


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "generate", "generate", "Continue a prompt. Greedy, unless an option of sampling is given.")
    command.add_argument("folder", help="a checkpoint: a folder, a Hub name, or tiny")
    command.add_argument("--prompt", required=True, help="the text to continue; - reads it from standard input")
    _add_pictures(command, "put it before the prompt")
    command.add_argument("--special", action="store_true", help="let <|...|> in the prompt be control tokens")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most N tokens (default 128)")
    _add_sampling(command)
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    _add_placement(command)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "chat", "chat", "Talk with a model; a line is a message. /image PATH shows it a picture.")
    command.add_argument("folder", help="a checkpoint with a chat template: a folder or a Hub name")
    command.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _add_pictures(command, "show it with the first message")
    thinking = command.add_mutually_exclusive_group()
    thinking.add_argument("--think", dest="thinking", action="store_true", default=None, help="reason before the answer")
    thinking.add_argument("--no-think", dest="thinking", action="store_false", help="answer at once")
    command.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="at most N tokens (default 4096)")
    command.add_argument("--greedy", action="store_true", help="the most likely token each time (default: sample)")
    _add_sampling(command)
    _add_placement(command)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "inspect", "inspect", "What a checkpoint holds, from its headers alone.")
    command.add_argument("folder", help="a folder with config.json and safetensors files, or tiny")
    command.add_argument("--context", type=int, default=4096, metavar="N", help="estimate memory for N tokens (default 4096)")
    command.add_argument("--batch", type=int, default=1, metavar="B", help="and for B sequences at once (default 1)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_routing(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "routing", "routing", "What the routers choose on a text: load, margins, co-activation.")
    command.add_argument("folder", help="a checkpoint: a folder, a Hub name, or tiny")
    command.add_argument("--text", required=True, metavar="FILE", help="the text, UTF-8; - reads it from standard input")
    command.add_argument("--window", type=int, default=1024, metavar="N",
                         help="tokens read at once; each window is a sequence of its own (default 1024)")  # fmt: skip
    command.add_argument("--out", metavar="TRACE", help="write indices and weights here (safetensors; Routing.load reads it)")
    command.add_argument("--logits", action="store_true", help="write the routers' logits into the trace as well")
    command.add_argument("--plot", metavar="PNG", help="draw load, margins and co-activation here (needs matplotlib)")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_placement(command)


_LAYOUTS = ("grouped", "per_expert")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "convert", "convert", "Write a checkpoint in another layout, dtype or number of layers.")
    command.add_argument("source", help="a folder with config.json and safetensors files, or a Hub name")
    command.add_argument("target", help="the folder to write; it changes at once, when everything is written")
    command.add_argument("--layout", choices=_LAYOUTS, help="how experts are stored (default: as they are)")
    command.add_argument("--mtp-layout", choices=_LAYOUTS, help="the same for the MTP head (default: as --layout)")
    command.add_argument("--dtype", help="bfloat16, float16, float32 or float64; FP8 is dequantised (default: as stored)")
    command.add_argument("--layers", type=_layers, metavar="LIST", help="only these, renumbered: 0-3 or 0,4,8-11")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file: 500MB, 2GiB (default 5GB)")


def _add_tiny(commands: argparse._SubParsersAction) -> None:
    help = "Write a small random checkpoint in a published layout, in which every tensor matters: for tests."
    command = _command(commands, "tiny", "tiny", help)
    command.add_argument("target", help="the folder to write")
    command.add_argument("--layers", type=int, default=4, metavar="L", help="decoder layers, every fourth attends (default 4)")
    command.add_argument("--experts", type=int, default=8, metavar="E", help="routed experts of a layer (default 8)")
    command.add_argument("--top-k", type=int, default=2, metavar="S", help="experts per token (default 2)")
    command.add_argument("--dense", action="store_true", help="no experts: the dense family, qwen3_5")
    command.add_argument("--vision", action="store_true", help="with a vision tower, and config.json nested")
    command.add_argument("--mtp", action="store_true", help="with a multi-token-prediction head")
    command.add_argument("--layout", choices=_LAYOUTS, help="how experts are stored (default grouped; FP8 per_expert)")
    command.add_argument("--mtp-layout", choices=_LAYOUTS, help="the same for the MTP head (default per_expert, as in 3.5)")
    command.add_argument("--fp8", action="store_true", help="block-FP8 as published: 128 x 128, bfloat16 weight_scale_inv")
    command.add_argument("--islands", choices=("F32", "BF16"), default="F32", help="of A_log: F32 as in 3.5, or BF16 as in 3.6")
    command.add_argument("--tied", action="store_true", help="the output head is the embedding")
    command.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="changes",
                         help="a key of text_config, for other sizes: hidden_size=192; may be given several times")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file: 100KB, 2GiB (default 5GB)")


def _layers(text: str) -> list[int]:
    """[0, 1, 2, 3, 7] for 0-3,7."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(part) > 20:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is no layer and no range of layers like 0-3")
        found += range(int(first), min(int(last), int(first) + 10_000) + 1) if dash else [int(first)]
    return found


def _setting(text: str) -> tuple[str, Any]:
    """("hidden_size", 192) for hidden_size=192; the value is JSON."""
    key, equals, value = text.partition("=")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE with a value in JSON") from None


def _add_backends(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "backends", "backends", "Every implementation of every operation, and whether it is used.")
    command.add_argument("--verify", action="store_true", help="run each against its definition, forward and backward")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    help = "Load a model, stream a text, look at a picture, show what ran and where the tokens went."
    command = _command(commands, "demo", "demo", help)
    command.add_argument("folder", nargs="?", default="tiny", help="a checkpoint (default: the bundled one)")
    command.add_argument("--prompt", default="In the beginning", help="the text to continue")
    command.add_argument("--max-new-tokens", type=int, default=120, metavar="N", help="at most N tokens (default 120)")
    help = "the picture to look at (default: the checkpoint's example.png, if it has one)"
    command.add_argument("--image", metavar="FILE", help=help)
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    _add_placement(command)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", type=float, metavar="T", help="sample, with logits divided by T")
    command.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    command.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of mass P")
    command.add_argument("--min-p", type=float, metavar="P", help="sample from tokens at least P times as likely as the first")
    command.add_argument("--seed", type=int, help="the same seed gives the same text (implies sampling)")


def _add_pictures(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--image", action="append", metavar="FILE", help=f"an image: {what}; may be given several times")
    command.add_argument("--video", action="append", metavar="FILE", help=f"a video: {what}; may be given several times")


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    help = "cpu, cuda:1, ...; several (cuda:0,cuda:1), or auto for all GPUs, share the layers (default cpu)"
    command.add_argument("--device", default="cpu", type=_devices, help=help)


def _devices(text: str) -> str | list[str]:
    """["cuda:0", "cuda:1"] for cuda:0,cuda:1."""
    return text.split(",") if "," in text else text
