"""Loading: from a folder to a model on a device.

read the headers -> build the model on the meta device -> match names -> refuse, with everything that is wrong, or
-> give every parameter its memory: the mapped file itself, or fresh memory that the file is read into

Nothing is allocated and no weight is read before the whole checkpoint is known to fit. A parameter whose bytes lie on
disk as they are needed is not copied at all on a CPU (`weights="map"`); the others, and all of them with
`weights="copy"` or on a GPU, are allocated once and filled in place, experts slice by slice, block-FP8 tile by tile.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen35moe.config import Config
from qwen35moe.models.device_map import DeviceMap, Devices, plan_device_map

from . import names
from .assemble import Plan, Slot, match, slots_of
from .dtypes import FLOATS
from .fill import fill
from .folder import CONFIG, GENERATION_CONFIG, config_file
from .foreign import refuse_foreign
from .headers import INDEX, SINGLE, Header, StoredTensor, locate, parse_object, read_headers
from .hub import folder_of
from .problems import CheckpointError, Problem
from .report import LoadingReport
from .selection import MTP, PARTS, Experts, Selection
from .transfer import read_scales

log = logging.getLogger(__name__)

MAX_SETTINGS_BYTES = 2**20  # of a generation_config.json; published ones have 202 bytes


class _Uninitialised(TorchFunctionMode):
    """Leaves out what torch.nn.init would do to weights that are about to be replaced.

    On the meta device these functions compute nothing, but the first one imports torch's decompositions: 1.8 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def load_model(
    cls: type[nn.Module],
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    device: Devices = "cpu",
    config: Config | None = None,
    weights: str = "map",
    dtype_policy: str = "native",
    revision: str | None = None,
    layers: Iterable[int] | None = None,
    experts: Experts | None = None,
    parts: Iterable[str] | None = None,
) -> Any:
    """A model of class `cls` with the weights of the checkpoint in the folder `path`, in eval mode.

    path may be a name on the Hub (owner/name) as well, revision a commit, tag or branch of it; see `hub.py`.
    dtype: "auto" is the dtype most of the stored weights have (block-FP8 aside); islands (A_log, ...) stay float32.
    device: a CPU, a GPU, or "meta", which checks the checkpoint and reads nothing; "auto" (every GPU, or the CPU) or a
        list lays whole layers out over several, see `models/device_map.py`, and every parameter is read straight onto its own.
    config: instead of config.json, for instance with another rope; always of the whole checkpoint.
    weights: "map" uses the files themselves as memory on a CPU (copy on write, they are never written to), "copy" reads
        them into memory of its own: for a disk that goes away, or files that another program overwrites in place.
    dtype_policy: "transformers" rounds the islands through `dtype`, as transformers stores them; they stay float32
        parameters.
    layers: numbers of the layers to load; they keep their order, and `model.source_layers` their numbers.
    experts: ids for all layers, or {layer: ids} with the same number of ids everywhere, at least num_experts_per_tok.
        They become experts 0, 1, ... in the order given; the router's rows go with them.
    parts: a set of "text", "vision", "mtp"; by default what the class has without being asked.

    With layers, experts or parts only the bytes of these are read, files that hold none of them need not exist, and
    `model.config` describes the smaller model.

    CheckpointError lists everything that is missing, unexpected, of a wrong shape or dtype, or damaged; ValueError
    names a number or part that the checkpoint or the class does not have.
    """
    _check_choices(weights=(weights, ("map", "copy")), dtype_policy=(dtype_policy, ("native", "transformers")))
    wanted = _dtype(dtype)
    selection = Selection.of(layers, experts, parts)
    problems: list[Problem] = []
    wants = None if selection.is_everything else selection.wants
    path = folder_of(path, revision=revision, wanted=wants)
    before = _stamp(path)
    header = read_headers(path, problems, wants)
    if problems and not header.tensors:
        raise CheckpointError(f"{path} cannot be read:", problems)
    config = config or _config(header)
    refuse_foreign(config, header)
    selection = selection.checked(config)
    _check_depth(config, header)
    model = _build(cls, _smaller(config, selection), selection)
    slots = slots_of(model)
    _check_parts(cls, slots, selection)
    matched = match(slots, header, problems, selection)
    _check_copies(matched.copies, problems)
    generation = _generation_config(header.folder, problems)
    where = scales = None
    chosen = wanted or _stored_dtype(matched.plans)
    if not problems:
        where = plan_device_map(model, device, chosen.itemsize)
        scales = _scales((plan for plan in matched.plans if where.of(plan.slot.name).type != "meta"), problems)
    if where is None or scales is None or problems:
        raise CheckpointError(f"{path} does not fit {cls.__name__}:", problems)

    report = LoadingReport(Path(path), chosen, len(header.files), left_out=matched.left_out)
    _note_dtype(config, chosen, wanted, report)
    fill(matched.plans, iter(scales), chosen, where, weights, dtype_policy, report)
    if len({*where.layers, where.head}) > 1:
        model.set_device_map(where)
    for plan in matched.plans:
        _remember_dtype(plan)
    if selection.layers is not None:
        _number_layers(model, selection.layers)
    _finish(model, generation, report, where)
    if _stamp(header.folder) != before:
        raise CheckpointError(f"{path} was replaced by another checkpoint while it was loaded: load it again")
    return model


