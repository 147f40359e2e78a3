"""generation/captured.py and capturable.py: captured decode steps, with a stand-in for CUDA graphs that runs on a CPU."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, taps
from qwen35moe.cache import static
from qwen35moe.generation import capturable, captured
from qwen35moe.generation.captured import CapturedSteps, reason
from tests.cache.common import CASE, tokens
from tests.support import peer
from tests.support.recorded import GraphCapture, Recording


@pytest.fixture(scope="module")
def shared() -> Any:
    model = peer.ours(CASE).eval()
    peer.draw(model, 0)
    return model


@pytest.fixture
def model(shared: Any) -> Any:
    return copy.deepcopy(shared)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> GraphCapture:
    """CPUs capture too, with buckets of 12, 24, ... positions."""
    capture = GraphCapture()
    monkeypatch.setattr(capturable, "CAPTURES", {"cpu"})
    monkeypatch.setattr(captured, "capture_of", lambda device: capture)
    monkeypatch.setattr(static, "SMALLEST", 12)
    return capture


def greedy(steps: Callable[[Tensor, Tensor], Tensor], logits: Tensor, count: int) -> list[list[int]]:
    """The most likely tokens; row 0 takes the first three of them."""
    out, done = [], torch.zeros(logits.shape[0], dtype=torch.bool)
    for step in range(count):
        token = logits.argmax(-1)
        out.append(token.masked_fill(done, 0).tolist())
        done[0] = step >= 3
        logits = steps(token, done)
    return out


@torch.no_grad()
def run(model: Any, cache: Any, count: int) -> list[list[int]]:
    """Tokens by captured steps, after a prefill of 7."""
    logits = model(tokens(2, 7), cache=cache).logits[:, -1]
    steps = CapturedSteps(model, cache)
    out = greedy(steps.feed, logits, count)
    steps.step.settle()
    return out


@torch.no_grad()
def ordinary(model: Any, count: int) -> list[list[int]]:
    cache = model.new_cache(2)
    logits = model(tokens(2, 7), cache=cache).logits[:, -1]

    def step(token: Tensor, done: Tensor) -> Tensor:
        past = torch.arange(cache.seen) >= cache.seen - cache.lengths[:, None]
        mask = torch.cat([past, ~done[:, None]], 1).long()
        return model(token.masked_fill(done, 0)[:, None], attention_mask=mask, cache=cache).logits[:, -1]

    return greedy(step, logits, count)


def test_replays_give_the_tokens_of_the_ordinary_steps(model: Any, capture: GraphCapture) -> None:
    cache = model.new_cache(2, 30)
    assert run(model, cache, 18) == ordinary(model, 18)
    # Buckets 12, 24 and 30: 5, 12 and 1 steps; the first of each warms up, the second is captured and then replayed.
    assert (capture.warmed, capture.captures, capture.replays) == (3, 2, 15)
    assert cache.lengths.tolist() == [7 + 3, 7 + 18] and cache.seen == cache._longest == 25


def test_the_stand_in_finds_numbers_of_the_host_and_reads() -> None:
    """Otherwise the test above would pass whatever a step depends on."""
    total, numbers = torch.zeros(2), [1.0]

    def step() -> None:
        numbers.append(numbers[-1] + 1)
        total.add_(torch.ones(2).mul_(numbers[-1])).view(1, 2)[:, :1].mul_(2)

    replay = GraphCapture().capture(step)
    assert total.tolist() == [0, 0], "capturing computes nothing"
    for expected in ([4, 2], [12, 4]):  # a number that changes is that of the capture, as in a CUDA graph
        replay()
        assert total.tolist() == expected
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        GraphCapture().capture(lambda: print(torch.ones(2).sum().item()))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        GraphCapture().capture(lambda: total[total > 1].sum())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(0))),
    "number": lambda model: setattr(model.model.layers[1].self_attn, "scale", 40.0),
    "backends of the process": lambda model: backends.use(attention="eager"),
    "backends of the model": lambda model: model.use_backends(attention="eager"),
    "method": lambda model: setattr(
        model.model.layers[0].linear_attn, "gates", lambda a, b: (-a.abs().float(), b.sigmoid().float())
    ),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16).__enter__(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_makes_new_captures(model: Any, capture: GraphCapture, change: str) -> None:
    cache = model.new_cache(2, 30)
    before = cache.snapshot()
    first = run(model, cache, 5)
    cache.restore(before)
    warmed = capture.warmed
    assert run(model, cache, 5) == first and capture.warmed == warmed, "nothing has changed: the captures are kept"
    cache.restore(before)
    undo: Any = CHANGES[change](model)
    try:
        if change == "autocast":
            run(model, cache, 5)
        else:
            assert run(model, cache, 5) == ordinary(model, 5)
        assert capture.warmed == 2 * warmed
    finally:
        if undo is not None:
            undo.__exit__(None, None, None)


def test_weights_that_are_written_in_place_need_no_new_capture(model: Any, capture: GraphCapture) -> None:
    cache = model.new_cache(2, 30)
    before, first = cache.snapshot(), run(model, cache, 5)
    cache.restore(before)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert run(model, cache, 5) == ordinary(model, 5) != first
    assert capture.warmed == 1


def test_an_operation_on_the_cache_between_two_steps(model: Any, capture: GraphCapture) -> None:
    """A clone of the cache is written into its place: other memory, of which the captures read nothing."""
    caches = model.new_cache(2, 30), model.new_cache(2, 30)
    with torch.no_grad():
        logits = [model(tokens(2, 7), cache=cache).logits[:, -1] for cache in caches]
        steps, done = CapturedSteps(model, caches[0]), torch.zeros(2, dtype=torch.bool)
        for t in range(7):
            token = CASE.ids(2, 1, salt=t)[:, 0]
            logits = [steps.feed(token, done), model(token[:, None], cache=caches[1]).logits[:, -1]]
            assert peer.relative_error(*logits) <= 1e-5
            if t == 3:
                other = caches[0].clone()
                for index, layer in enumerate(other._layers):
                    caches[0].replace_state(index, layer)
                caches[0]._lengths = other._lengths


def test_captures_are_released_with_their_cache(model: Any, capture: GraphCapture) -> None:
    cache = model.new_cache(2, 30)
    run(model, cache, 3)
    kept = captured._kept[cache]
    memory, alive = weakref.ref(kept.memory.token), weakref.ref(cache)
    del kept, cache
    gc.collect()
    assert alive() is None and memory() is None


REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda model: model.model.norm.register_forward_hook(lambda *_: None), "model.norm has forward hooks"),
    "global hook": (
        lambda model: torch.nn.modules.module.register_module_forward_hook(lambda *_: None), "forward hooks of all modules"
    ),
    "tap": (lambda model: taps.patch(model, {"layers.0.output": abs}).__enter__(), "taps are active"),
    "ran": (lambda model: backends.ran().__enter__(), "backends.ran() records the calls"),
    "compiled": (lambda model: setattr(model.lm_head, "_compiled_call_impl", abs), "has a forward of its own or is compiled"),
    "foreign": (lambda model: setattr(model, "lm_head", _Head(3, 5)), "lm_head is a _Head, which is not one of this"),
    "forward": (lambda model: setattr(model.model.norm, "forward", abs), "model.norm has a forward of its own"),
    "weight": (
        lambda model: setattr(model.model.norm, "weight", _Weight(torch.ones(3))), "model.norm.weight is a _Weight"
    ),
    "device": (lambda model: model.model.norm.to("meta"), "model.norm.weight is on meta, the model on cpu"),
    "parametrized": (
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.lm_head), "lm_head is a ParametrizedLinear"
    ),
    "prepare": (lambda model: setattr(model, "prepare_inputs_for_generation", lambda ids, **_: {}), "was replaced"),
    "mode": (lambda model: Recording().__enter__(), "a TorchDispatchMode"),
}  # fmt: skip


class _Head(torch.nn.Linear):
    pass


class _Weight(torch.nn.Parameter):
    pass


@pytest.mark.filterwarnings("ignore:no forward has reached")  # of the tap
@pytest.mark.parametrize("case", REASONS)
def test_a_reason_is_stated(model: Any, capture: GraphCapture, case: str) -> None:
    prepare, message = REASONS[case]
    assert reason(model, model.new_cache(2, 9)) is None
    undo = prepare(model)
    try:
        assert message in (reason(model) or "")
    finally:
        if hasattr(undo, "remove"):
            undo.remove()
        elif hasattr(undo, "__exit__"):
            undo.__exit__(None, None, None)
    assert (reason(model) is None) == (case in ("hook", "global hook", "tap", "ran", "mode")), "undone"


def test_reasons_of_device_cache_and_implementations(
    model: Any, capture: GraphCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason(model, model.new_cache(2)) == (
        "the cache grows: make one with new_cache(batch_size, max_length=...), or pass cache='static'"
    )
    assert reason(model, model.new_cache(2, 9, record=4)) == "the cache records tokens for a rollback (record=4)"
    backends.register("rms_norm", "mine", lambda x, weight, eps, **_: x, before="torch")
    try:
        assert reason(model) == "rms_norm may run an implementation that was registered by others"
    finally:
        backends.unregister("rms_norm", "mine")
    monkeypatch.setattr(capturable, "CAPTURES", {"cuda"})
    assert reason(model) == "the model is on cpu: CUDA graphs are for GPUs"


def test_a_step_that_cannot_be_captured_runs_from_python_with_a_warning(
    model: Any, capture: GraphCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that reads a value on the host: the capture ends, and nothing it has done is left."""
    norm = type(model.model.norm).forward

    def reads(self: Any, x: Tensor) -> Tensor:
        return norm(self, x) * (float(x.sum()) * 0 + 1)

    monkeypatch.setattr(type(model.model.norm), "forward", reads)
    with caplog.at_level(logging.WARNING, "qwen35moe.generation"):
        assert run(model, model.new_cache(2, 30), 4) == ordinary(model, 4)
    assert [r for r in caplog.messages if "could not be captured as a CUDA graph and runs from Python" in r]
    assert capture.captures == capture.replays == 0


