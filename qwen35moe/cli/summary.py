"""The contents of a checkpoint by part, computed from its headers: the data of `qwen35moe inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

# Parts of the text model: the first substring that a canonical name contains decides. In the order of the report.
_TEXT_PARTS = (
    (".linear_attn.", "Gated DeltaNet"),
    (".self_attn.", "attention"),
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_expert", "shared expert, router"),
    (".mlp.gate.", "shared expert, router"),
    (".mlp.", "MLP"),
    ("embed_tokens.", "embedding"),
    ("norm", "norms"),
)
_OTHER_PARTS = {"head": "output head", "visual": "vision tower", "mtp": "multi-token prediction"}
_ORDER = ("embedding", *dict.fromkeys(name for _, name in _TEXT_PARTS if name != "embedding"), *_OTHER_PARTS.values())
_NOT_PARAMETERS = ("_scale_inv", "_scale", "rotary_emb.inv_freq")  # stored tensors that are not parameters
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Part:
    """The stored tensors of one part of the model.

    dtypes, nbytes: parameters and bytes by stored dtype, bytes with the scales. quantised: the number of weights with a scale.
    layouts: of its routed experts, grouped or per expert.
    """

    name: str
    tensors: int = 0
    parameters: int = 0
    routed: int = 0  # parameters of routed experts
    quantised: int = 0
    nbytes: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    layouts: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Any, layout: str | None) -> None:
        """Count a tensor. layout: of a routed expert, else None."""
        self.tensors += 1
        self.nbytes[tensor.dtype] += tensor.nbytes
        if name.endswith(_NOT_PARAMETERS):
            self.quantised += name.endswith("_scale_inv")
            return
        self.parameters += tensor.numel
        self.dtypes[tensor.dtype] += tensor.numel
        if layout is not None:
            self.routed += tensor.numel
            self.layouts.add(layout)

    def active(self, top_k: int, experts: int) -> int:
        """Active parameters per token: `top_k` of the routed experts and everything else."""
        return self.parameters - self.routed + (self.routed * top_k // experts if experts else 0)


def summarize(
    folder: str, *, context: int = 4096, batch: int = 1, check: bool = False, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """The data that `inspect --json` prints. context, batch: tokens and sequences for the estimate of memory; check: read
    every weight; ignore: patterns of names that are left out."""
    from ..checkpoint.folder import config_of
    from ..checkpoint.headers import read_headers
    from ..checkpoint.names import ignored_by
    from ..loading import find

    if context < 0 or batch < 1:
        raise ValueError(f"{context=} must be at least 0 and {batch=} at least 1")
    header = read_headers(find(folder))
    config = config_of(header)
    text = config.text_config
    ignored = Counter(pattern for name in header.tensors if (pattern := ignored_by(ignore, name)) is not None)
    listed = [tensor for name, tensor in header.tensors.items() if ignored_by(ignore, name) is None]
    stored, unknown = _by_name(listed)
    model_parts, without_part = _parts(stored)
    parts = [_entry(part, text.num_experts_per_tok, text.num_experts) for part in model_parts]
    names = {part.name for part in model_parts}
    vision, mtp = _OTHER_PARTS["visual"] in names, _OTHER_PARTS["mtp"] in names
    missing, unexpected, misshapen = _compare(config, stored, vision=vision, mtp=mtp)
    in_text = [part for part in parts if part["name"] not in (_OTHER_PARTS["visual"], _OTHER_PARTS["mtp"])]
    return {
        "folder": str(header.folder),
        "model_type": config.model_type,
        "architectures": config.architectures,
        "layers": dict(Counter(text.layer_types)),
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.num_experts_per_tok if text.num_experts else 0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization": (config.quantization_config or {}).get("quant_method"),
        "quantised_weights": sum(part["quantised_weights"] for part in parts),
        "files": len(header.files),
        "tensors": len(header.tensors),
        "bytes": header.nbytes,
        "bytes_by_dtype": dict(sum((part.nbytes for part in model_parts), Counter()).most_common()),
        "parameters": sum(part["parameters"] for part in parts),
        "active_parameters": sum(part["active_parameters"] for part in parts),
        "active_text_parameters": sum(part["active_parameters"] for part in in_text),
        "described_parameters": config.num_parameters(vision=vision, mtp=mtp, lm_head=True),
        "parts": parts,
        "absent_parts": _absent(config, vision=vision, mtp=mtp),
        "memory": memory(config, model_parts, context=context, batch=batch, vision=vision, mtp=mtp),
        "missing_tensors": missing,
        "unexpected_tensors": unexpected,
        "misshapen_tensors": misshapen,
        "unknown_tensors": unknown + without_part,
        "ignored_tensors": dict(ignored),
        **(_checks(listed, stored) if check else {"not_finite": None, "implausible": []}),
    }


def _checks(tensors: Iterable[Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Problems that only the weights show, in sentences."""
    from ..checkpoint.dtypes import FLOATS
    from ..checkpoint.finite import not_finite
    from ..checkpoint.plausible import implausible
    from ..checkpoint.transfer import read_scales

    scales = [tensor for name, tensor in stored.items() if name.endswith("_scale_inv") and tensor.dtype in FLOATS][:64]
    read = read_scales([(scale.file, scale.offset, FLOATS[scale.dtype], scale.shape) for scale in scales])
    return {
        "not_finite": [f"{problem.subject}: {problem.detail}" for problem in not_finite(tensors)],
        "implausible": implausible(stored, read),
    }