def _smaller(config: Config, selection: Selection) -> Config:
    """What the model will be: the layers and experts asked for, and nothing quantised any more."""
    config = selection.of_config(config)
    return config if config.quantization_config is None else config.replace(quantization_config=None)


def _check_depth(config: Config, header: Header) -> None:
    """Modules are made before names are compared: not for a layer count that no file of this size can have."""
    named = len(header.tensors) + len(header.lost) + len(header.unread)
    if config.text_config.num_hidden_layers > max(named, 1):
        raise CheckpointError(
            f"config.json says num_hidden_layers = {config.text_config.num_hidden_layers}, and {header.folder} names only "
            f"{named} tensors: they do not belong together"
        )


def _build(cls: type[nn.Module], config: Config, selection: Selection) -> Any:
    """The model on the meta device. A class with parts that can be had or not lists them in `optional_parts` and takes
    parts=, a set or None."""
    options: Any = {"parts": selection.parts} if selection.parts and getattr(cls, "optional_parts", ()) else {}
    with torch.device("meta"), _Uninitialised():
        return cls(config, **options)


def _check_parts(cls: type[nn.Module], slots: Iterable[Slot], selection: Selection) -> None:
    of = {inner: part for part, inners in PARTS.items() for inner in inners}
    held = {of[names.part_of(name)] for slot in slots for name in slot.names if names.canonical(name)}
    if selection.parts is not None and selection.parts != held:
        has = ", ".join(sorted(held))
        if lacking := sorted(selection.parts - held):
            raise ValueError(f"parts= names {', '.join(lacking)}, for which {cls.__name__} has no module; it has {has}")
        raise ValueError(f"parts= leaves out {', '.join(sorted(held - selection.parts))}, which {cls.__name__} always has")
    if MTP in held and isinstance(selection.experts, dict) and MTP not in selection.experts:
        raise ValueError(f"experts= has ids per layer and none for the MTP head: add {{{MTP!r}: ids}}")


def _number_layers(model: nn.Module, layers: tuple[int, ...]) -> None:
    """Named values and routing call the layers what the checkpoint calls them."""
    for module in model.modules():
        if hasattr(module, "source_layers"):
            module.__dict__["source_layers"] = layers


def _check_choices(**given: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, choices) in given.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}; it is one of {', '.join(map(repr, choices))}")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """None means: the dtype of the checkpoint."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in FLOATS.values():
        known = ", ".join(str(known).removeprefix("torch.") for known in FLOATS.values())
        raise ValueError(f"dtype={dtype!r}; it is 'auto' or one of {known}")
    return found


