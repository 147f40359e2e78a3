"""Loads a checkpoint folder into a model on a device.

read the headers -> build the model on the meta device -> match names -> raise one error with all problems, or
-> give every parameter its memory: the mapped file itself, or new memory that the file is read into

No memory is allocated and no weight is read before the whole checkpoint is known to fit. On a CPU, a parameter whose bytes
on disk have the right form is not copied (`weights="map"`); the others, and all of them with `weights="copy"` or on a GPU,
are allocated once and filled in place, experts slice by slice, block-FP8 tile by tile.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen35moe.config import Config
from qwen35moe.models.device_map import DeviceMap, Devices, plan_device_map
from qwen35moe.models.packed_weights import pack_weights
from qwen35moe.ops.cpu.packed_weight import refusal

from . import names
from .assemble import Match, Plan, match
from .dtypes import FLOATS, checked_dtype, name_of
from .fill import fill
from .finite import not_finite
from .folder import CONFIG, GENERATION_CONFIG, MAX_SETTINGS_BYTES, config_of
from .headers import INDEX, SINGLE, Header, StoredTensor, read_headers, read_object
from .hub import folder_of
from .memory import forget
from .parameters import ModelParameter, parameters_of, parts_in
from .plausible import implausible
from .problems import CheckpointError, Problem, check_choice
from .report import LoadingReport
from .selection import MTP, PARTS, Experts, Selection
from .transfer import read_scales
from .unsupported import refuse_unsupported

log = logging.getLogger(__name__)


class _Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init for weights that are about to be replaced.

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
    ignore: str | Iterable[str] = (),
    check: bool = False,
) -> Any:
    """A model of class `cls` with the weights of the checkpoint in the folder `path`, in eval mode.

    path: a folder, or a name on the Hub (owner/name) at `revision`, a commit, tag or branch; see `hub.py`.
    dtype: "auto" is the dtype of most stored weights (block-FP8 aside); parameters kept in fp32 (A_log, ...) stay float32.
    device: a CPU, a GPU, or "meta", which checks the checkpoint and reads no weights; "auto" (all GPUs, or the CPU) or a
        list places whole layers on several devices, see `device_map.py`; every parameter is read straight to its own.
    config: used instead of config.json, for instance with another rope; always of the whole checkpoint.
    weights: "map" uses the files as memory on a CPU (copy on write, the files are never written), "copy" reads them into
        new memory: for a disk that will be removed, or files that another program overwrites in place. "packed" maps them and
        then packs them one by one, as `model.pack_weights()` does: for inference on a CPU.
    dtype_policy: "transformers" rounds the parameters kept in fp32 through `dtype`, the precision that transformers keeps.
    layers: numbers of the layers to load; they keep their order, and `model.source_layers` has their numbers.
    experts: ids for all layers, or {layer: ids} with the same number of ids in every layer, at least num_experts_per_tok.
        They become experts 0, 1, ... in this order; the router's rows follow.
    parts: a set of "text", "vision", "mtp"; by default those of the class.
    ignore: patterns of stored names that are left out, as if they were not stored: ["score.*"] for a classification head.
    check: also read every weight and report NaN and infinity.

    With layers, experts or parts only the selected bytes are read, other files may be missing, and `model.config`
    describes the smaller model.

    CheckpointError lists everything that is missing, unexpected, of a wrong shape or dtype, or damaged; ValueError names a
    number or part that the checkpoint or the class does not have. A warning names weights of an unlikely meaning
    (plausible.py).
    """
    check_choice("weights", weights, ("map", "copy", "packed"))
    check_choice("dtype_policy", dtype_policy, ("native", "transformers"))
    requested = checked_dtype(dtype, as_stored=("auto",))
    selection = Selection.of(layers, experts, parts)
    patterns = names.checked_patterns(ignore)
    wanted = _wanted(selection, patterns)
    path = folder_of(path, revision=revision, wanted=wanted)
    before = _stamp(path)
    try:
        model = _load(cls, path, requested, device, config, weights, dtype_policy, selection, patterns, check, wanted)
    except (CheckpointError, OSError):
        _check_unchanged(path, before)
        raise
    _check_unchanged(path, before)
    return model


def _load(
    cls: type[nn.Module], path: Path, requested: torch.dtype | None, device: Devices, config: Config | None, weights: str,
    policy: str, selection: Selection, ignore: Sequence[str], check: bool, wanted: Callable[[str], bool] | None,
) -> Any:
    """`load_model` after its arguments have been read."""
    problems: list[Problem] = []
    header, config = _open(path, config, wanted, problems)
    selection = selection.checked(config)
    model, matched = _matched(cls, config, header, selection, ignore, problems)
    generation = _generation_config(header.folder, problems)
    chosen = requested or _stored_dtype(matched.plans)
    device_map = scales = None
    if not problems:
        device_map = plan_device_map(model, device, chosen.itemsize)
        scales = _scales([plan for plan in matched.plans if device_map.of(plan.parameter.name).type != "meta"], problems)
        if check:
            problems += not_finite(read.tensor for plan in matched.plans for read in plan.reads)
    if device_map is None or scales is None or problems:
        raise CheckpointError(f"{path} does not fit {cls.__name__}:", problems)

    if weights == "packed":
        _check_packable(chosen, device_map)
    report = LoadingReport(Path(path), chosen, len(header.files), left_out=matched.left_out)
    _note_dtype(config, chosen, requested, report)
    _note_names(header, report)
    fill(matched.plans, iter(scales), chosen, device_map, weights, policy, report)
    _finish(model, matched.plans, selection, device_map)
    _note_meaning(matched.plans, scales, device_map, report)
    if weights == "packed":
        report.notes.append(str(pack_weights(model, forget)))
    _attach(model, generation, report)
    return model


def _check_packable(dtype: torch.dtype, device_map: DeviceMap) -> None:
    """ValueError, before weights are read, where they could not be packed."""
    other = next((device for device in (*device_map.layers, device_map.head) if device.type != "cpu"), None)
    reason = refusal(dtype) if other is None else f"weights are packed on a CPU, and some of this model are on {other}"
    if reason is not None:
        raise ValueError(f'weights="packed": {reason}')


def _wanted(selection: Selection, ignore: Sequence[str]) -> Callable[[str], bool] | None:
    """Whether a stored tensor may be needed; None if all are."""
    if selection.is_everything and not ignore:
        return None
    return lambda name: names.ignored_by(ignore, name) is None and selection.needs(name)


def _check_unchanged(path: Path, before: list[tuple[int, ...] | None]) -> None:
    """CheckpointError if another save has replaced the checkpoint, which also explains missing files."""
    if _stamp(path) != before:
        raise CheckpointError(f"{path} was replaced by another checkpoint while it was loaded: load it again")


# ------------------------------------------------------------------------------------------------------- what is loaded


def _open(
    path: Path, config: Config | None, wanted: Callable[[str], bool] | None, problems: list[Problem]
) -> tuple[Header, Config]:
    """The contents of the checkpoint and its configuration, if this library can read its format."""
    header = read_headers(path, problems, wanted)
    if problems and not header.tensors:
        raise CheckpointError(f"{path} cannot be read:", problems)
    config = config or config_of(header)
    refuse_unsupported(config, header)
    return header, config


def _matched(
    cls: type[nn.Module], config: Config, header: Header, selection: Selection, ignore: Sequence[str], problems: list[Problem]
) -> tuple[Any, Match]:
    """The (meta) model of the selection, and what fills it."""
    _check_depth(config, header)
    config = selection.of_config(config)
    if config.quantization_config is not None:  # the model is not quantised
        config = config.replace(quantization_config=None)
    model = build(cls, config, selection.parts)
    parameters = parameters_of(model)
    _check_parts(cls, parameters, selection)
    matched = match(parameters, header, problems, selection, ignore)
    _check_copies(matched.copies, problems)
    return model, matched


def _check_depth(config: Config, header: Header) -> None:
    """Modules are built before names are compared: refuse a layer count that these files cannot have."""
    count = len(header.tensors) + len(header.unreadable) + len(header.unread)
    if config.text_config.num_hidden_layers > max(count, 1):
        raise CheckpointError(
            f"config.json has num_hidden_layers = {config.text_config.num_hidden_layers}, but {header.folder} has only "
            f"{count} tensors: use the config.json of these weights"
        )


def build(cls: type[nn.Module], config: Config, parts: frozenset[str] | None) -> Any:
    """The model on the meta device. A class with optional parts lists them in `optional_parts` and takes parts=, a set
    or None."""
    options: Any = {"parts": parts} if parts and getattr(cls, "optional_parts", ()) else {}
    with torch.device("meta"), _Uninitialised():
        return cls(config, **options)


def _check_parts(cls: type[nn.Module], parameters: Iterable[ModelParameter], selection: Selection) -> None:
    part_by_prefix = {inner: part for part, inners in PARTS.items() for inner in inners}
    model_parts = {part_by_prefix[inner] for inner in parts_in(parameters)}
    if selection.parts is not None and selection.parts != model_parts:
        if lacking := sorted(selection.parts - model_parts):
            has = ", ".join(sorted(model_parts))
            raise ValueError(f"parts= names {', '.join(lacking)}, for which {cls.__name__} has no module; it has {has}")
        omitted = ", ".join(sorted(model_parts - selection.parts))
        raise ValueError(f"parts= leaves out {omitted}, which {cls.__name__} always has: add it")
    if MTP in model_parts and isinstance(selection.experts, dict) and MTP not in selection.experts:
        raise ValueError(f"experts= has ids per layer and none for the MTP head: add {{{MTP!r}: ids}}")


def _stamp(folder: Path) -> list[tuple[int, ...] | None]:
    """Values that change if another checkpoint replaces this one."""
    stamps: list[tuple[int, ...] | None] = []
    for name in (SINGLE, INDEX, CONFIG):
        try:
            status = (folder / name).stat()
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return stamps


def _generation_config(folder: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The checkpoint's default settings of `generate`, if it has any."""
    if not (folder / GENERATION_CONFIG).exists():
        return None
    return read_object(folder, GENERATION_CONFIG, MAX_SETTINGS_BYTES, problems)


