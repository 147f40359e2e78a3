"""The loop: prompt in, one new token per row and step out.

    prefill -> [penalties -> masks -> the caller's processors -> temperature, top-k, top-p, min-p] -> pick -> feed it -> ...

The rules are those of transformers' `generate`, so that greedy tokens are the same. Unlike there, padding on either side
changes nothing: each row's answer is the one it gets alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..backends.values import send
from ..compat import short
from ..compat.generate import GENERATE
from ..models.arguments import takes
from ..models.generation_inputs import GenerateInputs, StreamInputs, expand
from .captured import CapturedSteps, captured_steps, prefers_static
from .decoding import DecodingState
from .defaults import end_tokens, padding_token, settings_of
from .late import BEHIND, ImmediateCopy, LateReads, Read, late_copy
from .output import GenerateOutput
from .prepare import check_cache, prepared_arguments, replaced_prepare
from .prompt import Prompt
from .prompt import read as read_prompt
from .settings import Settings, resolve
from .stop import Decoder, StopStrings


@takes(GenerateInputs, GENERATE)
def generate(model: Any, inputs: GenerateInputs) -> Any:
    """Continues the prompts: [B*n, prompt + new] int64, the caller's columns first, `pad_token_id` after a row has ended; with
    return_dict_in_generate=True a GenerateOutput. Keywords of transformers: see docs/guide/from_transformers.md.

    ValueError: empty prompt, ids outside the vocabulary, a prompt that does not fit the cache, NaN logits, an
    argument out of range; each names the values. All but NaN are raised before anything is computed.
    """
    inputs = expand(inputs)
    flags = _output_flags(model, inputs)
    streamer = inputs.streamer
    if streamer is not None and not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise ValueError(f"the streamer {short(streamer)} has no methods put and end")
    run = _Run(model, inputs, keeps_cache=_of_caller(inputs.cache) or flags["return_dict_in_generate"])
    run.state.scores = [] if flags["output_scores"] else None
    run.state.logits = [] if flags["output_logits"] else None
    try:
        if streamer is not None:
            streamer.put(run.rows.host_ids)
        with closing(iter(run)) as reads:  # after an error of the streamer, too
            for read in reads:
                if streamer is not None:
                    streamer.put(torch.tensor(read.tokens, device="cpu"))
    finally:
        if streamer is not None:
            streamer.end()  # after an error too: another thread may be waiting for the end
    return run.output() if flags["return_dict_in_generate"] else run.state.sequences()


@takes(StreamInputs, GENERATE)
def stream(model: Any, inputs: StreamInputs) -> Iterator[Tensor]:
    """`generate` as an iterator: each step's new ids [B*n], `pad_token_id` for rows that have ended.

    Arguments are checked by this call; the model runs while the iterator is read, which may stop early.
    """
    run = _iterated(model, inputs)
    return (run.state.column(read.step) for read in run)


@takes(StreamInputs, GENERATE)
def stream_ids(model: Any, inputs: StreamInputs) -> Iterator[list[int]]:
    """`stream` with the ids on the host: on a GPU, reading a tensor waits for all that has been launched, the copies of the
    ids that generate() itself reads do not."""
    return (read.tokens for read in _iterated(model, inputs))


def _iterated(model: Any, inputs: StreamInputs) -> _Run:
    inputs = expand(inputs)
    return _Run(model, inputs, keeps_cache=_of_caller(inputs.cache), iterated=True)


def _of_caller(cache: Any) -> bool:
    """Whether the cache of a call is there after it: "static" is made for the call."""
    return cache is not None and not isinstance(cache, str)


def _output_flags(model: Any, inputs: GenerateInputs) -> dict[str, bool]:
    """return_dict_in_generate, output_scores and output_logits: the arguments, else those of the generation_config."""
    defaults, flags = settings_of(model, inputs.generation_config), {}
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        value = getattr(inputs, name)
        value = defaults.get(name) if value is None else value
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {short(value)}")
        flags[name] = bool(value)
    wanted = [name for name in ("output_scores", "output_logits") if getattr(inputs, name)]
    if wanted and not flags["return_dict_in_generate"]:
        raise ValueError(f"{wanted[0]}=True has an effect only with return_dict_in_generate=True: pass it too")
    return flags


class _Run:
    """One call of generate(): the prompt, the tokens so far, and which rows have ended.

    keeps_cache: the cache outlives the call. iterated: the caller may stop after any step.
    """

    def __init__(self, model: Any, inputs: StreamInputs, keeps_cache: bool, iterated: bool = False) -> None:
        self.model, self.visual_inputs = model, inputs.visual_inputs
        self.prepare = replaced_prepare(model)
        self.virtual = 0  # tokens that `prepare` put in front of each row
        self.device = torch.device(model.device)
        self.vocabulary = _vocabulary(model)
        ends = end_tokens(model, inputs.eos_token_id, inputs.generation_config)
        self._check_ends(inputs.eos_token_id, ends)
        pad = padding_token(model, inputs.pad_token_id, ends, inputs.generation_config)
        prompt = read_prompt(
            inputs.input_ids, inputs.attention_mask, vocabulary=self.vocabulary, device=self.device, pad_token_id=pad
        )
        width = prompt.ids.shape[1]
        self.settings: Settings = resolve(model, inputs, width, ends, pad)
        self.rows: Prompt = prompt.repeated(self.settings.n)  # row r*n + i continues prompt r
        rows = self.rows.ids.shape[0]
        self._check_pad(rows)
        self.stops = self._stop_strings(inputs.tokenizer, rows)
        self.state = DecodingState(self.settings, self.rows, self.vocabulary, self.device)
        self.cache, self.cached, self.copies = self._cache(inputs.cache, prompt, keeps_cache)
        check_cache(self.prepare, self.cached)
        self.prompt = prompt.repeated(self.settings.n // self.copies)  # the prefill's; its state is copied afterwards

        copy, behind = late_copy(self.device), self._behind(keeps_cache, iterated)
        self.reads = LateReads(copy or ImmediateCopy, behind if copy else 0)
        # A cache that outlives the call must not keep tokens after a row's end. Where the host reads late, the cache
        # itself leaves such rows alone, or a mask is there from the first step on. On a CPU a mask also saves work.
        unread = keeps_cache and self.reads.behind > 0 and bool(ends)
        self.freezes = unread and not getattr(self.cache, "record", 0)
        self.masks_always = unread and not self.freezes
        self.masks_ended = not self.freezes and (keeps_cache or copy is None)
        self.fed = 0  # new tokens of each row that the model has got
        self.ended: list[int | None] = [None] * rows  # the step whose token was a row's last, where it has been read
        self.captured: CapturedSteps | None = None  # set after the prefill
        self.keeps_cache = keeps_cache

    # ------------------------------------------------------------------------------------------------------- checks

    def _check_ends(self, argument: Any, ends: tuple[int, ...]) -> None:
        """ValueError for an end token of the call that no row can have. Those of a checkpoint may be outside."""
        outside = [token for token in ends if not 0 <= token < self.vocabulary]
        if argument is not None and outside:
            raise ValueError(
                f"eos_token_id {outside[0]} is outside the vocabulary 0..{self.vocabulary - 1}: no row can end with it; "
                "[] switches end tokens off"
            )

    def _check_pad(self, rows: int) -> None:
        if self.settings.pad_token_id is None and rows > 1 and self.settings.can_finish_early:
            raise ValueError("rows may end at different lengths and the checkpoint names no padding token: pass pad_token_id")

    def _stop_strings(self, tokenizer: Decoder | None, rows: int) -> StopStrings | None:
        if not self.settings.stop:
            return None
        if tokenizer is None:
            raise ValueError(f"stop={short(list(self.settings.stop))} is searched in decoded text: pass tokenizer= too")
        return StopStrings(self.settings.stop, tokenizer, rows)

    def _behind(self, keeps_cache: bool, iterated: bool) -> int:
        """How many steps the host may be behind: 0 where the caller's functions take part in each step, and where a cache that
        is kept must not hold tokens after one at which the host may end a row or the call."""
        if self.settings.logits_processor or self.settings.stopping_criteria:
            return 0
        return 0 if keeps_cache and (iterated or self.stops is not None) else BEHIND

    def _cache(self, cache: Any, prompt: Prompt, keeps_cache: bool) -> tuple[Any, tuple[int, ...], int]:
        """The cache to use, how many tokens of each of its rows it holds, and into how many rows each of them is copied
        after the prefill; ValueError if the rows cannot fit."""
        n, rows, new = self.settings.n, prompt.ids.shape[0], self.settings.max_new_tokens
        longest = max(prompt.lengths)
        cache = self.settings.cache if cache is None else cache
        if cache is None and n == 1 and not keeps_cache and self.settings.capture:
            cache = "static" if prefers_static(self.model, rows, longest, new) else None
        if isinstance(cache, str):
            if cache != "static":
                raise ValueError(f"cache={short(cache)}: pass 'static', or a cache made with model.new_cache(batch_size)")
            return self.model.new_cache(rows * n, max_length=longest + max(new - 1, 0)), (0,) * (rows * n), 1
        if cache is None:
            return (self.model.new_cache(rows) if new else None), (0,) * rows, n
        if not hasattr(cache, "lengths") or not hasattr(cache, "batch_size"):
            raise ValueError(f"cache is a {type(cache).__name__}: pass a cache made with model.new_cache(batch_size)")
        copies = n if cache.batch_size == rows else 1
        if cache.batch_size not in (rows, rows * n):
            more = f", or {rows * n} with n={n}" if n > 1 else ""
            raise ValueError(f"the cache is for {cache.batch_size} rows, the prompt has {rows}{more}")
        if copies > 1 and cache.max_length is not None:
            raise ValueError(f"n={n}: a cache of fixed length keeps its {rows} rows; make one with new_cache({rows * n}, ...)")
        cached = getattr(cache, "host_lengths", None)
        cached = tuple(int(length) for length in (cache.lengths.tolist() if cached is None else cached))
        rows_of_cache = prompt.repeated(n // copies)
        for row, (held, length) in enumerate(zip(cached, rows_of_cache.lengths, strict=True)):
            if held >= length:
                raise ValueError(
                    f"row {row}: the cache already holds {held} tokens and input_ids has {length}; input_ids is the "
                    "whole row, cached tokens included, and at least one token more"
                )
        if cache.max_length is not None and longest + max(new - 1, 0) > cache.max_length:  # the last token is not fed
            what = "is longer than" if longest > cache.max_length else f"and {new} new tokens (the last is not stored) exceed"
            raise ValueError(
                f"the prompt of {longest} tokens {what} the cache's max_length={cache.max_length}: "
                "make a longer one, or pass new_cache(batch_size) without max_length"
            )
        cache.check_prompt(rows_of_cache.host_ids, rows_of_cache.host_mask)  # ValueError where it holds another text
        return cache, cached, copies

    # --------------------------------------------------------------------------------------------------------- steps

    def __iter__(self) -> Generator[Read]:
        if not self.settings.max_new_tokens:
            return
        self.state.reserve()
        self.state.pick(self._prefill())
        if self.settings.max_new_tokens > 1 and self.prepare is None:
            self.captured = captured_steps(self.model, self.cache, self.settings.capture)
        try:
            if self.freezes and self.captured is None:
                self.cache.freeze(self.state.done)
            yield from self._steps(last=self.settings.max_new_tokens - 1)
        finally:
            if self.freezes or self.masks_always or (self.captured is not None and self.keeps_cache):
                self._settle()

    def _steps(self, last: int) -> Iterator[Read]:
        for step in range(last + 1):
            self.reads.put(step, self.state.report)
            for read in self.reads.take(everything=step == last):
                over = self._consume(read) or read.step == last
                if over:
                    self.state.cut(read.step + 1)
                yield read
                if over:
                    return
            self._step(replaced=self.state.reserve())

    def _step(self, replaced: bool) -> None:
        """One more token for each row. It reads nothing on the host and writes into the tensors of `state`, of which some may
        have been replaced since the step before."""
        state, steps = self.state, self.captured
        if steps is None:
            state.pick(self._feed())
            return
        logits = steps.feed(state.input[:, 0], state.done, frozen=self.settings.can_finish_early)
        self.fed += 1
        if state.capturable:
            steps.pick(state.pick, logits, replaced=replaced)
        else:
            state.pick(logits.clone())  # the caller may keep them, and the next step writes others in their place

    @torch.no_grad()
    def _prefill(self) -> Tensor:
        """Runs the tokens that the cache does not hold; returns the logits after each row's last token [B, vocabulary]."""
        tokens, lengths = self.prompt.tokens, self.prompt.lengths
        counts = [length - held for length, held in zip(lengths, self.cached, strict=True)]
        tokens = tokens[:, tokens.shape[1] - max(counts) :]
        mask = None
        if min(counts) != max(counts):
            # In CPU memory, where the model lays out the tokens; a `prepare` gets it on the model's device.
            new = _right(max(counts), torch.tensor(counts, device="cpu"))
            past = _right(self.cache.seen, torch.tensor(self.cached, device="cpu"))
            mask = torch.cat([past, new], 1).long()
            tokens = tokens.masked_fill(send(~new, self.device), 0)
            mask = mask if self.prepare is None else send(mask, self.device)
        logits = self._forward(tokens, mask, **self._visual_arguments())
        if self.copies > 1:
            rows = torch.arange(logits.shape[0], device="cpu").repeat_interleave(self.copies)
            self.cache.reorder(rows)
            logits = logits.index_select(0, rows.to(logits.device))
        return logits

    def _visual_arguments(self) -> dict[str, Any]:
        """The images and videos of the prefill: those whose tokens the cache does not hold."""
        if self.visual_inputs is None:
            return {}
        tokens, width = self.prompt.tokens, self.prompt.tokens.shape[1]
        rows = [row[width - length :] for row, length in zip(tokens, self.prompt.lengths, strict=True)]
        return self.model.visual_arguments(self.visual_inputs, rows, self.cached)

    @torch.no_grad()
    def _feed(self) -> Tensor:
        """Runs one token of each row. Rows that have ended are padding: their state in the cache stays as it is."""
        mask = None
        if self.masks_always or (self.masks_ended and any(end is not None for end in self.ended)):
            mask = torch.cat([self._past(), ~self.state.done[:, None]], 1).long()
        logits = self._forward(self.state.input, mask)
        self.fed += 1
        return logits

    def _forward(self, tokens: Tensor, mask: Tensor | None, **visual: Any) -> Tensor:
        # Router logits, where the configuration has them on, are for training and not needed here.
        arguments = {"logits_to_keep": 1, "output_router_logits": False, "input_ids": tokens, "attention_mask": mask, **visual}
        if self.prepare is None:
            logits = self.model(cache=self.cache, **arguments).logits
        else:
            first = self.cache.seen == 0
            logits = self.model(**prepared_arguments(self.prepare, arguments, self.cache, self.virtual, first)).logits
            if first:
                self.virtual = self.cache.seen - tokens.shape[1]
        return logits[:, -1].to(self.device)

    def _consume(self, read: Read) -> bool:
        """Reads a step's tokens and flags; True when every row has ended. What rows have got after their end is padding."""
        failed = [row for row, at in enumerate(read.failed) if at == read.step and self.ended[row] is None]
        if failed:
            raise ValueError(
                f"no token can be chosen for rows {short(failed)} (new token {read.step + 1}): the logits hold NaN, +inf, or "
                f"nothing but -inf{self._suspects()}"
            )
        for row, token in enumerate(read.tokens):
            if self.ended[row] is not None:
                read.tokens[row] = self.settings.pad_token_id or 0
            elif self.stops is not None and self.stops.put(row, token) and not read.done[row]:
                self.ended[row] = read.step
                self.state.end_row(row, read.step)
        self._note_ends(read)
        return all(end is not None for end in self.ended)

    def _note_ends(self, read: Read) -> None:
        for row, done in enumerate(read.done):
            if done and self.ended[row] is None:
                self.ended[row] = read.step

    def _settle(self) -> None:
        """After the last step or an error: the cache gets the lengths that it has without the tokens after a row's end."""
        for read in self.reads.take(everything=not all(end is not None for end in self.ended)):
            self._note_ends(read)
        fed = [self.fed if end is None else min(end, self.fed) for end in self.ended]
        lengths = [length + self.virtual + new for length, new in zip(self.rows.lengths, fed, strict=True)]
        self.cache.settle(lengths, self.cache.seen - self.fed + max(fed))

    def _suspects(self) -> str:
        """The parts of the call that may have made such logits, for a message."""
        s = self.settings
        names = ("repetition_penalty", "presence_penalty", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
        set_here = [f"{name}={short(getattr(s, name))}" for name in (*names, "min_new_tokens") if getattr(s, name)]
        if s.logits_processor:
            set_here.append("the logits_processor")
        return "; look at " + ", ".join([*set_here, "the model's weights"])

    # -------------------------------------------------------------------------------------------------------- helpers

    def output(self) -> GenerateOutput:
        """The results by name; scores and logits if they were kept."""
        state = self.state
        scores, logits = (None if values is None else tuple(values) for values in (state.scores, state.logits))
        return GenerateOutput(sequences=state.sequences(), scores=scores, logits=logits, past_key_values=self.cache)

    def _past(self) -> Tensor:
        """The mask [B, positions seen] of the tokens in the cache, without the virtual ones."""
        return _right(self.cache.seen - self.virtual, self.cache.lengths.to(self.device) - self.virtual)


def _right(width: int, lengths: Tensor) -> Tensor:
    """[B, width] bool, True in the last lengths[r] columns of row r."""
    return torch.arange(width, device=lengths.device) >= width - lengths[:, None]


def _vocabulary(model: Any) -> int:
    """The rows of the model's embedding, padding rows included."""
    return int(model.get_input_embeddings().weight.shape[0])
