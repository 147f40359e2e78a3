"""`qwen35moe chat`: a conversation on the terminal or through a pipe, with text, images and videos.

One line is one message; /image PATH and /video PATH attach a file to the next one. Earlier messages are not computed again:
the cache is snapshotted at the end of each prompt's messages, because chat templates remove earlier reasoning from later
prompts, so that the state after a reply cannot be reused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .options import add_device, add_images, add_max_new_tokens, add_sampling, sampling
from .streams import checked_text, is_closed, read_line
from .terminal import TokenTimer, printable
from .visual import visual_inputs

HELP = "Chat with a model, one line per message; /image PATH attaches an image."
DIM, PLAIN = "\033[2m", "\033[0m"
COMMANDS = "/image PATH, /video PATH: attach a file to the next message; /new: new conversation; /help; /exit"

Media = list[tuple[str, Any]]  # ("image" or "video", path) in order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help="a checkpoint with a chat template: a folder, a Hub name, or tiny")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_images(parser, "to attach to the first message")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--think", dest="thinking", action="store_true", default=None, help="turn reasoning on")
    thinking.add_argument("--no-think", dest="thinking", action="store_false", help="turn reasoning off")
    add_max_new_tokens(parser, 4096)
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token (default: sample)")
    add_sampling(parser)
    add_device(parser)


class Conversation:
    """The messages, and a cache that holds a prefix of their tokens.

    for thinking, piece in conversation.send("What is this?", [("image", "cat.png")]): ...
    """

    def __init__(
        self, model: Any, processor: Any, *, system: str | None = None, variables: dict[str, Any], **options: Any
    ) -> None:
        """variables: of the template (enable_thinking, ...). options: of `model.generate`."""
        self.model, self.processor, self.variables, self.options = model, processor, variables, options
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.timer = TokenTimer()
        self.prompt_tokens = self.reused_tokens = 0
        self._cache = model.new_cache(1)
        self._cached: list[int] | None = []  # the tokens in the cache; None after an interrupted reply
        self._snapshot: tuple[Any, list[int]] | None = None  # of the cache, with its tokens

    def send(self, text: str, media: Media | None = None) -> Iterator[tuple[bool, str]]:
        """The reply to a message, in pieces: (is reasoning, text). Message and reply are recorded when the reply ends."""
        content: Any = text
        if media:
            content = [{"type": kind, kind: item} for kind, item in media] + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True, progress=True, **self.variables)
        ids = inputs["input_ids"][0].tolist()
        visual = visual_inputs(self.model, inputs)
        self.prompt_tokens, self.timer = len(ids), TokenTimer()
        self._prefill(messages, ids, visual)
        new: list[int] = []
        yield from self._stream(ids, visual, new)
        self._cached = ids + new[:-1]  # the last token of a reply is not fed to the model
        self.messages = [*messages, self.processor.parse(new, prompt=ids).message()]

    def _prefill(self, messages: list[dict[str, Any]], ids: list[int], visual: dict[str, Any]) -> None:
        """Bring the cache to the longest available prefix of `ids`, run the messages, and take a snapshot."""
        cached, self._cached = self._cached, None  # unknown until the model has run
        if cached is None or cached != ids[: len(cached)] or len(cached) == len(ids):
            snapshot, cached = self._snapshot or (None, ids)
            if snapshot is not None and len(cached) < len(ids) and cached == ids[: len(cached)]:
                self._cache.restore(snapshot)
            else:
                self._cache, cached = self.model.new_cache(1), []
        self.reused_tokens, end = len(cached), self._messages_end(messages, ids)
        if len(cached) < end < len(ids):
            self.model.generate(ids[:end], cache=self._cache, max_new_tokens=1, eos_token_id=[], **visual)
            cached = ids[:end]
        self._snapshot = (self._cache.snapshot(), cached)

    def _messages_end(self, messages: list[dict[str, Any]], ids: list[int]) -> int:
        """The number of ids before the generation prompt: later prompts start with these. 0 if it cannot be determined."""
        text = self.processor.render(messages, **self.variables)
        prompt = self.processor.render(messages, add_generation_prompt=True, **self.variables)
        if not prompt.startswith(text):
            return 0
        generation_prompt = self.processor.tokenizer.encode(prompt[len(text) :], special=True)
        n = len(generation_prompt)
        return len(ids) - n if n and ids[-n:] == generation_prompt else 0

    def _stream(self, ids: list[int], visual: dict[str, Any], new: list[int]) -> Iterator[tuple[bool, str]]:
        """Generate the reply; its ids are appended to `new`."""
        from ..generation import TextStream
        from ..generation.defaults import end_tokens
        from ..processing.reply import THINK_END, THINK_START

        tokenizer, ends = self.processor.tokenizer, set(end_tokens(self.model))
        start, end = (tokenizer.token_to_id(token) for token in (THINK_START, THINK_END))
        thinking = next((token == start for token in reversed(ids) if token in (start, end)), False)
        text = TextStream(tokenizer)
        for step in self.model.stream(ids, cache=self._cache, **visual, **self.options):
            token = int(step)
            new.append(token)
            self.timer.add(token)
            if token in ends:
                break
            if token in (start, end):
                yield thinking, text.end()
                thinking = token == start
            else:
                yield thinking, text.put(token)
        yield thinking, text.end()


def run(options: argparse.Namespace) -> None:
    """Read messages until the input ends; replies go to standard output, everything else to standard error."""
    settings = sampling(options, not options.greedy, "leave --greedy out")
    settings |= {"max_new_tokens": options.max_new_tokens}
    system = None if options.system is None else checked_text(options.system, "--system")
    interactive(sys.stdin)  # raises early where there is no standard input
    from ..loading import load, load_processor

    processor = load_processor(options.folder)
    if processor.template is None:
        raise ValueError(f"{options.folder} has no chat template (chat_template.jinja): use `qwen35moe generate`")
    model, _ = load(options.folder, dtype=options.dtype, device=options.device)
    variables: dict[str, Any] = {} if options.thinking is None else {"enable_thinking": options.thinking}

    def new_conversation() -> Conversation:
        return Conversation(model, processor, system=system, variables=variables, **settings)

    _loop(new_conversation, [("image", path) for path in options.image] + [("video", path) for path in options.video])


def _loop(new_conversation: Callable[[], Conversation], media: Media) -> None:
    """Read lines and answer them. media: attached to the first message."""
    conversation, terminal = new_conversation(), interactive(sys.stdin)
    if terminal:
        print(COMMANDS, file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = read_line()
        if not line or line.strip() == "/exit":
            return
        command, _, rest = line.strip().partition(" ")
        if command in ("/image", "/video"):
            media.append((command[1:], rest.strip()))
        elif command == "/new":
            conversation, media = new_conversation(), []
        elif command == "/help":
            print(COMMANDS, file=sys.stderr)
        elif command.startswith("/") and "/" not in command[1:]:
            _report(f"unknown command {command[:40]}. {COMMANDS}", terminal)
        elif line.strip():
            try:
                _write(conversation.send(line.strip(), media))
                if terminal:
                    print(f"({conversation.timer.summary(conversation.prompt_tokens)})", file=sys.stderr)
            except ValueError as error:
                _report(str(error), terminal)
            media = []


def interactive(stdin: Any) -> bool:
    """Whether standard input is a terminal; ValueError without one."""
    if is_closed(stdin):
        raise ValueError("standard input is closed: chat reads its messages there, one line each")
    return stdin.isatty()


def _report(text: str, terminal: bool) -> None:
    """Print an error and go on in a terminal; raise it in a pipe."""
    if not terminal:
        raise ValueError(text)
    print(f"qwen35moe: {' '.join(text.split())}", file=sys.stderr)


def _write(pieces: Iterator[tuple[bool, str]]) -> None:
    """Write a reply. Reasoning is dim on a terminal; otherwise it goes to standard error, so that a pipe gets the answer."""
    terminal, dim, started = sys.stdout.isatty(), False, False
    for thinking, piece in pieces:
        if not started and not thinking:
            piece = piece.lstrip("\n")
            started = bool(piece)
        if thinking and not terminal:
            sys.stderr.write(printable(piece))
            continue
        if thinking != dim:
            sys.stdout.write(DIM if thinking else f"{PLAIN}\n")
            dim = thinking
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    sys.stdout.write(f"{PLAIN if dim else ''}\n")
    sys.stdout.flush()
