"""The fields of the decoder on the configuration of a whole model: config.hidden_size is config.text_config.hidden_size."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class OfText(Generic[T]):
    """A field of text_config, read through the whole configuration."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.__doc__ = f"text_config.{name}."

    @overload
    def __get__(self, instance: None, owner: type) -> OfText[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        text = instance.__dict__.get("text_config")  # absent while an object is copied or unpickled
        if text is None:
            raise AttributeError(self.name)
        return getattr(text, self.name)


class AssignedText(OfText[T]):
    """The same for a field that may be assigned."""

    def __set__(self, instance: Any, value: T | None) -> None:
        setattr(instance.text_config, self.name, value)


class TextFields:
    """Every field of `TextConfig` but model_type and tie_word_embeddings, which `Config` has itself."""

    vocab_size = AssignedText[int]()
    hidden_size = OfText[int]()
    num_hidden_layers = OfText[int]()
    layer_types = OfText[tuple[str, ...]]()
    full_attention_interval = OfText["int | None"]()
    rms_norm_eps = OfText[float]()
    hidden_act = OfText[str]()

    num_attention_heads = OfText[int]()
    num_key_value_heads = OfText[int]()
    head_dim = OfText[int]()
    attention_bias = OfText[bool]()
    attention_dropout = OfText[float]()
    rope_parameters = OfText[dict[str, Any]]()
    max_position_embeddings = OfText[int]()

    linear_num_key_heads = OfText[int]()
    linear_num_value_heads = OfText[int]()
    linear_key_head_dim = OfText[int]()
    linear_value_head_dim = OfText[int]()
    linear_conv_kernel_dim = OfText[int]()

    num_experts = OfText[int]()
    num_experts_per_tok = OfText[int]()
    moe_intermediate_size = OfText[int]()
    shared_expert_intermediate_size = OfText[int]()
    intermediate_size = OfText["int | None"]()
    router_aux_loss_coef = AssignedText[float]()
    router_aux_loss_per_layer = AssignedText[bool]()
    output_router_logits = AssignedText[bool]()

    mtp_num_hidden_layers = OfText[int]()
    initializer_range = AssignedText[float]()
    dtype = AssignedText["str | None"]()
    use_cache = AssignedText[bool]()
    bos_token_id = AssignedText["int | list[int] | None"]()
    eos_token_id = AssignedText["int | list[int] | None"]()
    pad_token_id = AssignedText["int | list[int] | None"]()