# ---------------------------------------------------------------------------------------------------- dtypes and scales


def _scales(plans: Iterable[Plan], problems: list[Problem]) -> list[Tensor]:
    """The scales of all block-FP8 reads in the order of the plans, in float32; a scale that is not finite is a problem.

    They have one 16,384th of the weights' numbers, so damage in them is reported before memory is allocated for weights.
    """
    stored = [read.scale for plan in plans for read in plan.reads if read.scale is not None]
    scales = read_scales([(scale.file, scale.offset, FLOATS[scale.dtype], scale.shape) for scale in stored])
    for scale, values in zip(stored, scales, strict=True):
        if not math.isfinite(values.sum()) and (bad := (~values.isfinite()).nonzero().tolist()):
            row, column = bad[0]
            detail = f"{values[row, column].item()} for block [{row}, {column}], and {len(bad) - 1} more"
            problems.append(Problem("scale not finite", scale.name, detail))
    return scales


def _stored_dtype(plans: Iterable[Plan]) -> torch.dtype:
    """The dtype of most stored bytes; parameters kept in fp32 and block-FP8 do not count."""
    nbytes: Counter[torch.dtype] = Counter()
    for plan in plans:
        for read in plan.reads:
            if read.scale is None:
                nbytes[FLOATS[read.tensor.dtype]] += 0 if plan.parameter.is_fp32 else read.tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.get_default_dtype()


