"""`qwen35moe chat`: a conversation on the terminal, or through a pipe, with text, images and videos.

A line is a turn; /image PATH and /video PATH put a picture before the next one. What was said before is not computed
again: after each prompt the cache's state is kept as a snapshot, because templates leave earlier reasoning out of the next
prompt, and the state after the reply is then of no use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .generate import Clock, printable, shown

DIM, PLAIN = "\033[2m", "\033[0m"
COMMANDS = "/image PATH, /video PATH: show it with the next message; /new: begin again; /help; /exit"


class Conversation:
    """Messages, and a cache that holds a beginning of their tokens.

    for thinking, piece in conversation.say("What is this?", ["cat.png"]): ...
    """

    def __init__(
        self, model: Any, processor: Any, *, system: str | None = None, variables: dict[str, Any], **options: Any
    ) -> None:
        """variables: for the template (enable_thinking, ...). options: those of `model.generate`."""
        self.model, self.processor, self.variables, self.options = model, processor, variables, options
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.clock = Clock()
        self.prompt_tokens = self.reused = 0
        self._cache = model.new_cache(1)
        self._held: list[int] | None = []  # what the cache holds; None where a reply was broken off
        self._point: tuple[Any, list[int]] | None = None  # a snapshot of it, and what it held then

    def say(self, text: str, pictures: list[tuple[str, Any]] | None = None) -> Iterator[tuple[bool, str]]:
        """The reply to a message, in pieces: (is it reasoning, text). The message counts as said once the reply ends."""
        content: Any = text
        if pictures:
            content = [{"type": kind, kind: picture} for kind, picture in pictures] + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        given = self.processor.apply_chat_template(messages, add_generation_prompt=True, progress=True, **self.variables)
        ids = given["input_ids"][0].tolist()
        kept = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        seen = shown(self.model, {name: given[name] for name in kept if name in given})
        self.prompt_tokens, self.clock = len(ids), Clock()
        self._prepare(messages, ids, seen)
        new: list[int] = []
        yield from self._stream(ids, seen, new)
        self._held = ids + new[:-1]  # the last token of a reply is not fed
        self.messages = [*messages, self.processor.parse(new, prompt=ids).message()]

    def _prepare(self, messages: list[dict[str, Any]], ids: list[int], seen: dict[str, Any]) -> None:
        """Bring the cache to the longest state that it has of a beginning of `ids`, then to the end of the messages."""
        held, self._held = self._held, None  # until the model has run
        if held is None or held != ids[: len(held)] or len(held) == len(ids):
            point, held = self._point or (None, ids)
            if point is not None and len(held) < len(ids) and held == ids[: len(held)]:
                self._cache.restore(point)
            else:
                self._cache, held = self.model.new_cache(1), []
        self.reused, stable = len(held), self._said(messages, ids)
        if len(held) < stable < len(ids):
            self.model.generate(ids[:stable], cache=self._cache, max_new_tokens=1, eos_token_id=[], **seen)
            held = ids[:stable]
        self._point = (self._cache.snapshot(), held)

    def _said(self, messages: list[dict[str, Any]], ids: list[int]) -> int:
        """How many of the ids the messages take, without the beginning of the reply: later prompts begin with these."""
        text = self.processor.render(messages, **self.variables)
        whole = self.processor.render(messages, add_generation_prompt=True, **self.variables)
        if not whole.startswith(text):
            return 0
        rest = self.processor.tokenizer.encode(whole[len(text) :], special=True)  # it is the template's own
        return len(ids) - len(rest) if rest and ids[-len(rest) :] == rest else 0

    def _stream(self, ids: list[int], seen: dict[str, Any], new: list[int]) -> Iterator[tuple[bool, str]]:
        from ..generation import TextStream
        from ..generation.settings import end_tokens
        from ..processing.reply import THINK, THOUGHT

        tokenizer, ends = self.processor.tokenizer, set(end_tokens(self.model))
        begin, end = (tokenizer.token_to_id(each) for each in (THINK, THOUGHT))
        thinking = next((each == begin for each in reversed(ids) if each in (begin, end)), False)
        text = TextStream(tokenizer)
        for step in self.model.stream(ids, cache=self._cache, **seen, **self.options):
            token = int(step)
            new.append(token)
            self.clock.tick(token)
            if token in ends:
                break
            if token in (begin, end):
                yield thinking, text.end()
                thinking = token == begin
            else:
                yield thinking, text.put(token)
        yield thinking, text.end()


def run(options: argparse.Namespace) -> None:
    """Read messages until the input ends; write replies on standard output, all else on standard error."""
    from ..loading import load, load_processor

    shaping = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    if options.greedy and any(value is not None for value in shaping.values()):
        raise ValueError("--greedy takes the most likely token: temperature, top-k, top-p, min-p and seed have no say in it")
    shaping |= {"do_sample": not options.greedy, "max_new_tokens": options.max_new_tokens}
    processor = load_processor(options.folder)
    if processor.template is None:
        raise ValueError(f"{options.folder} has no chat template (chat_template.jinja): use `qwen35moe generate`")
    model, _ = load(options.folder, dtype=options.dtype, device=options.device)
    variables: dict[str, Any] = {} if options.thinking is None else {"enable_thinking": options.thinking}

    def begin() -> Conversation:
        return Conversation(model, processor, system=options.system, variables=variables, **shaping)

    _talk(begin, [("image", each) for each in options.image or ()] + [("video", each) for each in options.video or ()])


def _talk(begin: Callable[[], Conversation], pictures: list[tuple[str, Any]]) -> None:
    conversation, asks = begin(), sys.stdin.isatty()
    if asks:
        print(COMMANDS, file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        command, _, rest = line.strip().partition(" ")
        if command in ("/image", "/video"):
            pictures.append((command[1:], rest.strip()))
        elif command == "/new":
            conversation, pictures = begin(), []
        elif command == "/help":
            print(COMMANDS, file=sys.stderr)
        elif command.startswith("/") and "/" not in command[1:]:
            _complain(f"there is no command {command}: {COMMANDS}", asks)
        elif line.strip():
            try:
                _write(conversation.say(line.strip(), pictures))
                if asks:
                    print(f"({conversation.clock.summary(conversation.prompt_tokens)})", file=sys.stderr)
            except ValueError as error:
                _complain(str(error), asks)
            pictures = []


def _complain(text: str, asks: bool) -> None:
    """A mistake ends a pipe, and not a conversation."""
    if not asks:
        raise ValueError(text)
    print(f"qwen35moe: {' '.join(text.split())}", file=sys.stderr)


def _write(pieces: Iterator[tuple[bool, str]]) -> None:
    """Reasoning dim on a terminal; elsewhere it goes to standard error, so that a pipe gets the answer."""
    colours, dim, begun = sys.stdout.isatty(), False, False
    for thinking, piece in pieces:
        if not begun and not thinking:
            piece = piece.lstrip("\n")
            begun = bool(piece)
        if thinking and not colours:
            sys.stderr.write(printable(piece))
            continue
        if thinking != dim:
            sys.stdout.write(DIM if thinking else f"{PLAIN}\n")
            dim = thinking
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    sys.stdout.write(f"{PLAIN if dim else ''}\n")
    sys.stdout.flush()
