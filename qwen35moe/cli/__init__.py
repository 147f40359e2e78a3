"""The command line: `qwen35moe generate | chat | inspect | routing | convert | tiny | backends | demo`.

Each command is a file of this package with HELP, add_arguments(parser) and run(options). Errors are one line on standard error
and exit status 2; --debug shows the traceback. torch is imported by the commands, not for --help.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from .. import __version__
from . import backends, chat, convert, demo, generate, inspect, routing, streams, tiny

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "routing": routing,
    "convert": convert,
    "tiny": tiny,
    "backends": backends,
    "demo": demo,
}

WRITES_FILES = ("convert", "tiny")  # commands that also run with a closed standard output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    closed = streams.open_missing()
    options = _options(arguments)
    # torch warns while it is imported without NumPy. Only plots need NumPy, and their extra installs it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    # Warnings of the library (parts that are not loaded, implementations that cannot run) as plain lines.
    logging.basicConfig(level=logging.INFO if options.debug else logging.WARNING, format="%(message)s")
    try:
        if "stdout" in closed and options.command not in WRITES_FILES:
            raise ValueError(f"standard output is closed: {options.command} writes its result there")
        options.run(options)
        streams.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        streams.discard(sys.stdout)
        streams.discard(sys.stderr)
        return 0
    except Exception as error:
        if options.debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        if not isinstance(error, (ValueError, OSError, ImportError)):
            text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
        streams.say(f"qwen35moe: {text}")
        with suppress(OSError):
            streams.flush()  # a full disk: Python would try again when the process ends
        return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. --help, --version and wrong options end the process, also where nobody reads their output."""
    try:
        return _parser().parse_args(arguments)
    except SystemExit:
        with suppress(OSError):
            streams.flush()
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of argparse's usage block."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qwen35moe", description="Run, inspect and convert Qwen3.5-MoE checkpoints.")
    parser.add_argument("--version", action="version", version=f"qwen35moe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks and the library's log")
        command.set_defaults(run=module.run, command=name)
    return parser
