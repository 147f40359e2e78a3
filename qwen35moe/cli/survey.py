"""What a checkpoint holds, part by part, from its headers alone: the facts behind `qwen35moe inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

# canonical names: the text model's parts by the first word that fits, in the order in which they are shown
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
_NO_PARAMETERS = ("_scale_inv", "_scale", "rotary_emb.inv_freq")  # stored beside the weights, not parameters
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Part:
    """What is stored of one part of the model. dtypes, nbytes: parameters and bytes by stored dtype (bytes with scales);
    experts: how they lie on disk; quantised: weights that have a scale."""

    name: str
    tensors: int = 0
    parameters: int = 0
    routed: int = 0  # of the parameters, those of routed experts
    quantised: int = 0
    nbytes: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    layouts: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Any, layout: str | None) -> None:
        self.tensors += 1
        self.nbytes[tensor.dtype] += tensor.nbytes
        if name.endswith(_NO_PARAMETERS):
            self.quantised += name.endswith("_scale_inv")
            return
        self.parameters += tensor.numel
        self.dtypes[tensor.dtype] += tensor.numel
        if layout is not None:
            self.routed += tensor.numel
            self.layouts.add(layout)

    def active(self, chosen: int, experts: int) -> int:
        """Parameters that one token uses: `chosen` of the `experts` routed experts and everything else."""
        return self.parameters - self.routed + (self.routed * chosen // experts if experts else 0)


def survey(folder: str, *, context: int = 4096, batch: int = 1) -> dict[str, Any]:
    """The facts that `inspect --json` prints. context, batch: for how many tokens of how many sequences memory is told."""
    from ..checkpoint.folder import config_file
    from ..checkpoint.headers import read_headers
    from ..config import Config
    from ..loading import find

    if context < 0 or batch < 1:
        raise ValueError(f"{context=} must be at least 0 and {batch=} at least 1")
    header = read_headers(find(folder))
    config = Config.from_pretrained(config_file(header))
    text = config.text_config
    stored, unknown = _by_name(header.tensors.values())
    found, strange = _parts(stored)
    parts = [_described(part, text.num_experts_per_tok, text.num_experts) for part in found]
    named = {part["name"]: part for part in parts}
    vision, mtp = _OTHER_PARTS["visual"] in named, _OTHER_PARTS["mtp"] in named
    missing, unexpected, wrong = _compared(config, stored, vision=vision, mtp=mtp)
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
        "bytes_by_dtype": dict(sum((part.nbytes for part in found), Counter()).most_common()),
        "parameters": sum(part["parameters"] for part in parts),
        "active_parameters": sum(part["active_parameters"] for part in parts),
        "active_text_parameters": sum(part["active_parameters"] for part in in_text),
        "described_parameters": config.num_parameters(vision=vision, mtp=mtp, lm_head=True),
        "parts": parts,
        "absent_parts": _absent(config, vision=vision, mtp=mtp),
        "memory": memory(config, found, context=context, batch=batch, vision=vision, mtp=mtp),
        "missing_tensors": missing,
        "unexpected_tensors": unexpected,
        "misshapen_tensors": wrong,
        "unknown_tensors": unknown + strange,
    }


def _by_name(tensors: Iterable[Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors by canonical name, and the names that have none or have that of another tensor."""
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
    """The parts that are there, in the order of the model, and the names that belong to none."""
    from ..checkpoint import names

    parts: dict[str, Part] = {}
    unknown: list[str] = []
    for name, tensor in stored.items():
        which = names.part_of(name)
        title = _OTHER_PARTS.get(which) or next((title for word, title in _TEXT_PARTS if word in name), None)
        if title is None:
            unknown.append(tensor.name)
            continue
        layout = None
        if ".mlp.experts." in name:
            layout = "grouped" if names.grouped_experts(name) else "per expert"
        parts.setdefault(title, Part(title)).add(name, tensor, layout)
    return [parts[title] for title in _ORDER if title in parts], unknown


