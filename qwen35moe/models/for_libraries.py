"""Methods and attributes that other libraries ask a transformers model for: Trainer, peft, accelerate, lm-evaluation-harness.

A library that misses one of them raises, or does something more general in silence: without `loss_type`, for example, Trainer
counts the first label of every row, which no position predicts. `qwen35moe.compat.attributes` lists them with their tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe.backends.values import unbatched, values_known
from qwen35moe.compat import short
from qwen35moe.config import Config
from qwen35moe.models.packed_weights import refuse_packed
from qwen35moe.models.trainer import save_whole_checkpoints
from qwen35moe.modules.decoder import DecoderLayer
from qwen35moe.modules.hooks import device_of
from qwen35moe.ops.losses import IGNORE
from qwen35moe.ops.precision import wide_dtype

if TYPE_CHECKING:
    from qwen35moe.models.device_map import DeviceMap


class ForLibraries(nn.Module):
    """Base of `PretrainedModel`: embeddings, checkpointing of activations, counts, and constants with transformers' names."""

    config: Config
    config_class = Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("text",)
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    is_parallelizable = model_parallel = False
    is_loaded_in_8bit = is_loaded_in_4bit = is_quantized = False
    quantization_method = hf_quantizer = None
    model_tags: list[str] | None = None
    _is_stateful = True  # a DeltaNet state cannot be cut, as a KV cache can
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _tied_weights_keys: dict[str, str] = {}  # {name: name of the parameter that it shares when tied}
    _keep_in_fp32_modules = None
    device_map: DeviceMap | None = None  # None: everything is on one device

    def __init__(self) -> None:
        super().__init__()
        self.name_or_path = ""
        self.warnings_issued: dict[str, Any] = {}

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; None in a model without one."""
        return None

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """Shares the embedding with the output head where the configuration has tie_word_embeddings. The arguments exist in
        transformers' method of this name; they have no effect here."""

    # ---------------------------------------------------------------------------------------- what the model is

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; the model itself where it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """The device of the token embedding: where inputs go. Of weights that accelerate has offloaded, the device to which its
        hook brings them."""
        return device_of(self.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the token embedding."""
        return self.get_input_embeddings().weight.dtype

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """{name: name of the parameter that it shares}, of the parameters that are shared now."""
        named = dict(self.named_parameters(remove_duplicate=False))
        pairs = self._tied_weights_keys.items()
        return {name: other for name, other in pairs if name in named and named[name] is named.get(other)}

    @property
    def _keys_to_ignore_on_save(self) -> list[str] | None:
        """Names that a checkpoint of this model lacks, because they share another parameter."""
        return list(self.all_tied_weights_keys) or None

    @classmethod
    def can_generate(cls) -> bool:
        """Whether this class has a head."""
        return False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are, a tied head counted once. exclude_embeddings: without those of nn.Embedding (and so
        without a head that is tied to one)."""
        embeddings = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and not (exclude_embeddings and id(p) in embeddings)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: dict[str, Any]) -> int:
        """The number of tokens in the arguments of a forward."""
        tokens = input_dict.get(self.main_input_name)
        return tokens.numel() if isinstance(tokens, Tensor) else 0

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """6 tokens * parameters, as transformers estimates the operations of a training step. All experts count, although each
        token uses `num_experts_per_tok` of them: config.num_parameters(active=True) counts those."""
        return 6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Adds to `model_tags`, which libraries write into model cards."""
        tags = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *tags]))

    # ---------------------------------------------------------------------------------------- activation checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Stores only each layer's inputs for the backward and recomputes the rest; routing is not recomputed.

        gradient_checkpointing_kwargs: those of `torch.utils.checkpoint.checkpoint`. use_reentrant has no effect: the
        non-reentrant form runs, and the gradients are the same. every_n_layers: of every n-th decoder layer only.
        """
        _check_checkpointing(gradient_checkpointing_kwargs or {}, every_n_layers, offload)
        lists = [list(module) for module in self.modules() if isinstance(module, nn.ModuleList)]
        left_out = {id(layer) for layers in lists for index, layer in enumerate(layers) if index % every_n_layers}
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                skipped = isinstance(module, DecoderLayer) and id(module) in left_out
                module.__dict__["gradient_checkpointing"] = not skipped

    def gradient_checkpointing_disable(self) -> None:
        """Stores all activations for the backward again."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.__dict__["gradient_checkpointing"] = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """The newer name of `gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Makes the embedding's output require a gradient, which adapters on frozen weights may need. Once, however often it
        is called."""
        self.disable_input_require_grads()
        hook = self.get_input_embeddings().register_forward_hook(_require_grad)
        self.__dict__["_require_grads_hook"] = hook

    def disable_input_require_grads(self) -> None:
        """Reverts `enable_input_require_grads`."""
        hook = self.__dict__.pop("_require_grads_hook", None)
        if hook is not None:
            hook.remove()

    # ---------------------------------------------------------------------------------------- embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding; a tied head shares the new one. The vocabulary of the configuration follows.

        ValueError: another width than hidden_size.
        """
        old = self.get_input_embeddings()
        _check_rows(value, self.config.text_config.hidden_size, "the embedding")
        _replace(self, old, value)
        rows: Any = value.weight
        self._set_vocab_size(len(rows))
        self.tie_weights()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head. A head with weights of its own makes tie_word_embeddings false."""
        raise ValueError(f"{type(self).__name__} has no head")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Gives embedding and head new_num_tokens rows, rounded up to pad_to_multiple_of, and the configuration this size.

        The first rows keep their values. New rows are the mean of the old ones, so that the new tokens change the
        probabilities of the others as little as possible (Hewitt 2021), or normal(0, initializer_range) if not mean_resizing;
        transformers adds a noise of 1e-9 covariances to the mean. Optimizers and adapters have to be created afterwards.
        Returns the embedding.
        """
        embedding = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        refuse_packed(self, "resize_token_embeddings()")
        rows = embedding.weight.shape[0] if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of or 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"resize_token_embeddings({name}={short(value)}): give a whole number, 1 or more")
        rows += -rows % (pad_to_multiple_of or 1)
        head, tied = self.get_output_embeddings(), bool(self.all_tied_weights_keys)
        for module, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
            if module is not None and not _has_a_plain_weight(module, kind):
                raise ValueError(
                    f"resize_token_embeddings: this {type(module).__name__} has no plain weight of a {kind.__name__}: resize "
                    "before adapters, parametrizations or quantisation, or merge and remove them first"
                )
        std = None if mean_resizing else self.config.text_config.initializer_range
        if rows != embedding.weight.shape[0]:
            embedding.weight = _resized(embedding.weight, rows, std)
            embedding.num_embeddings = rows
            if embedding.padding_idx is not None and embedding.padding_idx >= rows:
                embedding.padding_idx = None
        if head is not None and tied:
            head.weight = embedding.weight
        elif head is not None and rows != head.weight.shape[0]:
            head.weight = _resized(head.weight, rows, std)
        if head is not None:
            if head.bias is not None and rows != len(head.bias):
                head.bias = _resized(head.bias, rows, std)
            head.out_features = rows
        self._set_vocab_size(rows)
        return embedding

    def _set_vocab_size(self, rows: int) -> None:
        if self.config.text_config.vocab_size != rows:
            self.config.text_config.vocab_size = rows

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replaces the decoder."""
        _replace(self, self.get_decoder(), decoder)

    def get_decoder(self) -> nn.Module:
        """The model without its head (and, in the multimodal class, without its tower)."""
        return self


class HeadForLibraries(ForLibraries):
    """The same of a model with a head."""

    lm_head: nn.Linear
    loss_type = "ForCausalLM"  # labels are shifted by the model: Trainer counts them accordingly
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    @property
    def accepts_loss_kwargs(self) -> bool:
        """That `forward` takes num_items_in_batch: Trainer then divides the sum of all micro-batches by all their labels.

        Trainer reads it once, when it gets a model: see `qwen35moe.models.trainer`.
        """
        save_whole_checkpoints(ForLibraries)
        return True

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None) to the loss of
        `forward`; can be assigned, for libraries that read it. `forward` does not read it."""
        return self.__dict__.get("_loss_function", causal_lm_loss)

    @loss_function.setter
    def loss_function(self, value: Callable[..., Tensor]) -> None:
        self.__dict__["_loss_function"] = value

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head. A head with weights of its own makes tie_word_embeddings false.

        ValueError: another width than hidden_size.
        """
        _check_rows(new_embeddings, self.config.text_config.hidden_size, "the head")
        self.lm_head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]
        if new_embeddings.weight is not self.get_input_embeddings().weight:
            self.config.tie_word_embeddings = False


def causal_lm_loss(
    logits: Tensor, labels: Tensor | None, vocab_size: int | None = None, num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE, shift_labels: Tensor | None = None,
) -> Tensor:
    """The next-token loss of logits [B, T, vocabulary]: the mean over labels [B, T], or their sum over num_items_in_batch.

    shift_labels [B, T]: the label of each position itself, instead of `labels`. The arguments are those of transformers'
    loss_function.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("loss_function needs labels, or shift_labels")
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    size = logits.shape[-1]
    if vocab_size not in (None, size):
        raise ValueError(f"vocab_size={short(vocab_size)}, and the logits have {size} columns")
    targets = shift_labels.to(logits.device).long().flatten()
    known = unbatched(targets)
    if known.is_cpu and values_known(known):  # elsewhere the check would wait for the device
        wrong = known[(known != ignore_index) & ((known < 0) | (known >= size))]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is not one of {size} tokens, nor ignore_index={ignore_index}")
    wide = logits.flatten(0, -2).to(wide_dtype(logits))
    if num_items_in_batch is None:
        return F.cross_entropy(wide, targets, ignore_index=ignore_index)
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _check_checkpointing(options: dict[str, Any], every_n_layers: int, offload: bool) -> None:
    """ValueError for what would change the computation and is not implemented."""
    neutral = {"use_reentrant": (True, False), "preserve_rng_state": (True,), "determinism_check": ("default",),
               "debug": (False,), "early_stop": (True,)}  # fmt: skip
    for name, value in options.items():
        if name not in neutral:
            raise ValueError(f"gradient checkpointing has no option {short(name)}; there are {', '.join(neutral)}")
        if value is not None and value not in neutral[name]:
            raise ValueError(f"gradient checkpointing with {name}={short(value)} is not supported: leave it out")
    if not isinstance(every_n_layers, int) or isinstance(every_n_layers, bool) or every_n_layers < 1:
        raise ValueError(f"every_n_layers={short(every_n_layers)}: give a whole number, 1 or more")
    if offload:
        raise ValueError("offload=True is not supported: use torch.autograd.graph.save_on_cpu() around the forward")


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def _check_rows(module: nn.Module, width: int, what: str) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(module).__name__
        raise ValueError(f"{what} must have a weight [vocabulary, hidden_size = {width}], this has {shape}")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
                return
    raise ValueError(f"{type(model).__name__} does not own its {type(old).__name__}: replace it in the model that does")


def _has_a_plain_weight(module: nn.Module, kind: type[nn.Module]) -> bool:
    if not isinstance(module, kind) or hasattr(module, "parametrizations"):
        return False
    weight: Any = module.weight
    return type(weight.data) is Tensor and weight.is_floating_point()


@torch.no_grad()
def _resized(old: Tensor, rows: int, std: float | None) -> nn.Parameter:
    """The first rows of `old`, and new ones: the mean of the old ones, or normal(0, std)."""
    kept = old[:rows]
    new = old.new_empty((rows - kept.shape[0], *old.shape[1:]))
    if std is None:
        new.copy_(old.to(wide_dtype(old)).mean(0).expand_as(new))
    else:
        new.normal_(0, std)
    return nn.Parameter(torch.cat([kept, new]), old.requires_grad)
