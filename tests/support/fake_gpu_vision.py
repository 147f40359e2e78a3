"""Calls of a multimodal model whose synchronisations with a GPU tests/triton/test_fake_gpu_vision.py counts, for the harness
`pretend_gpu`: small sizes, and the heads of the published tower (72 wide)."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.varlen

Scenario = Callable[[], Callable[[], object]]
IMAGE, VIDEO = 95, 96
VISION = dict(depth=3, hidden_size=144, num_heads=2, intermediate_size=40, out_hidden_size=64, num_position_embeddings=25)
SMALL = ("image", (1, 4, 6)), ("image", (1, 2, 8))


def config() -> Any:
    from qwen35moe import Config
    from tests.support.text_scenarios import text_config

    whole = Config.preset("35b-a3b")
    assert whole.vision_config is not None
    torch.nn.attention.varlen.varlen_attn = varlen_attn  # in this process alone
    return whole.replace(
        text_config=text_config(), vision_config=whole.vision_config.replace(**VISION), image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=93, vision_end_token_id=94,
    )  # fmt: skip


@cache
def model(requires_grad: bool = False) -> Any:
    from qwen35moe import Qwen3_5MoeForConditionalGeneration
    from tests.support.pretend_gpu import moved

    return moved(Qwen3_5MoeForConditionalGeneration(config()).bfloat16(), requires_grad)


def gpu(x: Any) -> Any:
    from tests.support.pretend_gpu import OnGpu

    return OnGpu(x if isinstance(x, torch.Tensor) else torch.tensor(x))


def inputs(*rows: tuple[Any, ...], side: str | None = None, grids: str = "cpu") -> dict[str, Any]:
    """A processor's output, moved to the GPU as BatchFeature.to("cuda") moves it; grids: "cpu", "gpu" or "triples".

    A row: numbers of text tokens, ("image", grid) and ("video", grid)."""
    sizes: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    ids = []
    for row in rows:
        tokens: list[int] = []
        for item in row:
            if isinstance(item, int):
                tokens += range(1, item + 1)
                continue
            kind, (t, h, w) = item
            sizes[kind].append((t, h, w))
            for _ in range(t):
                tokens += [3, *[IMAGE if kind == "image" else VIDEO] * (h * w // 4), 4]
        ids.append(torch.tensor(tokens))
    longest = max(map(len, ids))
    pads = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in ids]
    result = {"input_ids": gpu(torch.stack([torch.nn.functional.pad(row, pad) for row, pad in zip(ids, pads, strict=True)]))}
    if side is not None:
        ones = [torch.nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(ids, pads, strict=True)]
        result["attention_mask"] = gpu(torch.stack(ones))
    for kind, pixels, name in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        if sizes[kind]:
            count = sum(t * h * w for t, h, w in sizes[kind])
            values: Any = {"triples": sizes[kind], "cpu": torch.tensor(sizes[kind])}
            result[pixels] = gpu(torch.randn(count, 3 * 2 * 16 * 16))
            result[name] = values[grids] if grids in values else gpu(values["cpu"])
    return result


def call(arguments: dict[str, Any], **more: Any) -> Callable[[], object]:
    return torch.no_grad()(lambda: model()(**arguments, **more))


def host_mask(*rows: tuple[Any, ...]) -> Callable[[], object]:
    """Rows of different lengths whose mask is in CPU memory, as in the prefill of generate()."""
    arguments = inputs(*rows, side="left")
    return call(arguments | {"attention_mask": arguments["attention_mask"].cpu()})


def after(arguments: dict[str, Any], max_length: int | None = None) -> Any:
    """A cache behind a prefill."""
    cache = model().new_cache(arguments["input_ids"].shape[0], max_length=max_length)
    call(arguments, cache=cache)()
    return cache


def decode(max_length: int | None = None) -> Callable[[], object]:
    cache = after(inputs((3, *SMALL, 2)), max_length)
    return call({"input_ids": gpu([[5]])}, cache=cache)


def second_turn() -> Callable[[], object]:
    """A later turn with a new image, behind a cache that holds one."""
    cache = after(inputs((3, SMALL[0], 2)))
    return call(inputs((2, SMALL[1], 1)), cache=cache)


def training() -> Callable[[], object]:
    arguments = inputs((3, *SMALL, 2))
    return lambda: model(True)(**arguments, labels=arguments["input_ids"], output_logits=False).loss


def packed() -> Callable[[], object]:
    arguments = inputs((3, SMALL[0], 2, 2, SMALL[1], 1))
    tokens = arguments["input_ids"].shape[1]
    return call(arguments, cu_seqlens=gpu([0, 13, tokens]))


def features() -> Callable[[], object]:
    """Features computed before."""
    arguments = inputs((3, *SMALL, 2))
    with torch.no_grad():
        output = model().get_image_features(arguments.pop("pixel_values"), arguments["image_grid_thw"])
    return call(arguments, mm_encoder_outputs={"image": output})


def token_types(**more: Any) -> Callable[[], object]:
    arguments = inputs((3, SMALL[0], 2), **more)
    ids = arguments["input_ids"]
    return call(arguments, mm_token_type_ids=(ids == IMAGE).long())


def generate(turns: int = 1) -> Callable[[], object]:
    """The prefill of generate(), with one new token; turns=2: with the beginning of the prompt in a cache."""
    from qwen35moe.generation import loop

    first = inputs((3, SMALL[0], 2))
    arguments = inputs((3, *SMALL, 2))
    whole = {**arguments, "input_ids": torch.cat([first["input_ids"], arguments["input_ids"]], 1)}
    both = inputs((3, SMALL[0], 2), (3, *SMALL, 2), side="left")
    whole |= {"pixel_values": both["pixel_values"], "image_grid_thw": both["image_grid_thw"]}
    held = None if turns == 1 else after(first)

    @torch.no_grad()
    def call() -> object:
        with mock.patch.object(loop, "late_copy", lambda _: None):  # of events, which need a driver
            return model().generate(**whole, max_new_tokens=1, eos_token_id=[], cache=held)

    return call


def varlen_attn(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> Any:
    """In place of torch.nn.attention.varlen's: checks what its kernels require, and returns zeros."""
    from tests.support.pretend_gpu import LOG

    for bounds in (cu_seq_q, cu_seq_k):
        assert bounds.is_cuda and bounds.dtype == torch.int32 and bounds.is_contiguous()
    for x in (query, key, value):
        assert x.is_cuda and x.dtype == torch.bfloat16 and x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:-1])
    assert type(max_q) is type(max_k) is int
    LOG.launches["varlen_attn"] += 1
    return torch.empty_like(query) + 0 * (query + key + value)