def _described(part: Part, chosen: int, experts: int) -> dict[str, Any]:
    return {
        "name": part.name,
        "tensors": part.tensors,
        "parameters": part.parameters,
        "active_parameters": part.active(chosen, experts),
        "bytes": part.nbytes.total(),
        "bytes_by_dtype": dict(part.nbytes.most_common()),
        "dtypes": dict(part.dtypes.most_common()),
        "quantised_weights": part.quantised,
        "experts": " and ".join(sorted(part.layouts)) or None,
    }


def _absent(config: Any, *, vision: bool, mtp: bool) -> list[str]:
    """Parts that config.json describes and the files have not."""
    described = {"visual": config.vision_config is not None, "mtp": config.text_config.mtp_num_hidden_layers > 0}
    stored = {"visual": vision, "mtp": mtp}
    return [_OTHER_PARTS[part] for part in described if described[part] and not stored[part]]


def _compared(config: Any, stored: dict[str, Any], *, vision: bool, mtp: bool) -> tuple[list[str], list[str], list[str]]:
    """Names that config.json describes and the files have not, names it does not describe, and names of other shapes.

    Experts may lie in either layout, told for the decoder and the MTP head by which there is; a scale belongs to every
    FP8 weight and to no other.
    """
    from ..checkpoint import names, published

    def layout(part: str) -> str:
        single = any(names.part_of(name) == part and names.expert_of(name) for name in stored)
        return "per_expert" if single else "grouped"

    form = {"experts": layout("text"), "mtp_experts": layout("mtp")}
    if "per_expert" in form.values():
        published.check_experts(config, len(stored))
    shapes = config.tensor_shapes(vision=vision, mtp=mtp, **form)
    expected = {names.canonical(tensor.name) or tensor.name: tensor.shape for tensor in shapes}
    expected |= {
        name + published.SCALE: published.scale_shape(tensor.shape)
        for name, tensor in stored.items()
        if tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2
    }
    missing = [name for name in expected if name not in stored]
    known = {"lm_head.weight"} | expected.keys() if config.tie_word_embeddings else expected.keys()
    unexpected = [name for name in stored if name not in known and not name.endswith(names.COMPUTED)]
    wrong = [
        f"{name}: {list(stored[name].shape)}, described as {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    return missing, unexpected, wrong


def memory(
    config: Any, parts: Iterable[Part], *, context: int, batch: int, vision: bool = False, mtp: bool = False
) -> dict[str, Any]:
    """Bytes of a loaded text model and of its cache for `batch` sequences of `context` tokens. Activations are not in it.

    weights  text model and head, FP8 as bfloat16, A_log and its like in float32; other_weights: vision tower, MTP head
    kv       2 * batch * context * (key/value heads) * head_dim, for each attention layer
    state    batch * (H K V in float32 + (W - 1) channels of the convolution), for each Gated DeltaNet layer
    """
    from ..config.parameters import FP32_PARAMETERS

    text = config.text_config
    stored: Counter[str] = sum((part.dtypes for part in parts), Counter())
    most = stored.most_common(1)[0][0] if stored else "BF16"
    dtype = {"F64": "float64", "F32": "float32", "F16": "float16"}.get(most, "bfloat16")
    width, wide = _WIDTHS[dtype], max(4, _WIDTHS[dtype])

    def loaded(**kinds: bool) -> int:
        shapes = config.tensor_shapes(**kinds)
        return sum(prod(shape) * (wide if name.endswith(FP32_PARAMETERS) else width) for name, shape, _ in shapes)

    weights = loaded(vision=False)
    attention, delta = text.layer_types.count("full_attention"), text.layer_types.count("linear_attention")
    kv = 2 * attention * batch * context * text.num_key_value_heads * text.head_dim * width
    matrix = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim * wide
    state = delta * batch * (matrix + text.conv_dim * (text.linear_conv_kernel_dim - 1) * width)
    return {
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "weights": weights,
        "other_weights": loaded(vision=vision, mtp=mtp) - weights,
        "kv": kv,
        "state": state,
        "total": weights + kv + state,
    }
