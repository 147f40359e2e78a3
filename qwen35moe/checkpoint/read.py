"""Loading: from a folder to a model on a device.

read the headers -> build the model on the meta device -> match names -> refuse, with everything that is wrong, or
-> give every parameter its memory: the mapped file itself, or fresh memory that the file is read into

Nothing is allocated and no weight is read before the whole checkpoint is known to fit. A parameter whose bytes lie on
disk as they are needed is not copied at all on a CPU (`weights="map"`); the others, and all of them with
`weights="copy"` or on a GPU, are allocated once and filled in place, experts slice by slice.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen35moe.config import Config

from .assemble import Match, Plan, Slot, match, slots_of
from .folder import CONFIG, GENERATION_CONFIG, config_file
from .headers import FLOATS, INDEX, SINGLE, Header, StoredTensor, locate, parse_object, read_headers
from .hub import folder_of
from .memory import Copy, ReadAhead, available_memory, map_file, new_memory, read_into, view_of
from .problems import CheckpointError, Problem

log = logging.getLogger(__name__)

MAX_SETTINGS_BYTES = 2**20  # of a generation_config.json; published ones have 202 bytes


@dataclass
class LoadingReport:
    """What a load did, kept as `model.loading_report`."""

    path: Path
    dtype: torch.dtype
    files: int = 0
    nbytes: int = 0  # of all parameters, as they are in memory
    mapped: int = 0  # parameters whose memory is the file
    copied: int = 0  # parameters that were read into memory
    stacked: int = 0  # parameters put together from tensors of single experts
    converted: dict[str, int] = field(default_factory=dict)  # "F32 -> bfloat16": how many
    left_out: dict[str, int] = field(default_factory=dict)  # "mtp.*": how many tensors the model has no place for
    unaligned: int = 0  # mapped parameters that do not start at a multiple of 64 bytes
    notes: list[str] = field(default_factory=list)
    read_ahead: ReadAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"read_ahead": None}  # a thread is neither copied nor pickled with its model

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.path}: {self.nbytes / 1e6:,.1f} MB of {dtype} from {self.files} file(s)",
            f"parameters: {self.mapped} mapped, {self.copied} copied, {self.stacked} stacked from single experts",
        ]
        lines += [f"converted: {how} ({count} parameters)" for how, count in self.converted.items()]
        lines += [f"left out: {what} ({count} tensors), no part of this class" for what, count in self.left_out.items()]
        return "\n".join([*lines, *self.notes])


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
    device: str | torch.device = "cpu",
    config: Config | None = None,
    weights: str = "map",
    dtype_policy: str = "native",
    revision: str | None = None,
) -> Any:
    """A model of class `cls` with the weights of the checkpoint in the folder `path`, in eval mode.

    path may be a name on the Hub (owner/name) as well, revision a commit, tag or branch of it; see `hub.py`.
    dtype: "auto" is the dtype most of the stored weights have; islands (A_log, ...) stay float32 in any case.
    device: a CPU, a GPU, or "meta", which checks the checkpoint and reads nothing.
    config: instead of config.json, for instance with another rope.
    weights: "map" uses the files themselves as memory on a CPU (copy on write, they are never written to), "copy" reads
        them into memory of its own: for a disk that goes away, or files that another program overwrites in place.
    dtype_policy: "transformers" rounds the islands through `dtype`, as transformers stores them; they stay float32
        parameters.

    CheckpointError lists everything that is missing, unexpected, of a wrong shape or dtype, or damaged.
    """
    _check_choices(weights=(weights, ("map", "copy")), dtype_policy=(dtype_policy, ("native", "transformers")))
    wanted, target = _dtype(dtype), _device(device)
    problems: list[Problem] = []
    path = folder_of(path, revision=revision)
    before = _stamp(path)
    header = read_headers(path, problems)
    if problems and not header.tensors:
        raise CheckpointError(f"{path} cannot be read:", problems)
    config = config or _config(header)
    _refuse_quantised(config, header)
    with torch.device("meta"), _Uninitialised():
        model = cls(config)
    slots = slots_of(model)
    matched = match(slots, header, problems)
    _check_copies(matched.copies, problems)
    generation = _generation_config(header.folder, problems)
    if problems:
        raise CheckpointError(f"{path} does not fit {cls.__name__}:", problems)

    chosen = wanted or _stored_dtype(matched.plans)
    report = LoadingReport(Path(path), chosen, len(header.files), left_out=matched.left_out)
    _note_dtype(config, chosen, wanted, report)
    if target.type == "meta":
        for slot in slots:
            _install(slot, slot.parameter.to(slot.dtype_in(chosen)))
    else:
        _fill(matched, chosen, target, weights, dtype_policy, report)
    for plan in matched.plans:
        _remember_dtype(plan)
    _finish(model, generation, report)
    if _stamp(header.folder) != before:
        raise CheckpointError(f"{path} was replaced by another checkpoint while it was loaded: load it again")
    return model


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


def _device(device: str | torch.device) -> torch.device:
    """With its index: the threads that read have a current device of their own."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _refuse_quantised(config: Config, header: Header) -> None:
    quantised = config.quantization_config
    if not quantised:
        return
    method = quantised.get("quant_method")
    raise CheckpointError(
        f"{header.folder} is quantised (quantization_config: quant_method={method!r}). Reading block-FP8 comes later; "
        f"supported are weights stored as {', '.join(FLOATS)}: take the unquantised repository of this model"
    )