def _stamp(folder: Path) -> list[tuple[int, ...] | None]:
    """What changes when a new checkpoint takes the place of this one."""
    found: list[tuple[int, ...] | None] = []
    for name in (SINGLE, INDEX, CONFIG):
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _scales(plans: Iterable[Plan], problems: list[Problem]) -> list[Tensor]:
    """The factors of all block-FP8 reads in the order of the plans, in float32; those that are not finite are problems.

    One 16,384th of the weights' count, so that damage in them is told before memory is taken for the weights.
    """
    stored = [read.scale for plan in plans for read in plan.reads if read.scale is not None]
    found = read_scales([(scale.file, scale.offset, FLOATS[scale.dtype], scale.shape) for scale in stored])
    for scale, values in zip(stored, found, strict=True):
        if not math.isfinite(values.sum()) and (bad := (~values.isfinite()).nonzero().tolist()):
            row, column = bad[0]
            detail = f"{values[row, column].item()} for block [{row}, {column}], and {len(bad) - 1} more"
            problems.append(Problem("scale not finite", scale.name, detail))
    return found


def _stored_dtype(plans: Iterable[Plan]) -> torch.dtype:
    """What most of the stored numbers are, by bytes; islands and block-FP8 aside."""
    nbytes: Counter[torch.dtype] = Counter()
    for plan in plans:
        for read in plan.reads:
            if read.scale is None:
                nbytes[FLOATS[read.tensor.dtype]] += 0 if plan.slot.is_island else read.tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.get_default_dtype()


def _note_dtype(config: Config, chosen: torch.dtype, wanted: torch.dtype | None, report: LoadingReport) -> None:
    said = config.text_config.dtype
    if wanted is None and said is not None and said != str(chosen).removeprefix("torch."):
        report.notes.append(f'config.json says dtype {said}, most weights are {chosen}: kept (dtype="{said}" converts)')


def _check_copies(copies: Iterable[tuple[StoredTensor, StoredTensor]], problems: list[Problem]) -> None:
    """Tied weights that are stored twice must be equal: which of two different ones is meant, nobody can say."""
    for first, second in copies:
        if not _equal(first, second):
            detail = (
                f"differs from {first.name}, to which tie_word_embeddings=true ties it; "
                "pass config=config.replace(tie_word_embeddings=False) to load both"
            )
            problems.append(Problem("tied but different", second.name, detail))


def _equal(first: StoredTensor, second: StoredTensor, step: int = 2**24) -> bool:
    if first.shape != second.shape or first.dtype not in FLOATS or second.dtype not in FLOATS:
        return False
    a, b = FLOATS[first.dtype], FLOATS[second.dtype]
    with first.file.open("rb") as f, second.file.open("rb") as g:
        for at in range(0, first.numel, step):
            count = min(step, first.numel - at)
            f.seek(first.offset + at * a.itemsize)
            g.seek(second.offset + at * b.itemsize)
            x, y = f.read(count * a.itemsize), g.read(count * b.itemsize)
            if a == b and x == y:
                continue
            if a == b or not torch.equal(torch.frombuffer(bytearray(x), dtype=a).double(),
                                         torch.frombuffer(bytearray(y), dtype=b).double()):  # fmt: skip
                return False
    return True


def _config(header: Header) -> Config:
    problems: list[Problem] = []
    file = locate(header.folder, config_file(header).name, problems)
    if file is None:
        raise CheckpointError(f"{header.folder} has no configuration that can be read (or pass config=...):", problems)
    return Config.from_pretrained(file)


def _generation_config(folder: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The default settings of `generate`, where the checkpoint has some."""
    if not (folder / GENERATION_CONFIG).exists():
        return None
    file = locate(folder, GENERATION_CONFIG, problems)
    if file is None:
        return None
    with file.open("rb") as f:
        return parse_object(f.read(MAX_SETTINGS_BYTES), file.name, problems)


def _remember_dtype(plan: Plan) -> None:
    """The owner of an island writes it back as it was stored, where that loses nothing."""
    if plan.slot.is_island:
        owner: Any = plan.slot.places[0][0]
        owner.stored_dtypes[plan.slot.places[0][1]] = FLOATS[plan.reads[0].tensor.dtype]


def _finish(model: Any, generation: dict[str, Any] | None, report: LoadingReport, where: DeviceMap) -> None:
    model.eval()
    model.loading_report = report
    if report.read_ahead is not None:
        weakref.finalize(model, report.read_ahead.stop)
    if generation is not None:
        model.generation_config = generation
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta and where.of(name).type != "meta"]
    if left:
        raise AssertionError(f"{type(model).__name__} was left with meta tensors: {left[:5]}")
    if report.left_out or report.converted or report.notes:
        log.info("%s", report)