# ------------------------------------------------------------------------------------------------------------- generate

PROMPTS = [[5, 9, 2, 7, 1], [3, 8], [4, 4, 6]]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties and masks": {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "suppress_tokens": [7], "bad_words_ids": [[3, 4], [9]],
        "min_new_tokens": 4, "begin_suppress_tokens": [2],
    },
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "callback": {"logits_processor": [lambda ids, scores: scores.roll(1, -1) if ids.shape[1] % 2 else scores]},
}  # fmt: skip


def ends_of(model: Any, **settings: Any) -> list[int]:
    """End tokens at which the rows end after different numbers of tokens."""
    settings = {name: value for name, value in settings.items() if "return" not in name and "output" not in name}
    out = model.generate(PROMPTS, max_new_tokens=16, eos_token_id=[], pad_token_id=0, capture=False, **settings)[:, 5:]
    return [int(out[0, 12]), int(out[1, 5])]


@pytest.mark.parametrize("case", SETTINGS)
def test_generate_gives_the_same_tokens(model: Any, capture: GraphCapture, case: str) -> None:
    """Rows of different lengths that end at different steps, over the buckets 12 and 20."""
    settings = SETTINGS[case]
    options = {"max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": ends_of(model, **settings), **settings}
    if settings.get("do_sample"):  # `shortlist` of a CPU reads a number
        options.pop("top_k")
    expected = model.generate(PROMPTS, capture=False, **options)
    assert capture.warmed == 0
    cache = model.new_cache(3, 20)
    actual = model.generate(PROMPTS, cache=cache, **options)
    if case == "scores":
        for one, other in zip(actual.scores, expected.scores, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        actual, expected = actual.sequences, expected.sequences
    assert torch.equal(actual, expected)
    steps = actual.shape[1] - 5 - 1  # the last token is not fed
    pick = case in ("greedy", "sampled", "penalties and masks")
    buckets = 1 + (steps > 7)  # 12 positions hold the longest prompt and 7 tokens
    assert capture.warmed == buckets + pick
    assert capture.replays == steps - buckets + pick * (steps - 1)
    lengths = [row.index(0, 5) if 0 in row[5:] else len(row) for row in actual.tolist()]
    held = [length - 1 - (5 - len(prompt)) for length, prompt in zip(lengths, PROMPTS, strict=True)]
    assert cache.lengths.tolist() == held and cache.host_lengths == tuple(held)
    assert cache.seen == actual.shape[1] - 1


def test_generate_makes_a_static_cache_where_it_pays(
    model: Any, capture: GraphCapture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = 10**9
    monkeypatch.setattr(captured, "memory_of", lambda device: memory)
    options = {"max_new_tokens": 9, "eos_token_id": [], "pad_token_id": 0}
    expected = model.generate(PROMPTS, capture=False, **options)
    assert capture.warmed == 0
    assert torch.equal(model.generate(PROMPTS, **options), expected) and capture.warmed == 3
    assert torch.equal(torch.stack(list(model.stream(PROMPTS, **options)), 1), expected[:, 5:]) and capture.warmed == 6
    model.generate(PROMPTS, **options | {"max_new_tokens": 4})  # too few
    model.generate(PROMPTS, disable_compile=True, **options)
    model.generate(PROMPTS, **options, do_sample=True, n=2)  # the prompt is computed once, then its rows are repeated
    assert model.generate(PROMPTS, **options, return_dict_in_generate=True).cache.max_length is None  # it is to go on
    assert capture.warmed == 6
    memory = 10
    assert torch.equal(model.generate(PROMPTS, **options), expected) and capture.warmed == 6


def test_a_conversation_goes_on_with_its_captures(model: Any, capture: GraphCapture) -> None:
    cache, ids = model.new_cache(1, 40), torch.tensor([PROMPTS[0]])
    for turn in range(3):
        actual = model.generate(ids, max_new_tokens=4, cache=cache, eos_token_id=[])
        assert torch.equal(actual, model.generate(ids, max_new_tokens=4, eos_token_id=[], capture=False))
        ids = torch.cat([actual, torch.tensor([[7 + turn, 3]])], 1)
    # Of the model the first step in each of two buckets, of the choice the first one in each call.
    assert capture.warmed == 2 + 3 and cache.lengths.tolist() == [20]


def test_the_rows_of_a_kept_cache_that_ended_are_as_without_capture(model: Any, capture: GraphCapture) -> None:
    """A second call continues rows of which one had ended early, and a stop string ends another."""
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": ends_of(model)[1:]}
    caches = model.new_cache(3, 40), model.new_cache(3, 40)
    texts = PROMPTS
    for _ in range(2):
        one = model.generate(texts, cache=caches[0], **options)
        other = model.generate(texts, cache=caches[1], capture=False, **options)
        assert torch.equal(one, other)
        assert torch.equal(caches[0].lengths, caches[1].lengths) and caches[0].seen == caches[1].seen
        width = one.shape[1]
        pads = [max(map(len, texts)) - len(text) for text in texts]
        texts = [
            [*row[pad : pad + int(length)], 11, 12]
            for row, pad, length in zip(one.tolist(), pads, caches[0].lengths, strict=True)
        ]
        assert width


def test_a_tap_that_begins_between_two_steps_sees_the_later_ones(model: Any, capture: GraphCapture) -> None:
    expected = model.generate(PROMPTS, max_new_tokens=9, eos_token_id=[], pad_token_id=0, capture=False)[:, 5:]
    steps = model.stream(PROMPTS, max_new_tokens=9, eos_token_id=[], pad_token_id=0, cache=model.new_cache(3, 20))
    out = [next(steps) for _ in range(5)]
    replays = capture.replays
    with taps.record(model, "layers.0.output") as values:
        out += [next(steps), next(steps)]
    assert [value.shape[:2] for value in values["layers.0.output"]] == [(3, 1)] * 2
    assert capture.replays == replays + 2, "the choice of the tokens is still replayed"
    assert torch.equal(torch.stack([*out, *steps], 1), expected)


def test_a_capture_that_fails_counts_no_step_twice(model: Any, capture: GraphCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token is banned at the first three steps, of which the second is captured in vain."""
    end = int(model.generate(PROMPTS[:1], max_new_tokens=3, capture=False)[0, 7])

    def fails(function: Callable[[], None]) -> Callable[[], None]:
        with Recording() as operations:
            function()
        operations.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(capture, "capture", fails)
    options = {"max_new_tokens": 6, "min_new_tokens": 3, "eos_token_id": [end], "pad_token_id": 0}
    actual = model.generate(PROMPTS[:1], cache=model.new_cache(1, 20), **options)
    assert end not in actual[0, 5:8].tolist()
