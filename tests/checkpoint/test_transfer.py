"""Buffers, threads and devices of loading (the path of a GPU, with a CPU as the target), and stitched pieces of files."""

from __future__ import annotations

import dataclasses
import io
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.checkpoint import CheckpointError, fill, read, stitch, transfer
from qwen35moe.checkpoint.stitch import Piece, Stitcher
from qwen35moe.checkpoint.transfer import Copy, read_into
from qwen35moe.config import Config
from tests.support import peer
from tests.support.checkpoints import LAYOUTS, QUANTISED, TEXT, Tensors, block_by_block, per_expert, publish, random_fp8, write

MODEL = Qwen3_5MoeForCausalLM
CPU, META = torch.device("cpu"), torch.device("meta")
FP8 = "3.5 MoE, FP8"
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensors]]:
    """A folder of each kind, and the weights of its text model."""
    by_kind = {}
    for number, name in enumerate((FP8, "3.5 MoE, bf16")):
        folder, expected = publish(tmp_path_factory.mktemp(f"kind{number}"), LAYOUTS[name])
        by_kind[name] = folder, {key: value for key, value in expected.items() if not key.startswith(("visual.", "mtp."))}
    return by_kind


def held(model: torch.nn.Module) -> Tensors:
    return {name.removeprefix("model."): value for name, value in model.state_dict().items()}


def assert_held(model: torch.nn.Module, expected: Tensors) -> None:
    actual = held(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name].cpu(), value), name


# ------------------------------------------------------------------------------------------------- through buffers


def through_buffers(monkeypatch: pytest.MonkeyPatch, stage: int) -> list[torch.device]:
    """Make loading use buffers, as for a GPU. The returned list collects the device of every batch."""
    devices: list[torch.device] = []
    copy = transfer._Worker.copy

    def counted(worker: Any, batch: Any) -> None:
        assert worker.staged and len({piece.target.device for piece in batch}) == 1
        copy(worker, batch)
        devices.append(batch[0].target.device)
        assert all(len(buffer.bytes) <= max(stage, 128 * 200) + 64 for buffer in worker.buffers)

    monkeypatch.setattr(transfer._Worker, "copy", counted)
    monkeypatch.setattr(transfer, "STAGE", stage)
    monkeypatch.setattr(fill, "read_into", lambda copies: read_into(copies, threads=3, staged=True))
    return devices