def full_size(torch: Any, count: int = 5) -> Callable[[], object]:
    """For the harness `fake_gpu`: the published tower of 27 blocks before 4 layers, with images of two sizes."""
    from qwen35moe import Config, Qwen3_5MoeForConditionalGeneration
    from tests.support.fake_gpu import model_of

    whole = Config.preset("35b-a3b")
    whole = whole.replace(text_config=whole.text_config.replace(num_hidden_layers=4))
    made = model_of(torch, Qwen3_5MoeForConditionalGeneration, whole)
    grids = [(1, 12, 16), (1, 8, 18)] * count
    patches = sum(h * w for _, h, w in grids)
    ids = torch.zeros(1, 9 + patches // 4, dtype=torch.int64, device="cuda")
    pixels = torch.zeros(patches, 3 * 2 * 16 * 16, device="cuda")

    return torch.no_grad()(lambda: made(ids, pixel_values=pixels, image_grid_thw=grids))


class Inline:
    """In place of a pool of threads, in which the harness is not active."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Callable[[], object]) -> Any:
        work()
        return mock.Mock()


def load(layout: str) -> Callable[[], object]:
    """from_pretrained(device="cuda"): files are read into pinned buffers and copied by streams of their own."""
    from qwen35moe import Qwen3_5MoeForCausalLM
    from qwen35moe.checkpoint import transfer
    from tests.support.checkpoints import LAYOUTS, publish
    from tests.support.pretend_gpu import LOG

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    publish(folder, LAYOUTS[layout])
    patches = {
        "Stream": mock.Mock(), "stream": lambda _: nullcontext(), "mem_get_info": lambda *_: (1 << 40, 1 << 40),
        "empty_cache": lambda: LOG.launches.update(empty_cache=1),
    }  # fmt: skip

    def call() -> object:
        with mock.patch.multiple(torch.cuda, **patches), mock.patch.object(transfer, "ThreadPoolExecutor", Inline):
            return Qwen3_5MoeForCausalLM.from_pretrained(folder, device="cuda")

    return call


VIDEO_ROW = (3, ("video", (3, 2, 4)), 2, ("image", (1, 4, 6)), 2)
SCENARIOS: dict[str, Scenario] = {
    "text": lambda: call(inputs((9,), (9,))),
    "text_decode": lambda: call({"input_ids": gpu([[5]])}, cache=after(inputs((9,)))),
    "image": lambda: call(inputs((3, SMALL[0], 2))),
    "images": lambda: call(inputs((3, *SMALL, 2))),
    "triples": lambda: call(inputs((3, *SMALL, 2), grids="triples")),
    "video": lambda: call(inputs(VIDEO_ROW)),
    "grids_on_gpu": lambda: call(inputs((3, *SMALL, 2), grids="gpu")),
    "grids_of_both_on_gpu": lambda: call(inputs(VIDEO_ROW, grids="gpu")),
    "token_types": token_types,
    "features": features,
    "with_and_without": lambda: call(inputs((3, *SMALL, 2), (16,))),
    "packed": packed,
    "left_padded": lambda: call(inputs((3, *SMALL, 2), (7,), side="left")),
    "host_mask": lambda: host_mask((3, *SMALL, 2), (7,)),
    "text_host_mask": lambda: host_mask((9,), (5,)),
    "decode": decode,
    "decode_static": lambda: decode(64),
    "second_turn": second_turn,
    "training": training,
    "generate": generate,
    "generate_second_turn": lambda: generate(2),
    "load": lambda: load("3.5 MoE, bf16"),
    "load_fp8": lambda: load("3.5 MoE, FP8"),
}
