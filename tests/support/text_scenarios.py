"""Calls of a text model whose synchronisations with a GPU tests/triton/test_synchronisations.py counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from unittest import mock

import torch

Scenario = Callable[[], Callable[[], object]]
ROWS, TOKENS = 2, 21


def text_config(**changes: Any) -> Any:
    """4 layers, 3 of them Gated DeltaNet, with the head widths of the published models."""
    from qwen35moe import Config

    small = dict(
        num_hidden_layers=4, hidden_size=64, vocab_size=97, num_attention_heads=4, num_key_value_heads=2,
        linear_num_key_heads=1, linear_num_value_heads=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    return Config.preset("35b-a3b").text_config.replace(**{**small, **changes})


@cache
def model(requires_grad: bool = False) -> Any:
    from qwen35moe import Qwen3_5MoeForCausalLM
    from tests.support.pretend_gpu import moved

    return moved(Qwen3_5MoeForCausalLM(text_config()).bfloat16(), requires_grad)


def gpu(x: Any) -> Any:
    """A tensor on the GPU."""
    from tests.support.pretend_gpu import OnGpu

    return OnGpu(x if isinstance(x, torch.Tensor) else torch.tensor(x))


def ids(rows: int = ROWS, tokens: int = TOKENS) -> Any:
    return gpu(torch.randint(0, 97, (rows, tokens)))


def mask(side: str, past: int = 0) -> torch.Tensor:
    """[ROWS, past + TOKENS] on the host, the last row with 5 columns of padding in the new tokens."""
    out = torch.ones(ROWS, past + TOKENS, dtype=torch.int64)
    if side == "left":
        out[-1, past : past + 5] = 0
    elif side == "right":
        out[-1, -5:] = 0
    return out


def call(**arguments: Any) -> Callable[[], object]:
    """A forward without gradient."""
    rows, tokens = arguments.pop("rows", ROWS), arguments.pop("tokens", TOKENS)
    if "inputs_embeds" not in arguments:
        arguments["input_ids"] = ids(rows, tokens)
    return torch.no_grad()(lambda: model()(**arguments))


def cached(side: str | None = None, max_length: int | None = None, record: int = 0, rows: int = ROWS) -> Any:
    """A cache that holds a prompt, with padding on one side."""
    cache = model().new_cache(rows, max_length=max_length, record=record)
    padding = {} if side is None else {"attention_mask": gpu(mask(side))}
    call(cache=cache, rows=rows, **padding)()
    return cache


def decode(
    side: str | None = None, max_length: int | None = None, ended: bool = False, masked: bool = False, **more: Any
) -> Any:
    """A step of one token, behind a first one."""
    cache = cached(side, max_length, **more)
    columns = mask(side or "none")
    for _ in range(2):
        columns = torch.cat([columns, torch.ones(ROWS, 1, dtype=torch.int64)], 1)
        if ended:
            columns[0, -1] = 0
        padding = {"attention_mask": gpu(columns)} if masked else {}
        step = call(cache=cache, tokens=1, **padding)
        if columns.shape[1] == TOKENS + 1:
            step()
    return step


def second_turn(side: str, first: str | None = None, on_gpu: bool = True, max_length: int | None = None) -> Any:
    """Several tokens at once behind a prompt."""
    cache = cached(first, max_length)
    past = mask(first or "none")
    columns = torch.cat([past, mask(side)], 1)
    return call(cache=cache, attention_mask=gpu(columns) if on_gpu else columns)


BOUNDS = [0, 8, 9, TOKENS]
RESTARTS = torch.cat([torch.arange(b - a) for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)])[None]


def three_axes(tokens: int = TOKENS) -> torch.Tensor:
    return torch.arange(tokens).expand(3, ROWS, tokens).contiguous()


def training(**arguments: Any) -> Callable[[], object]:
    """A forward with labels, on the autograd graph."""
    rows = arguments.pop("rows", ROWS)
    tokens = ids(rows)
    return lambda: model(True)(tokens, labels=arguments.pop("labels", tokens), **arguments).loss


def rollback(count: Any, side: str | None = None, max_length: int | None = None) -> Callable[[], object]:
    cache = cached(side, max_length, record=6)
    return torch.no_grad()(lambda: cache.rollback(count() if callable(count) else count))


def reorder(rows: Any, **more: Any) -> Callable[[], object]:
    cache = cached(**more)
    return torch.no_grad()(lambda: cache.reorder(rows() if callable(rows) else rows))


def restore(**more: Any) -> Callable[[], object]:
    cache = cached(**more)
    snapshot = cache.snapshot()
    call(cache=cache, tokens=1)()
    return torch.no_grad()(lambda: cache.restore(snapshot))


def recorded_steps() -> Callable[[], object]:
    """So many steps that the log of the recorded tokens is shortened."""
    from qwen35moe.cache import rollback

    cache = cached("left", record=2)

    def steps() -> None:
        with mock.patch.object(rollback, "_SLACK", 1):
            for _ in range(3):
                call(cache=cache, tokens=1)()

    return steps


def draft_and_rollback() -> Callable[[], object]:
    """A step of speculative decoding: rows keep different numbers of drafted tokens."""
    cache = cached(record=6)

    def step() -> None:
        for kept in ([3, 1], [0, 2]):
            call(cache=cache, tokens=4)()
            cache.rollback(gpu(kept))

    return torch.no_grad()(step)


def embeds() -> Any:
    return gpu(torch.randn(ROWS, TOKENS, 64, dtype=torch.bfloat16))


def base() -> Callable[[], object]:
    tokens = ids()
    return torch.no_grad()(lambda: model().model(tokens, output_hidden_states=True))


def one_layer() -> Callable[[], object]:
    from qwen35moe import Qwen3_5MoeForCausalLM
    from tests.support.pretend_gpu import moved

    one = moved(Qwen3_5MoeForCausalLM(text_config(num_hidden_layers=1, layer_types=["full_attention"])).bfloat16())
    tokens = ids()
    return torch.no_grad()(lambda: one(tokens))


def sdpa(prepared: Callable[[], object]) -> Callable[[], object]:
    """The call with torch's attention, whatever "auto" takes."""
    from qwen35moe import backends

    def run() -> None:
        with backends.use(attention="torch"):
            prepared()

    return run


