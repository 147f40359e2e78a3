"""Loading and memory: mapped, copied and read-ahead files, devices, and files that change meanwhile."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.checkpoint import CheckpointError, fill, memory, read, transfer
from qwen35moe.config import Config
from tests.checkpoint.test_read import MODEL, Tensors, assert_weights, case, weights
from tests.support.checkpoints import per_expert, write
from tests.support.memory import LAG, anonymous_growth, memory_taken
from tests.support.peer import FULL, Case


@pytest.fixture(scope="module")
def bf16() -> tuple[Case, Tensors]:
    return case(), weights(case(), torch.bfloat16)


# ------------------------------------------------------------------------------------------------- memory and files


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()


@pytest.mark.parametrize("how", ["map", "copy"])
def test_training_in_place_does_not_change_the_file(how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    before = digest(folder)
    model = MODEL.from_pretrained(folder, weights=how)
    again = MODEL.from_pretrained(folder, weights=how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert digest(folder) == before
    assert_weights(again, tensors)  # another model in this process is not changed either
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"] + 1)


def test_mapped_weights_survive_the_deletion_of_the_file(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    model = MODEL.from_pretrained(folder)
    model.loading_report.read_ahead.thread.join()
    for file in folder.iterdir():
        file.unlink()
    gc.collect()
    assert_weights(model, tensors)


def test_mapped_parameters_share_no_storage(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    """Each can be pickled, moved and resized separately, because its storage has no other bytes."""
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_contiguous()


@pytest.mark.parametrize("spaces", range(8))
@pytest.mark.parametrize("how", ["map", "copy"])
def test_data_may_begin_at_any_byte(spaces: int, how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    """The length of the header decides where the data begin: at every offset modulo 8."""
    of, tensors = bf16
    file = write(tmp_path, tensors, of.text) / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    content = (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces + content[8 + length :]
    file.write_bytes(content)
    model = MODEL.from_pretrained(tmp_path, weights=how)
    assert_weights(model, tensors)
    for parameter in model.parameters():
        assert parameter.data_ptr() % parameter.element_size() == 0
    if how == "map":
        wide = sum(value.dtype == torch.float32 for value in tensors.values())
        expected = 0 if spaces % 2 else len(tensors) - wide if spaces % 4 else len(tensors)
        assert model.loading_report.mapped == expected


@pytest.mark.parametrize("chunk", [64, 1000, 2**25])
def test_reading_in_pieces_of_any_size(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    monkeypatch.setattr(memory, "_HUGE", 0)  # all memory from huge pages
    tensors = weights(case())
    folder = write(tmp_path, per_expert(tensors), case().text)
    assert_weights(MODEL.from_pretrained(folder, weights="copy"), tensors)
    assert_weights(MODEL.from_pretrained(folder, weights="copy", dtype="bfloat16"), tensors, torch.bfloat16)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    file = write(tmp_path, tensors, of.text) / "model.safetensors"
    target = torch.empty(100)
    job = transfer.Copy(file, file.stat().st_size - 40, torch.float32, target)
    with pytest.raises(OSError, match="ended 360 bytes early"):
        transfer.read_into([job])


def test_the_meta_device_checks_and_reads_nothing(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text), device="meta")
    for name, value in model.state_dict().items():
        assert value.is_meta and value.dtype == tensors[name].dtype and value.shape == tensors[name].shape
    broken = {name: value for name, value in tensors.items() if "o_proj" not in name}
    with pytest.raises(CheckpointError, match="missing: layers.1.self_attn.o_proj.weight"):
        MODEL.from_pretrained(write(tmp_path, broken, of.text), device="meta")


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["map", "copy"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_gpu_gets_the_same_weights(how: str, dtype: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, per_expert(tensors, lambda name: ".0." in name), of.text)
    model = MODEL.from_pretrained(folder, device="cuda", weights=how, dtype=dtype)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert_weights(model.cpu(), tensors, torch.bfloat16 if dtype == "auto" else torch.float32)


EXPERTS = 8 * 3 * 512 * 2048 * 2  # bytes of the experts in the next test


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize("layout", ["grouped, mapped", "per expert, mapped", "per expert, copied", "per expert, FP8"])
def test_memory_is_allocated_once(layout: str, tmp_path: Path) -> None:
    """A child process loads 48 MiB of experts. Mapped experts take no new memory, stitched ones a page per piece, stacked
    ones exactly their size; block-FP8 also needs buffers of a fixed size.

    Measured as peak anonymous memory, so that page cache and code do not count.
    """
    of = case(num_experts=8, moe_intermediate_size=512, hidden_size=2048, num_hidden_layers=1, layer_types=[FULL])
    shapes = {name: value.shape for name, value in MODEL(Config.from_dict(of.text)).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors = tensors if layout.startswith("grouped") else per_expert(tensors)
    if layout.endswith("FP8"):
        for name in [name for name in tensors if ".mlp.experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in tensors[name].shape]).bfloat16()
    folder = write(tmp_path / "large", tensors, of.text)
    del tensors
    rehearsal = write(tmp_path / "small", per_expert(weights(case(), torch.bfloat16)), case().text)
    how = "copy" if layout.endswith("copied") else "map"

    def load() -> Any:
        model = MODEL.from_pretrained(folder, weights=how)
        assert sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name) == EXPERTS
        return model

    taken = memory_taken(load, lambda: MODEL.from_pretrained(rehearsal, weights=how), anonymous_growth)
    if layout.endswith("mapped"):
        assert -LAG <= taken <= 8e6
    else:
        assert EXPERTS - LAG <= taken <= EXPERTS + (64e6 if layout.endswith("FP8") else 16e6)


def test_a_loaded_model_can_be_copied_and_pickled(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.add_(1)
    assert_weights(model, tensors)
    assert twin.loading_report.mapped == model.loading_report.mapped
    assert_weights(pickle.loads(pickle.dumps(model)), tensors)


@pytest.mark.parametrize("changed", ["weights", "configuration"])
def test_a_checkpoint_replaced_while_it_is_loaded_is_an_error(
    changed: str, bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is from the old file, the data are from the new one, of the same size and layout."""
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    name = {"weights": "model.safetensors", "configuration": "config.json"}[changed]
    original = read.read_headers

    def replaced(*args: Any) -> Any:
        header = original(*args)
        (folder / "new").write_bytes((folder / name).read_bytes())
        (folder / "new").replace(folder / name)
        return header

    monkeypatch.setattr(read, "read_headers", replaced)
    with pytest.raises(CheckpointError, match="was replaced by another checkpoint while it was loaded"):
        MODEL.from_pretrained(folder)
    monkeypatch.undo()
    assert_weights(MODEL.from_pretrained(folder), tensors)