def _stored_dtype(plans: Iterable[Plan]) -> torch.dtype:
    """What most of the stored numbers are, by bytes and islands aside."""
    nbytes: Counter[torch.dtype] = Counter()
    for plan in plans:
        for read in plan.reads:
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
    if first.shape != second.shape or second.dtype not in FLOATS:
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


def _fill(
    matched: Match, dtype: torch.dtype, device: torch.device, weights: str, policy: str, report: LoadingReport
) -> None:
    """Give every parameter its memory, and the model the parameters."""
    mappings: dict[Path, Any] = {}
    copies: list[Copy] = []
    used: list[StoredTensor] = []
    for plan in matched.plans:
        slot, kind = plan.slot, plan.slot.dtype_in(dtype)
        through = dtype if policy == "transformers" and slot.is_island and kind != dtype else None
        report.nbytes += slot.parameter.numel() * kind.itemsize
        source = plan.whole
        if device.type == "cpu" and weights == "map" and source is not None and _is_as_needed(source, kind, through):
            mapped = mappings.get(source.file) or mappings.setdefault(source.file, map_file(source.file))
            _install(slot, view_of(mapped, source.offset, slot.shape, kind))
            report.mapped += 1
            report.unaligned += source.offset % 64 != 0
            used.append(source)
            continue
        value = new_memory(slot.shape, kind, device)
        flat = value.view(-1)
        for tensor, at in ((read.tensor, read.at) for read in plan.reads):
            stored = FLOATS[tensor.dtype]
            copies.append(Copy(tensor.file, tensor.offset, stored, flat[at : at + tensor.numel], through))
        _install(slot, value)
        _count(plan, kind, report)
    read_into(sorted(copies, key=lambda copy: (copy.file, copy.offset)), device)
    report.read_ahead = _read_ahead(used)


def _is_as_needed(tensor: StoredTensor, dtype: torch.dtype, through: torch.dtype | None) -> bool:
    """Whether the bytes on disk can serve as the parameter's memory.

    A header whose length is no multiple of the element size puts every tensor at an address that no element may have.
    """
    return FLOATS[tensor.dtype] == dtype and through is None and tensor.offset % dtype.itemsize == 0


def _count(plan: Plan, dtype: torch.dtype, report: LoadingReport) -> None:
    report.stacked += len(plan.reads) > 1
    stored = {read.tensor.dtype for read in plan.reads if FLOATS[read.tensor.dtype] != dtype}
    report.copied += len(plan.reads) == 1
    for name in () if plan.slot.is_island else stored:  # an island is widened in every model whose file has bf16
        how = f"{name} -> {str(dtype).removeprefix('torch.')}"
        report.converted[how] = report.converted.get(how, 0) + 1


def _install(slot: Slot, value: Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=slot.parameter.requires_grad)
    for module, leaf in slot.places:
        module._parameters[leaf] = parameter


def _remember_dtype(plan: Plan) -> None:
    """The owner of an island writes it back as it was stored, where that loses nothing."""
    if plan.slot.is_island:
        owner: Any = plan.slot.places[0][0]
        owner.stored_dtypes[plan.slot.places[0][1]] = FLOATS[plan.reads[0].tensor.dtype]


def _read_ahead(used: list[StoredTensor]) -> ReadAhead | None:
    """Start fetching the mapped weights in the order of the model, which is the order in which a forward needs them.

    The embedding is first although a prompt reads few of its rows: fetching these one by one behind everything else that
    is requested takes longer than the whole (512 rows: 1.9 s against 1.0 s).
    """
    total = sum(tensor.nbytes for tensor in used)
    if not used or not ReadAhead.possible() or total > 0.8 * available_memory():
        return None  # what does not fit would push out what was fetched before
    return ReadAhead([(t.file, t.offset, t.offset + t.nbytes) for t in used if t.nbytes]).start()


def _finish(model: Any, generation: dict[str, Any] | None, report: LoadingReport) -> None:
    model.eval()
    model.loading_report = report
    if report.read_ahead is not None:
        weakref.finalize(model, report.read_ahead.stop)
    if generation is not None:
        model.generation_config = generation
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left and report.nbytes:
        raise AssertionError(f"{type(model).__name__} was left with meta tensors: {left[:5]}")
    if report.left_out or report.converted or report.notes:
        log.info("%s", report)