def replayed(on_gpu: bool = True) -> Callable[[], object]:
    """A forward whose routers choose what those of another have chosen."""
    indices = torch.randint(0, 3, (ROWS, TOKENS, 4, 1)) + torch.tensor([0, 3])  # two experts that differ
    return call(routing=gpu(indices) if on_gpu else indices)


SCENARIOS: dict[str, Scenario] = {
    "prefill": lambda: call(),
    "prefill with cache": lambda: call(cache=model().new_cache(ROWS)),
    "decode": decode, "decode, static": lambda: decode(max_length=40),
    "decode, ones": lambda: decode(masked=True), "decode, ones, static": lambda: decode(masked=True, max_length=40),
    "decode, left": lambda: decode("left", masked=True), "decode, right": lambda: decode("right", masked=True),
    "decode, left, static": lambda: decode("left", 40, masked=True),
    "decode, left, no mask": lambda: decode("left"), "decode, left, static, no mask": lambda: decode("left", 40),
    "decode, ended": lambda: decode(ended=True, masked=True),
    "decode, ended, static": lambda: decode("left", 40, ended=True, masked=True),
    "decode, SDPA": lambda: sdpa(decode()), "decode, left, SDPA": lambda: sdpa(decode("left", masked=True)),
    "decode, ended, SDPA": lambda: sdpa(decode("left", 40, ended=True, masked=True)),
    "decode, record": lambda: decode(record=6), "decode, record, ended": lambda: decode(record=6, ended=True, masked=True),
    "decode, record, several": recorded_steps,
    "decode, positions": lambda: call(
        cache=cached(), tokens=1, position_ids=gpu(three_axes(1) + TOKENS), cache_position=gpu([TOKENS])
    ),
    "mask of ones": lambda: call(attention_mask=gpu(mask("none"))),
    "mask of ones on the host": lambda: call(attention_mask=mask("none")),
    "mask left": lambda: call(attention_mask=gpu(mask("left"))),
    "mask left on the host": lambda: call(attention_mask=mask("left")),
    "mask right": lambda: call(attention_mask=gpu(mask("right"))),
    "mask left with cache": lambda: call(attention_mask=gpu(mask("left")), cache=model().new_cache(ROWS)),
    "mask left with static cache": lambda: call(
        attention_mask=gpu(mask("left")), cache=model().new_cache(ROWS, max_length=40)
    ),
    "mask left on the host with static cache": lambda: call(
        attention_mask=mask("left"), cache=model().new_cache(ROWS, max_length=40)
    ),
    "second turn": lambda: call(cache=cached()), "second turn, static": lambda: call(cache=cached(max_length=64)),
    "second turn, ones": lambda: second_turn("none"), "second turn, left": lambda: second_turn("left", "left"),
    "second turn, right": lambda: second_turn("right"),
    "second turn, right, static": lambda: second_turn("right", "left", max_length=60),
    "second turn, on the host": lambda: second_turn("right", "left", on_gpu=False),
    "positions": lambda: call(position_ids=gpu(torch.arange(TOKENS).expand(ROWS, -1).contiguous())),
    "three axes": lambda: call(position_ids=gpu(three_axes())),
    "three axes on the host": lambda: call(position_ids=three_axes()),
    "packed": lambda: call(rows=1, cu_seqlens=gpu(BOUNDS)),
    "packed on the host": lambda: call(rows=1, cu_seqlens=torch.tensor(BOUNDS)),
    "packed by positions": lambda: call(rows=1, position_ids=gpu(RESTARTS)),
    "packed by positions on the host": lambda: call(rows=1, position_ids=RESTARTS),
    "packed by a mask": lambda: call(attention_mask=gpu(mask("right") + (torch.arange(TOKENS) > 6) * mask("right"))),
    "packed with cache": lambda: call(rows=1, cu_seqlens=gpu(BOUNDS), cache=model().new_cache(3)),
    "packed with cache on the host": lambda: call(rows=1, cu_seqlens=torch.tensor(BOUNDS), cache=model().new_cache(3)),
    "base model": base, "one layer": one_layer, "embeddings": lambda: call(inputs_embeds=embeds()),
    "logits_to_keep": lambda: call(logits_to_keep=1), "routing": lambda: call(output_routing=True, output_router_logits=True),
    "replayed routing": replayed, "replayed routing on the host": lambda: replayed(on_gpu=False),
    "attentions": lambda: call(output_attentions=True, attention_mask=mask("left")),
    "training": training, "training, loss alone": lambda: training(output_logits=False),
    "training, packed": lambda: training(rows=1, cu_seqlens=gpu(BOUNDS), output_logits=False),
    "training, packed on the host": lambda: training(rows=1, cu_seqlens=torch.tensor(BOUNDS)),
    "training, padded": lambda: training(attention_mask=mask("right"), output_router_logits=True),
    "training, all on the host": lambda: training(
        rows=1, cu_seqlens=torch.tensor(BOUNDS), labels=torch.zeros(1, TOKENS, dtype=torch.int64)
    ),
    "rollback": lambda: rollback(2), "rollback, static": lambda: rollback(2, max_length=40),
    "rollback, ragged": lambda: rollback(2, "left"), "rollback, rows": lambda: rollback([2, 1]),
    "rollback, rows on the GPU": lambda: rollback(lambda: gpu([2, 1])), "draft and rollback": draft_and_rollback,
    "reorder": lambda: reorder([1, 0]), "reorder, on the GPU": lambda: reorder(lambda: gpu([1, 1])),
    "reorder, ragged": lambda: reorder([1, 0], side="left"), "reorder, static": lambda: reorder([1, 0], max_length=40),
    "restore": restore, "restore, static": lambda: restore(max_length=40), "restore, ragged": lambda: restore(side="left"),
    "snapshot": lambda: cached().snapshot, "clone": lambda: cached().clone,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- values, not costs

PLAIN = dict(
    attention="torch", experts="loop", gated_delta_rule="recurrent", short_convolution="torch", rms_norm="torch",
    gated_rms_norm="torch", rotary="torch", router="torch", linear="torch",
)  # fmt: skip


@cache
def double(on_gpu: bool) -> Any:
    """The same float64 model on the CPU or the GPU."""
    from qwen35moe import Qwen3_5MoeForCausalLM
    from tests.support.pretend_gpu import moved

    torch.manual_seed(1)
    out = Qwen3_5MoeForCausalLM(text_config()).double().requires_grad_(False)
    return moved(out) if on_gpu else out


def conversation(model: Any, to: Callable[[torch.Tensor], torch.Tensor], max_length: int | None, record: int) -> list[Any]:
    """The logits of a padded prompt, steps in which rows end, a padded second turn, rollbacks, a reordering and a restored
    snapshot, with masks that `to` puts on a device."""
    cache = model.new_cache(ROWS, max_length=max_length, record=record)
    columns, out = mask("left"), []

    def feed(new: torch.Tensor, seed: int) -> None:
        nonlocal columns
        columns = torch.cat([columns, new], 1)
        tokens = torch.randint(0, 97, new.shape, generator=torch.Generator().manual_seed(seed))
        out.append(model(to(tokens), attention_mask=to(columns), cache=cache).logits)

    tokens = torch.randint(0, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    out.append(model(to(tokens), attention_mask=to(columns), cache=cache).logits)
    feed(torch.tensor([[1], [1]]), 1)
    snapshot = cache.snapshot()
    feed(torch.tensor([[0], [1]]), 2)  # the first row has ended
    feed(torch.tensor([[0], [1]]), 3)
    cache.restore(snapshot)
    columns = columns[:, : TOKENS + 1]
    feed(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]), 4)
    feed(torch.tensor([[1], [0]]), 5)
    if record:
        cache.rollback(to(torch.tensor([2, 1])))
        columns = (torch.arange(cache.seen) < torch.tensor([[24], [19]])).long()  # as many tokens as the rows hold
        feed(torch.ones(ROWS, 3, dtype=torch.int64), 6)
        cache.rollback(2)
        columns = columns[:, :-2]
    cache.reorder([1, 0])
    columns = columns[[1, 0]]
    feed(torch.ones(ROWS, 1, dtype=torch.int64), 7)
    return [*out, cache.lengths, *(x for view in cache for x in view.state.tensors()[:2])]