# ------------------------------------------------------------------------------------------------------ reading ahead


def test_reading_ahead_fetches_uncached_pages_only(tmp_path: Path) -> None:
    if not memory.ReadAhead.possible():
        pytest.skip("this system has no posix_fadvise or no RWF_NOWAIT")
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3 * 2**20))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if memory._resident(descriptor, 0):
        pytest.skip("this filesystem keeps its pages or does not report them")
    ranges = [(file, 0, 2**20), (file, 2**20, 3 * 2**20)]
    first = memory.ReadAhead(ranges).start()
    assert first.ranges == [(file, 0, 3 * 2**20)]
    first.thread.join(20)
    assert not first.thread.is_alive() and first.fetched == 3 * 2**20
    assert all(memory._resident(descriptor, at) for at in range(0, 3 * 2**20, 4096))
    second = memory.ReadAhead(ranges).start()
    second.thread.join(20)
    assert second.fetched == 0
    os.close(descriptor)


def test_reading_ahead_ends_with_its_model_and_tolerates_a_missing_file(tmp_path: Path) -> None:
    missing = memory.ReadAhead([(tmp_path / "missing", 0, 10)]).start()
    missing.thread.join(20)
    assert not missing.thread.is_alive() and missing.fetched == 0
    model = MODEL.from_pretrained(write(tmp_path, weights(case()), case().text))
    ahead = model.loading_report.read_ahead
    del model
    gc.collect()
    assert ahead._stop.is_set()


def test_weights_are_read_ahead_in_the_order_of_use(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    on_disk = dict(sorted(tensors.items(), key=lambda item: item[0], reverse=True))
    model = MODEL.from_pretrained(write(tmp_path, on_disk, of.text, shards=2))
    header = read.read_headers(tmp_path)
    place = {name: (tensor.file, tensor.offset) for name, tensor in header.tensors.items()}
    ranges = model.loading_report.read_ahead.ranges
    order = [next(i for i, (file, begin, end) in enumerate(ranges) if file == place[name][0] and begin <= place[name][1] < end)
             for name in model.state_dict()]  # fmt: skip
    assert order == sorted(order) and order[0] == 0
    assert sum(end - begin for _, begin, end in ranges) == header.nbytes


def test_weights_larger_than_the_memory_are_not_read_ahead(
    bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tensors = bf16
    monkeypatch.setattr(fill, "available_memory", lambda: 1000)
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    assert model.loading_report.read_ahead is None
    assert_weights(model, tensors)
