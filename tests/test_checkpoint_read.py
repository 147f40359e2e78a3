"""Loading: every layout, name, dtype and placement gives the same weights; everything wrong is told in one error."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.checkpoint import CheckpointError, fill, load_model, memory, read, transfer
from qwen35moe.config import Config, ConfigError
from qwen35moe.model import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel
from tests import peer
from tests.checkpoints import per_expert, write
from tests.memory import memory_taken
from tests.peer import FULL, LINEAR, Case, odd_shape

MODEL = Qwen3_5MoeForCausalLM
ISLANDS = ("A_log", "dt_bias", "linear_attn.norm.weight")
Tensors = dict[str, Tensor]


def case(**changes: Any) -> Case:
    return odd_shape(11, **{"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "num_experts": 5,
                            "num_experts_per_tok": 2, "tie_word_embeddings": False} | changes)  # fmt: skip


def weights(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """The weights of a drawn model by name, the islands in float32."""
    model = peer.ours(case)
    peer.draw(model, 5)
    return {name: value.clone() for name, value in model.to(dtype).state_dict().items()}


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): value for name, value in tensors.items()}


def assert_weights(model: torch.nn.Module, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value.dtype if dtype is None else dtype
        if name.endswith(ISLANDS):
            wanted = torch.promote_types(torch.float32, wanted)
        assert found[name].dtype == wanted, name
        assert torch.equal(found[name], value.to(wanted)), name


@pytest.fixture(scope="module")
def bf16() -> tuple[Case, Tensors]:
    return case(), weights(case(), torch.bfloat16)


# ------------------------------------------------------------------------------------------------ layouts and names


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("how", ["map", "copy"])
@pytest.mark.parametrize("layout", ["grouped", "per_expert", "one layer each", "gate_up grouped, down per expert"])
def test_every_layout_gives_the_same_weights(
    layout: str, how: str, shards: int, bf16: tuple[Case, Tensors], tmp_path: Path
) -> None:
    of, tensors = bf16
    keep = {
        "grouped": lambda name: True,
        "per_expert": lambda name: False,
        "one layer each": lambda name: ".0." in name,
        "gate_up grouped, down per expert": lambda name: name.endswith("gate_up_proj"),
    }[layout]
    folder = write(tmp_path, per_expert(tensors, keep), of.text, shards)
    model = MODEL.from_pretrained(folder, weights=how)
    assert_weights(model, tensors)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    report = model.loading_report
    assert report.stacked == {"grouped": 0, "per_expert": 4}.get(layout, 2) and report.files == shards
    # Islands are float32 in the file: nothing is converted, and only what is stacked takes memory of its own.
    assert not report.converted and not report.left_out
    assert (report.mapped, report.copied) == ((len(tensors) - report.stacked, 0) if how == "map" else
                                              (0, len(tensors) - report.stacked))  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model.", ""])
@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"])
def test_every_prefix_is_read(prefix: str, head: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    on_disk = renamed(tensors, lambda name: head if name == "lm_head.weight" else prefix + name.removeprefix("model."))
    assert_weights(MODEL.from_pretrained(write(tmp_path, on_disk, of.text)), tensors)


def test_the_text_model_comes_out_of_a_multimodal_checkpoint(
    bf16: tuple[Case, Tensors], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of, tensors = bf16
    extra = {"model.visual.pos_embed.weight": torch.ones(4, 3), "visual.patch_embed.proj.bias": torch.ones(3),
             "vision_tower.merger.norm.bias": torch.ones(2), "mtp.fc.weight": torch.ones(2, 4),
             "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 4),
             "model.language_model.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    on_disk = renamed(tensors, lambda name: name.replace("model.", "model.language_model.", 1)) | extra
    config = {"model_type": "qwen3_5_moe", "text_config": of.text, "tie_word_embeddings": False,
              "vision_config": {"out_hidden_size": of.text["hidden_size"]}}  # fmt: skip
    with caplog.at_level(logging.INFO):
        model = MODEL.from_pretrained(write(tmp_path, on_disk, config, shards=2))
    assert_weights(model, tensors)
    left_out = {"model.visual.*": 3, "mtp.*": 2, "*rotary_emb.inv_freq": 1}
    assert model.loading_report.left_out == left_out
    told = [record.getMessage() for record in caplog.records if record.name.startswith("qwen35moe.checkpoint")]
    assert len(told) == 1 and all(name in told[0] and str(count) in told[0] for name, count in left_out.items())


def test_a_bare_text_model_leaves_the_head_out_and_says_so(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = Qwen3_5MoeTextModel.from_pretrained(write(tmp_path, tensors, of.text))
    expected = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    assert_weights(model, expected)
    assert model.loading_report.left_out == {"lm_head.weight": 1} and "lm_head.weight" in str(model.loading_report)


def test_the_dense_siblings(tmp_path: Path) -> None:
    of = odd_shape(4, dense=True, tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    on_disk = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    assert_weights(Qwen3_5ForCausalLM.from_pretrained(write(tmp_path, on_disk, of.text)), tensors)
    with pytest.raises(ConfigError, match="Qwen3_5MoeForCausalLM is for MoE"):
        MODEL.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- tying


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    of = case(tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    without = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    for on_disk in (without, tensors, {name: value for name, value in tensors.items() if "embed" not in name}):
        model = MODEL.from_pretrained(write(tmp_path, on_disk, of.text))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_weights(model, tensors)


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path: Path) -> None:
    of = case(tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    other = tensors["lm_head.weight"].clone()
    other[-1, -1] += 1
    with pytest.raises(CheckpointError, match="tied but different.*lm_head.weight.*tie_word_embeddings=False"):
        MODEL.from_pretrained(write(tmp_path, tensors | {"lm_head.weight": other}, of.text))
    # What the message advises works:
    untied = Config.from_pretrained(tmp_path).replace(tie_word_embeddings=False)
    assert torch.equal(MODEL.from_pretrained(tmp_path, config=untied).lm_head.weight, other)
    # The same values in another dtype are the same head.
    write(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"].float()}, of.text)
    assert MODEL.from_pretrained(tmp_path).lm_head.weight is not None
    write(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1]}, of.text)
    with pytest.raises(CheckpointError, match="tied but different"):
        MODEL.from_pretrained(tmp_path)


def test_an_untied_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    of = case()
    tensors = {name: value for name, value in weights(of).items() if name != "lm_head.weight"}
    advice = r"missing: lm_head.weight.*tie_word_embeddings is false.*replace\("
    with pytest.raises(CheckpointError, match=advice) as error:
        MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    assert len(error.value.problems) == 1
    tied = Config.from_pretrained(tmp_path).replace(tie_word_embeddings=True)
    model = MODEL.from_pretrained(tmp_path, config=tied)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


# ----------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["map", "copy"])
def test_auto_is_the_stored_dtype_and_islands_stay_wide(stored: torch.dtype, how: str, tmp_path: Path) -> None:
    tensors = {name: value.to(stored) for name, value in weights(case()).items()}  # islands too, as Qwen3.6 has them
    model = MODEL.from_pretrained(write(tmp_path, tensors, case().text), weights=how)
    assert_weights(model, tensors, stored)
    assert model.dtype == stored and model.loading_report.dtype == stored and not model.loading_report.converted


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32, "torch.float64", torch.float16])
@pytest.mark.parametrize("how", ["map", "copy"])
def test_a_dtype_asked_for_converts(dtype: Any, how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, per_expert(tensors), of.text), dtype=dtype, weights=how)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert_weights(model, tensors, wanted)
    ordinary = sum(not name.endswith(ISLANDS) for name in tensors)
    converted = {} if wanted == torch.bfloat16 else {f"BF16 -> {str(wanted)[6:]}": ordinary}
    assert model.loading_report.converted == converted


def test_tensors_of_another_dtype_are_converted_and_counted(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.mlp.gate.weight"
    model = MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].float()}, of.text))
    assert_weights(model, tensors)
    assert model.loading_report.converted == {"F32 -> bfloat16": 1}


def test_the_stored_dtype_wins_over_the_one_in_the_configuration_and_this_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, weights(case()), case().text | {"dtype": "bfloat16"})
    model = MODEL.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert "config.json says dtype bfloat16, most weights are torch.float32" in str(model.loading_report)
    assert MODEL.from_pretrained(folder, dtype="bfloat16").loading_report.notes == []


def test_owners_remember_how_islands_were_stored(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.linear_attn.dt_bias"
    model = MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].bfloat16()}, of.text))
    mixer = model.model.layers[0].linear_attn
    assert mixer.stored_dtypes == {"A_log": torch.float32, "dt_bias": torch.bfloat16}
    assert mixer.norm.stored_dtypes == {"weight": torch.float32}


@pytest.mark.parametrize("how", ["map", "copy"])
def test_the_transformers_policy_rounds_the_islands(how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    rounded = {n: v.bfloat16().float() if n.endswith(ISLANDS) else v for n, v in tensors.items()}
    assert not torch.equal(rounded["model.layers.0.linear_attn.A_log"], tensors["model.layers.0.linear_attn.A_log"])
    assert_weights(MODEL.from_pretrained(folder, dtype_policy="transformers", weights=how), rounded)
    assert_weights(MODEL.from_pretrained(folder, weights=how), tensors)
    wide = MODEL.from_pretrained(folder, dtype=torch.float32, dtype_policy="transformers", weights=how)
    assert_weights(wide, tensors, torch.float32)  # a float32 load rounds nothing there either


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": torch.int32}, {"dtype": "half float"},
                                     {"weights": "mmap"}, {"dtype_policy": "hf"}])  # fmt: skip
def test_wrong_choices_name_the_right_ones(options: dict[str, Any], tmp_path: Path) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}=.*one of"):
        load_model(MODEL, tmp_path, **options)


# ------------------------------------------------------------------------------------------------- memory and files


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()


@pytest.mark.parametrize("how", ["map", "copy"])
def test_training_in_place_never_reaches_the_file(how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    before = digest(folder)
    model = MODEL.from_pretrained(folder, weights=how)
    again = MODEL.from_pretrained(folder, weights=how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert digest(folder) == before
    assert_weights(again, tensors)  # and no other model in this process
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"] + 1)


def test_mapped_weights_outlive_the_files_name(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    model = MODEL.from_pretrained(folder)
    model.loading_report.read_ahead.thread.join()
    for file in folder.iterdir():
        file.unlink()
    gc.collect()
    assert_weights(model, tensors)


def test_mapped_parameters_share_no_storage(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    """Each can be pickled, moved and resized by itself: its storage ends where it ends."""
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_contiguous()


@pytest.mark.parametrize("spaces", range(8))
@pytest.mark.parametrize("how", ["map", "copy"])
def test_data_at_any_byte_is_right(spaces: int, how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    """The header's length decides where the data begins: here at every offset modulo 8."""
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