def same_values(program: Callable[..., list[Any]], **options: Any) -> Callable[[], float]:
    """The largest difference of a program's results between the GPU and the CPU, relative to the largest value."""
    from qwen35moe import backends
    from qwen35moe.ops import delta_net_step
    from tests.support.pretend_gpu import values

    def difference() -> float:
        definition = delta_net_step.definition
        fused = wraps(definition)(lambda *args, **kwargs: definition(*args, **kwargs))
        backends.register("delta_net_step", "fused", fused, before="triton")
        try:
            with torch.no_grad(), backends.use(**PLAIN, delta_net_step="fused"):
                ours, theirs = program(double(True), gpu, **options), program(double(False), lambda x: x, **options)
        finally:
            backends.unregister("delta_net_step", "fused")
        pairs = [(values(a).double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
        return max(float((a[:, : b.shape[1]] if a.dim() == 4 else a).sub(b).abs().max() / b.abs().max()) for a, b in pairs)

    return difference


VALUES: dict[str, Scenario] = {
    "conversation": lambda: same_values(conversation, max_length=None, record=0),
    "conversation, static": lambda: same_values(conversation, max_length=40, record=0),
    "conversation, recorded": lambda: same_values(conversation, max_length=None, record=8),
}  # fmt: skip
# Wrong values in a step, which the device asserts, and elsewhere, where the host has them: (scenario, message).
ONES = torch.ones(ROWS, TOKENS + 1, dtype=torch.int64)
WRONG: dict[str, tuple[Scenario, str]] = {
    "mask of fewer tokens": (
        lambda: call(cache=cached("left"), tokens=1, attention_mask=gpu(ONES)),
        "RuntimeError: attention_mask does not hold as many",
    ),
    "mask of twos": (
        lambda: call(cache=cached(), tokens=1, attention_mask=gpu(2 * ONES)), "RuntimeError: attention_mask holds ones"
    ),
    "cache_position": (
        lambda: call(cache=cached(), tokens=1, cache_position=gpu([3])), "RuntimeError: cache_position does not continue"
    ),
    "positions that start again": (
        lambda: call(cache=cached(), tokens=1, position_ids=gpu([[0], [0]])), "RuntimeError: position_ids start again"
    ),
    "rollback too far": (lambda: rollback(lambda: gpu([2, 23])), "RuntimeError: rollback: more tokens than"),
    "rollback of a number too far": (
        lambda: rollback(23), "ValueError: cannot roll back [23, 23] tokens: the rows hold [21, 21]"
    ),
    "rows beyond the last": (lambda: reorder(lambda: gpu([0, 2])), "RuntimeError: rows are not 0 ... 1"),
    "prefill mask": (
        lambda: call(attention_mask=gpu(mask("left") - 1)), "ValueError: attention_mask holds -1"
    ),
    "a full cache": (
        lambda: call(cache=cached("left", TOKENS), tokens=1), "ValueError: the longest row would hold 22 tokens"
    ),
    "a full cache after a mask": (
        lambda: decode("left", TOKENS + 1, masked=True), "ValueError: the longest row would hold 23 tokens"
    ),
}  # fmt: skip
SCENARIOS |= VALUES | {f"wrong: {name}": scenario for name, (scenario, _) in WRONG.items()}