def _note_dtype(config: Config, chosen: torch.dtype, requested: torch.dtype | None, report: LoadingReport) -> None:
    configured = config.text_config.dtype
    if requested is None and configured is not None and configured != name_of(chosen):
        report.notes.append(
            f"config.json has dtype {configured}, most weights are {chosen}: loaded as {name_of(chosen)} "
            f'(dtype="{configured}" converts)'
        )


def _note_names(header: Header, report: LoadingReport) -> None:
    counts = Counter(wrapper for name in header.tensors if (wrapper := names.wrapper_of(name)) is not None)
    for wrapper, count in counts.items():
        report.notes.append(f"{count} names contain {wrapper!r}, which a wrapper of the saved model has added: it is removed")


def _note_meaning(plans: Iterable[Plan], scales: Iterable[Tensor], device_map: DeviceMap, report: LoadingReport) -> None:
    """Warn about weights that look as if they had another meaning."""
    if device_map.head.type == "meta":
        return
    stored = {plan.parameter.name: plan.whole for plan in plans}
    for sentence in implausible({name: tensor for name, tensor in stored.items() if tensor is not None}, scales):
        report.notes.append(f"warning: {sentence}")
        log.warning("%s: %s", report.path, sentence)


# ------------------------------------------------------------------------------------------------ tied weights on disk


def _check_copies(copies: Iterable[tuple[StoredTensor, StoredTensor]], problems: list[Problem]) -> None:
    """Tied weights that are stored twice must be equal: of two different ones, either may be the right one."""
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


# ------------------------------------------------------------------------------------------------------ the loaded model


def _finish(model: Any, plans: Iterable[Plan], selection: Selection, device_map: DeviceMap) -> None:
    """Set what modules need to know: devices, stored dtypes, layer numbers."""
    if len({*device_map.layers, device_map.head}) > 1:
        model.set_device_map(device_map)
    for plan in plans:
        if plan.parameter.is_fp32:  # its owner writes it back in the stored dtype if that loses nothing
            owner: Any
            owner, leaf = plan.parameter.owners[0]
            owner.stored_dtypes[leaf] = FLOATS[plan.reads[0].tensor.dtype]
    for module in model.modules():
        if selection.layers is not None and hasattr(module, "source_layers"):
            module.__dict__["source_layers"] = selection.layers  # named values and routing use the checkpoint's numbers
    model.eval()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta and device_map.of(name).type != "meta"]
    if left:
        raise AssertionError(f"{type(model).__name__} has meta tensors after loading: {left[:5]}")


def _attach(model: Any, generation: dict[str, Any] | None, report: LoadingReport) -> None:
    """Attach the report and the generation settings to the model."""
    model.loading_report = report
    if report.read_ahead is not None:
        weakref.finalize(model, report.read_ahead.stop)
    if generation is not None:
        model.generation_config = generation
    if report.left_out or report.converted or report.notes:
        log.info("%s", report)