def test_a_file_that_shrinks_while_it_is_read(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize("layout", ["grouped, mapped", "per expert, mapped", "per expert, copied", "per expert, FP8"])
def test_memory_is_taken_once(layout: str, tmp_path: Path) -> None:
    """A child process loads 48 MiB of experts: mapped ones take no memory of their own, a page for each piece where they
    are put together, stacked ones exactly theirs; block-FP8 needs buffers of a fixed size beside that.

    Peak anonymous memory, so that page cache and code do not count.
    """
    of = case(num_experts=8, moe_intermediate_size=512, hidden_size=2048, num_hidden_layers=1, layer_types=[FULL])
    shapes = {name: value.shape for name, value in MODEL(Config.from_dict(of.text)).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors = tensors if layout.startswith("grouped") else per_expert(tensors)
    if layout.endswith("FP8"):
        for name in [name for name in tensors if ".mlp.experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in tensors[name].shape]).bfloat16()
    folder = write(tmp_path, tensors, of.text)
    del tensors
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool are not there
            start, seen, loading = _anonymous(), [0], threading.Event()
            samples = iter(lambda: loading.wait(0.002), True)
            watch = threading.Thread(target=lambda: [seen.append(_anonymous()) for _ in samples])
            watch.start()
            model = MODEL.from_pretrained(folder, weights="copy" if layout.endswith("copied") else "map")
            loading.set()
            watch.join()
            grown = max(*seen, _anonymous()) - start
            experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
            limit = 8e6 if layout.endswith("mapped") else experts + (64e6 if layout.endswith("FP8") else 16e6)
            floor = 0 if layout.endswith("mapped") else experts
            os._exit(0 if floor <= grown <= limit and experts == 8 * 3 * 512 * 2048 * 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


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
def test_a_checkpoint_that_is_replaced_while_it_is_loaded(
    changed: str, bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header would be read from the old file and its data from the new one, of the same size and layout."""
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


def test_reading_ahead_fetches_what_is_cold_and_skips_what_is_not(tmp_path: Path) -> None:
    if not memory.ReadAhead.possible():
        pytest.skip("this system has no posix_fadvise or no RWF_NOWAIT")
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3 * 2**20))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if memory._resident(descriptor, 0):
        pytest.skip("this filesystem keeps its pages or cannot tell")
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


def test_reading_ahead_ends_with_its_model_and_survives_a_lost_file(tmp_path: Path) -> None:
    lost = memory.ReadAhead([(tmp_path / "gone", 0, 10)]).start()
    lost.thread.join(20)
    assert not lost.thread.is_alive() and lost.fetched == 0
    model = MODEL.from_pretrained(write(tmp_path, weights(case()), case().text))
    ahead = model.loading_report.read_ahead
    del model
    gc.collect()
    assert ahead._stop.is_set()


def test_weights_are_fetched_in_the_order_of_use(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
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


def test_what_does_not_fit_into_memory_is_not_read_ahead(
    bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tensors = bf16
    monkeypatch.setattr(fill, "available_memory", lambda: 1000)
    model = MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    assert model.loading_report.read_ahead is None
    assert_weights(model, tensors)


# ----------------------------------------------------------------------------------------------------------- errors


def problems_of(folder: Path, cls: Any = MODEL, **options: Any) -> set[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        cls.from_pretrained(folder, **options)
    return {(problem.kind, problem.subject) for problem in caught.value.problems}


def test_everything_that_is_wrong_stands_in_one_error(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    tensors = per_expert(tensors)
    experts = "model.layers.0.mlp.experts"
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    del tensors[f"{experts}.3.up_proj.weight"]
    tensors[f"{experts}.5.up_proj.weight"] = tensors[f"{experts}.4.up_proj.weight"]
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].T
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] = torch.ones(
        1, of.text["hidden_size"]).to(torch.float8_e4m3fn)  # fmt: skip
    tensors["model.layers.9.norm.weight"] = torch.ones(2)
    tensors["base_model.lora_A.weight"] = torch.ones(2)
    tensors["model.language_model.layers.1.input_layernorm.weight"] = torch.ones(of.text["hidden_size"])
    folder = write(tmp_path, tensors, of.text, shards=2)
    (folder / "generation_config.json").write_text("[1]")
    twice = {"model.layers.1.input_layernorm.weight", "model.language_model.layers.1.input_layernorm.weight"}
    found = problems_of(folder)
    assert {problem for problem in found if problem[0] != "stored twice"} == {
        ("missing", "layers.1.self_attn.q_norm.weight"),
        ("missing", "layers.0.mlp.experts.3.up_proj.weight"),
        ("unexpected", f"{experts}.5.up_proj.weight"),
        ("wrong shape", "model.layers.0.mlp.gate.weight"),
        ("wrong dtype", "model.norm.weight"),
        ("scale missing", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("unexpected", "model.layers.9.norm.weight"),
        ("unexpected", "base_model.lora_A.weight"),
        ("not a JSON object", "generation_config.json"),
    }
    assert [subject in twice for kind, subject in found if kind == "stored twice"] == [True]


def test_grouped_and_per_expert_together_are_refused(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    both = per_expert(tensors) | {name: tensors[name] for name in tensors if ".0.mlp.experts." in name}
    names = {f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")}
    assert problems_of(write(tmp_path, both, of.text)) == {("stored twice", name) for name in names}
    # One expert beside the grouped tensor is enough.
    one = tensors | {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(1)}
    found = problems_of(write(tmp_path, one, of.text))
    assert found == {("stored twice", "model.layers.1.mlp.experts.gate_up_proj")}


def test_a_missing_shard_is_one_problem_and_not_one_per_tensor(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, per_expert(tensors), of.text, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert problems_of(folder) == {("missing file", "model-00002-of-00003.safetensors")}
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"x" * 100)
    assert problems_of(folder) == {("bad header", "model-00002-of-00003.safetensors")}


def test_a_file_that_is_cut_off_is_named(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    file = write(tmp_path, tensors, of.text) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert problems_of(tmp_path) == {("cut off", "model.safetensors")}


def test_the_report_folds_layers_and_gives_both_shapes(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    config = of.text | {"num_hidden_layers": 4, "layer_types": of.text["layer_types"] * 2, "moe_intermediate_size": 4}
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(write(tmp_path, tensors, config))
    text = str(caught.value)
    width, inner, experts = (of.text[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    assert f"missing: layers.{{2-3}}.input_layernorm.weight: [{width}] (2 tensors)" in text
    assert (f"wrong shape: model.layers.{{0-1}}.mlp.experts.down_proj: on disk [{experts}, {width}, {inner}], "
            f"the model has [{experts}, {width}, 4] (2 tensors)") in text  # fmt: skip
    assert len(text.splitlines()) <= 22


def test_swapped_axes_are_recognised(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.linear_attn.conv1d.weight"
    with pytest.raises(CheckpointError, match="last two axes are swapped .MLX"):
        MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].transpose(1, 2)}, of.text))


def test_nothing_is_allocated_before_a_checkpoint_is_known_to_fit(
    bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors | {"model.strange": torch.ones(1)}, of.text)
    for name in ("map_file", "new_memory", "read_into", "view_of"):
        monkeypatch.setattr(fill, name, lambda *_, **__: pytest.fail("memory was taken"))
    assert problems_of(folder) == {("unexpected", "model.strange")}


def test_a_configuration_of_absurd_size_is_refused_without_memory(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    config = of.text | {"vocab_size": 10**6, "moe_intermediate_size": 10**5}
    folder = write(tmp_path / "absurd", tensors, config)
    other = write(tmp_path / "other", tensors, of.text | {"vocab_size": 7})

    def refused(path: Path) -> None:
        assert ("wrong shape", "model.embed_tokens.weight") in problems_of(path)

    assert memory_taken(lambda: refused(folder), lambda: refused(other)) < 4 * 2**20


def test_a_folder_without_a_configuration(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    (write(tmp_path, tensors, of.text) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        MODEL.from_pretrained(tmp_path)
    assert_weights(MODEL.from_pretrained(tmp_path, config=Config.from_dict(of.text)), tensors)
    outside = tmp_path.parent / "outside.json"
    outside.write_text(json.dumps(of.text))
    (tmp_path / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the folder"):
        MODEL.from_pretrained(tmp_path)


def test_generation_settings_come_with_the_model(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    assert getattr(MODEL.from_pretrained(folder), "generation_config", None) is None
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    assert MODEL.from_pretrained(folder).generation_config == {"temperature": 0.7}