@pytest.mark.parametrize("stage", [300, 2**16, 2**24])
@pytest.mark.parametrize("kind", [FP8, "3.5 MoE, bf16"])
def test_buffers_of_any_size_give_the_same_weights(
    kind: str, stage: int, folders: dict[str, tuple[Path, Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small buffers contain pieces of a tensor, large ones many tensors; a block of FP8 rows is never split."""
    monkeypatch.setattr(transfer, "TILE", 1)
    batches = through_buffers(monkeypatch, stage)
    folder, expected = folders[kind]
    assert_held(MODEL.from_pretrained(folder, weights="copy"), expected)
    assert len(batches) > 100 if stage == 300 else len(batches) == 1 if stage == 2**24 else 2 < len(batches)
    wide = held(MODEL.from_pretrained(folder, weights="copy", dtype="float32"))
    assert all(torch.equal(wide[name].to(value.dtype), value) for name, value in expected.items())


def test_extra_memory_is_two_buffers_per_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    save_file({"x": values}, tmp_path / "x.safetensors")
    monkeypatch.setattr(transfer, "STAGE", 4096)
    made: list[Any] = []
    make = transfer._Buffer.__init__
    monkeypatch.setattr(transfer._Buffer, "__init__", lambda self: made.append(self) or make(self))
    target = torch.zeros(100_000, dtype=torch.float64)
    file = tmp_path / "x.safetensors"
    read_into([Copy(file, file.stat().st_size - 400_000, torch.float32, target)], threads=3, staged=True)
    assert torch.equal(target, values.double())
    assert len(made) == 6 and all(len(buffer.bytes) in (0, 4096) for buffer in made)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_counts_bytes_on_a_terminal(
    terminal: bool, folders: dict[str, tuple[Path, Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            bars.append(options | {"counted": 0})

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            bars[-1]["counted"] += count

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", type("Screen", (io.StringIO,), {"isatty": lambda self: terminal})())
    MODEL.from_pretrained(folders["3.5 MoE, bf16"][0], weights="copy")
    assert len(bars) == terminal
    assert all(bar["counted"] == bar["total"] > 10**6 and bar["unit"] == "B" for bar in bars)


@pytest.mark.parametrize("code, message", [(0x7F, "x in .* contains NaN"), (0x7E, "x in .* reaches 4.48e")])
def test_damage_is_reported_when_a_buffer_is_reused_or_at_the_end(code: int, message: str, tmp_path: Path) -> None:
    values, scale = random_fp8((130, 7), torch.Generator().manual_seed(1))
    values.view(torch.uint8)[129, 3] = code
    save_file({"x": values.view(torch.uint8)}, tmp_path / "x.safetensors")
    file, factors = tmp_path / "x.safetensors", torch.full(scale.shape, 1e30)
    copy = Copy(file, file.stat().st_size - 910, values.dtype, torch.empty(910, dtype=torch.float16), None, factors, 7, "x")
    for staged in (True, False):
        with pytest.raises(CheckpointError, match=message):
            read_into([copy], staged=staged)
    values.view(torch.uint8)[129, 3] = 0
    save_file({"x": values.view(torch.uint8)}, file)
    good = dataclasses.replace(copy, scale=scale.float())
    read_into([good], staged=True)
    assert torch.equal(good.target.view(130, 7), block_by_block(values, scale).half())


def test_scales_are_moved_to_a_device_once(tmp_path: Path) -> None:
    """However many views of them there are."""
    factors = torch.arange(12.0)
    target = torch.empty(6, device="meta")
    copies = [Copy(tmp_path / "x", 0, torch.float8_e4m3fn, target, None, factors[at : at + 2].view(1, 2)) for at in (0, 4)]
    moved = [copy.scale for copy in transfer._with_scales_on_device(copies)]
    assert all(scale is not None and scale.device == META and scale.shape == (1, 2) for scale in moved)
    assert [scale.storage_offset() for scale in moved if scale is not None] == [0, 4]
    assert len({scale.untyped_storage()._cdata for scale in moved if scale is not None}) == 1


# ------------------------------------------------------------------------------------------------- several devices


@pytest.mark.parametrize("kind", [FP8, "3.5 MoE, bf16"])
def test_every_layer_is_read_to_its_device(
    kind: str, folders: dict[str, tuple[Path, Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device is "meta": for it no byte is read, mapped or allocated."""
    folder, expected = folders[kind]
    nbytes: list[int] = []
    exactly, view = transfer.read_exactly, fill.view_of
    monkeypatch.setattr(transfer, "read_exactly", lambda *which: nbytes.append(which[2]) or exactly(*which))
    monkeypatch.setattr(fill, "view_of", lambda *which: nbytes.append(view(*which).nbytes) or view(*which))
    model = MODEL.from_pretrained(folder, device=["cpu", "meta"])
    device_map = model.device_map
    assert device_map is not None and device_map.layers == (CPU, META) and device_map.head == META
    stored = 0
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.")
        first = name.startswith(("layers.0.", "embed_tokens"))
        assert parameter.device == (CPU if first else META) and parameter.dtype == expected[name].dtype
        if first:
            assert torch.equal(parameter, expected[name])
            fp8 = kind == FP8 and (".mlp.experts." in name or name.split(".")[-2] in QUANTISED)
            itemsize = 1 if fp8 else 2 if name.endswith("dt_bias") else parameter.itemsize
            stored += parameter.numel() * itemsize
    assert stored <= sum(nbytes) <= stored * (1.001 if kind == FP8 else 1)  # and scales
    assert model.loading_report.nbytes == sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert bool(model.loading_report.dequantised) == (kind == FP8)


def test_one_device_twice_is_no_device_map(folders: dict[str, tuple[Path, Tensors]]) -> None:
    folder, expected = folders["3.5 MoE, bf16"]
    for device in (["cpu", "cpu"], "auto" if not torch.cuda.is_available() else "cpu", CPU):
        model = MODEL.from_pretrained(folder, device=device)
        assert model.device_map is None and model.loading_report.mapped == len(expected) - 1  # dt_bias is widened
        assert_held(model, expected)
    with pytest.raises(ValueError, match="name at least one device"):
        MODEL.from_pretrained(folder, device=[])


@pytest.mark.parametrize("devices", ["cuda:1", ["cuda:0", "cuda:1"]])
def test_insufficient_gpu_memory_is_reported_before_loading_starts(
    devices: Any, folders: dict[str, tuple[Path, Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = folders[FP8]
    whole = sum(value.numel() * 2 for value in expected.values())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (whole // 3, whole))
    for module, names in ((fill, ("map_file", "new_memory", "read_into")), (read, ("read_scales",))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("memory was allocated"))
    with pytest.raises(ValueError, match=r"cuda:[01] would hold .* GB of weights and has .* GB free; .* give more devices"):
        MODEL.from_pretrained(folder, device=devices)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FP8, "3.5 MoE, bf16"])
@pytest.mark.parametrize("stage", [2**12, 2**24])
def test_a_gpu_gets_the_same_weights(kind: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one GPU, and with the second layer on the CPU; a GPU dequantises FP8 to the same numbers as a CPU."""
    folder, expected = publish(tmp_path, LAYOUTS[kind])
    expected = {key: value for key, value in expected.items() if not key.startswith(("visual.", "mtp."))}
    monkeypatch.setattr(transfer, "STAGE", stage)
    for device in ("cuda", "auto", ["cuda:0", "cpu"]):
        model = MODEL.from_pretrained(folder, device=device)
        devices = {parameter.device.type for parameter in model.parameters()}
        assert devices == ({"cuda", "cpu"} if isinstance(device, list) else {"cuda"})
        assert_held(model, expected)


# --------------------------------------------------------------------------------------------- pieces of mapped files


@pytest.mark.parametrize("shift", [0, 2, 70])
def test_pieces_are_stitched_to_one_tensor(shift: int, tmp_path: Path) -> None:
    """Pieces of two files, out of order, one with another remainder, two adjacent ones; of whole pages and others."""
    rng = torch.Generator().manual_seed(3)
    content = {name: torch.randint(0, 2**15, (40 * PAGE,), generator=rng).to(torch.int16) for name in "ab"}
    for name, values in content.items():
        (tmp_path / name).write_bytes(values.numpy().tobytes())
    sizes = [16 * PAGE, 17 * PAGE + 6, 16 * PAGE, 18 * PAGE, 16 * PAGE]
    pieces, at = [], 0
    for number, size in enumerate(sizes):
        name, page = [("b", 20), ("a", 1), ("a", 18), ("b", 0), ("b", 50)][number]
        offset = page * PAGE + shift + at % PAGE
        offset += 2 if number == 3 else 0
        pieces.append(Piece(tmp_path / name, offset, at, size))
        at += size
    before = {name: (tmp_path / name).read_bytes() for name in "ab"}
    wanted = torch.cat([content[p.file.name].view(torch.uint8)[p.offset : p.offset + p.nbytes] for p in pieces])
    stitched = Stitcher()((at // 2,), torch.int16, pieces)
    assert stitched is not None
    value, remaining = stitched
    assert remaining == [pieces[3]] and value.data_ptr() % PAGE == shift
    whole = value.view(torch.uint8)
    for piece in remaining:
        whole[piece.at : piece.at + piece.nbytes] = wanted[piece.at : piece.at + piece.nbytes]
    assert torch.equal(whole, wanted)
    value.fill_(7)  # does not change the files
    assert before == {name: (tmp_path / name).read_bytes() for name in "ab"}
    lines = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert lines >= 3
    del value, whole, stitched
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 0


def no_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitch, "_free_mappings", lambda: 2)


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitch, "_map_at", lambda *_: False)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitch, "SMALLEST", 10**6)


@pytest.mark.parametrize("why", [None, no_mappings, refused, small])
def test_experts_stored_one_by_one_are_mapped(
    why: Callable[[pytest.MonkeyPatch], None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or read, if mapping is impossible or too expensive: the weights are the same."""
    text = TEXT | {"hidden_size": 256, "moe_intermediate_size": 128, "mtp_num_hidden_layers": 0}
    model = MODEL(Config.from_dict(text))
    peer.draw(model, 4)
    expected = {name: value.float() if value.ndim == 1 and name.endswith(("A_log", "dt_bias")) else value
                for name, value in model.to(torch.bfloat16).state_dict().items()}  # fmt: skip
    folder = write(tmp_path, per_expert(expected), text, shards=2)
    monkeypatch.setattr(stitch, "SMALLEST", 4096)
    if why is not None:
        why(monkeypatch)
    loaded = MODEL.from_pretrained(folder)
    report = loaded.loading_report
    assert (report.stitched, report.stacked) == ((4, 0) if why is None else (0, 4))
    actual = loaded.state_dict()
    assert all(torch.equal(actual[name].float(), value.float()) for name, value in expected.items())
    part = MODEL.from_pretrained(folder, experts=[4, 1, 3])
    assert part.loading_report.stitched == report.stitched
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(part.state_dict()[name], expected[name][[4, 1, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(9)[None]).logits, MODEL.from_pretrained(folder, weights="copy")(
            torch.arange(9)[None]).logits)  # fmt: skip


def test_a_tensor_that_can_mostly_not_be_mapped_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(80 * PAGE))
    pieces = [Piece(tmp_path / "a", 18 * PAGE * n + 2 * n, 16 * PAGE * n, 16 * PAGE) for n in range(3)]
    assert Stitcher()((24 * PAGE,), torch.int16, pieces) is None
    value: tuple[Tensor, list[Piece]] | None = Stitcher()((16 * PAGE,), torch.int16, [*pieces[:1], pieces[0]._replace(
        at=16 * PAGE, offset=2)])  # fmt: skip
    assert value is not None and len(value[1]) == 1