def _by_name(tensors: Iterable[Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors by canonical name, and the names of tensors without one or with that of an earlier tensor."""
    from ..checkpoint import names

    stored: dict[str, Any] = {}
    unknown: list[str] = []
    for tensor in tensors:
        name = names.canonical(tensor.name)
        if name is None or name in stored:
            unknown.append(tensor.name)
        else:
            stored[name] = tensor
    return stored, unknown


def _parts(stored: dict[str, Any]) -> tuple[list[Part], list[str]]:
    """The stored parts, in the order of the model, and the names of tensors that belong to none."""
    from ..checkpoint import names

    parts: dict[str, Part] = {}
    unknown: list[str] = []
    for name, tensor in stored.items():
        title = _OTHER_PARTS.get(names.part_of(name)) or next((title for word, title in _TEXT_PARTS if word in name), None)
        if title is None:
            unknown.append(tensor.name)
            continue
        layout = None
        if ".mlp.experts." in name:
            layout = "grouped" if names.grouped_experts(name) else "per expert"
        parts.setdefault(title, Part(title)).add(name, tensor, layout)
    return [parts[title] for title in _ORDER if title in parts], unknown


def _entry(part: Part, top_k: int, experts: int) -> dict[str, Any]:
    """The data of one part."""
    return {
        "name": part.name,
        "tensors": part.tensors,
        "parameters": part.parameters,
        "active_parameters": part.active(top_k, experts),
        "bytes": part.nbytes.total(),
        "bytes_by_dtype": dict(part.nbytes.most_common()),
        "dtypes": dict(part.dtypes.most_common()),
        "quantised_weights": part.quantised,
        "experts": " and ".join(sorted(part.layouts)) or None,
    }


def _absent(config: Any, *, vision: bool, mtp: bool) -> list[str]:
    """The parts that config.json describes and the files lack."""
    described = {"visual": config.vision_config is not None, "mtp": config.text_config.mtp_num_hidden_layers > 0}
    stored = {"visual": vision, "mtp": mtp}
    return [_OTHER_PARTS[part] for part in described if described[part] and not stored[part]]


def _compare(config: Any, stored: dict[str, Any], *, vision: bool, mtp: bool) -> tuple[list[str], list[str], list[str]]:
    """Names that config.json describes and the files lack, stored names it does not describe, and names of other shapes.

    The layout of the experts follows the stored names, for the decoder and for the MTP head; every FP8 weight has a scale
    and no other weight has one.
    """
    from ..checkpoint import names, published

    def layout(part: str) -> str:
        per_expert = any(names.part_of(name) == part and names.expert_of(name) for name in stored)
        return "per_expert" if per_expert else "grouped"

    layouts = {"experts": layout("text"), "mtp_experts": layout("mtp")}
    if "per_expert" in layouts.values():
        published.check_experts(config, len(stored))
    shapes = config.tensor_shapes(vision=vision, mtp=mtp, **layouts)
    expected = {names.canonical(tensor.name) or tensor.name: tensor.shape for tensor in shapes}
    expected |= {
        name + published.SCALE: published.scale_shape(tensor.shape)
        for name, tensor in stored.items()
        if tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2
    }
    missing = [name for name in expected if name not in stored]
    allowed = {"lm_head.weight"} | expected.keys() if config.tie_word_embeddings else expected.keys()
    unexpected = [name for name in stored if name not in allowed and not name.endswith(names.COMPUTED)]
    misshapen = [
        f"{name}: {list(stored[name].shape)}, described as {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    return missing, unexpected, misshapen


def memory(
    config: Any, parts: Iterable[Part], *, context: int, batch: int, vision: bool = False, mtp: bool = False
) -> dict[str, Any]:
    """Bytes of a loaded text model and of its cache for `batch` sequences of `context` tokens, without activations.

    weights         text model and output head; FP8 becomes bfloat16, the parameters kept in float32 stay so
    other_weights   vision tower and MTP head
    kv              2 * batch * context * (key/value heads) * head_dim, per attention layer
    state           batch * (H K V in float32 + (W - 1) channels of the convolution), per Gated DeltaNet layer
    """
    from ..config.parameters import FP32_PARAMETERS

    text = config.text_config
    stored: Counter[str] = sum((part.dtypes for part in parts), Counter())
    most_common = stored.most_common(1)[0][0] if stored else "BF16"
    dtype = {"F64": "float64", "F32": "float32", "F16": "float16"}.get(most_common, "bfloat16")
    width, fp32_width = _WIDTHS[dtype], max(4, _WIDTHS[dtype])

    def nbytes(**parts: bool) -> int:
        shapes = config.tensor_shapes(**parts)
        return sum(prod(shape) * (fp32_width if name.endswith(FP32_PARAMETERS) else width) for name, shape, _ in shapes)

    weights = nbytes(vision=False)
    attention, delta = text.layer_types.count("full_attention"), text.layer_types.count("linear_attention")
    kv = 2 * attention * batch * context * text.num_key_value_heads * text.head_dim * width
    matrix = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim * fp32_width
    state = delta * batch * (matrix + text.conv_dim * (text.linear_conv_kernel_dim - 1) * width)
    return {
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "weights": weights,
        "other_weights": nbytes(vision=vision, mtp=mtp) - weights,
        "kv": kv,
        "state": state,
        "total": weights + kv + state,
    }
