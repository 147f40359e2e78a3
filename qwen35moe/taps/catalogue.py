"""The catalogue: every value that a paper gives a letter, with its one public name, shape and equation.

A name is the path of the module that computes the value, relative to the text model, followed by the value's own name;
N stands for a layer number. The letters of the shapes:

    B batch rows   T new tokens   P cached and new tokens   D model width   H value (or query) heads   G key heads
    K key width    V value width  C = 2*G*K + H*V           E experts       k experts per token (top-k)
    F expert width N = B*T        N*k (token, expert) assignments, ordered by expert

In the vision tower, below `visual`, D, H and K are the tower's own. In the equations x is the normalised input of a mixer or
feed-forward block and h the residual stream.

An alias is the name of the same value in another implementation's source: a module of transformers (its output) or a
variable of its forward, a node of llama.cpp's graph, a variable of vLLM. Where an alias is missing, it is not known or
that implementation does not materialise the value. Read in transformers 5.23.0 (models/qwen3_5_moe), llama.cpp
(src/models/qwen35moe.cpp at 02ebd8f7, delta-net-base.cpp at 156ce1c1, build_moe_ffn and build_attn_mha of
llama-graph.cpp) and vLLM (models/qwen3_next.py at 002d6073, layers/mamba/gdn_linear_attn.py at 0218d050, fused_moe).
Layouts differ: transformers puts heads before tokens in attention and channels before tokens in the convolution;
llama.cpp writes shapes innermost first, tiles the value heads instead of grouping them, and has kq_soft_max only without
flash attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One named value. `inputs` names the values it is computed from, `needs` an attribute that its module must have."""

    name: str
    shape: tuple[str, ...]
    equation: str
    inputs: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None

    @property
    def parent(self) -> str:
        """Path of the module that computes the value, "" for the text model itself."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The value's own name."""
        return self.name.rpartition(".")[2]


# Rows: leaf, shape, equation, inputs (siblings by leaf, others by full name), then the aliases in the order below.
_LIBRARIES = ("transformers", "llama.cpp", "vllm")
_Row = tuple[str, str, str, str, str, str, str]

_MODEL: tuple[_Row, ...] = (
    ("embed", "B T D", "h = W_embed[token]", "", "embed_tokens", "model.input_embed", "hidden_states"),
    ("norm", "B T D", "y = rms_norm(h) (1 + w)", "layers.N.output", "norm", "result_norm", "hidden_states"),
)
_LAYER: tuple[_Row, ...] = (
    ("input", "B T D", "h: embed, or the output of layer N-1", "embed layers.N.output", "layers.N (input)", "", ""),
    (
        "output",
        "B T D",
        "h' + mlp.output, with h' = h + mixer output",
        "input layers.N.linear_attn.output layers.N.self_attn.output layers.N.mlp.output",
        "layers.N (output)",
        "l_out",
        "",
    ),
)
_LINEAR_ATTN: tuple[_Row, ...] = (
    (
        "qkv",
        "B T C",
        "W_qkv x",
        "layers.N.input",
        "linear_attn.in_proj_qkv",
        "linear_attn_qkv_mixed",
        "mixed_qkv",
    ),
    (
        "conv",
        "B T C",
        "silu(sum_w W_conv[:, w] qkv[t - W + 1 + w])",
        "qkv",
        "mixed_qkv (after causal_conv1d_fn)",
        "conv_output_silu",
        "mixed_qkv_non_spec",
    ),
    ("query", "B T G K", "conv[:G*K], before the l2 norm", "conv", "query", "q_conv", "query_non_spec"),
    ("key", "B T G K", "conv[G*K:2*G*K], before the l2 norm", "conv", "key", "k_conv", "key_non_spec"),
    ("value", "B T H V", "conv[2*G*K:]", "conv", "value", "v_conv", "value_non_spec"),
    ("decay", "B T H", "g = -exp(A_log) softplus(W_a x + dt_bias) <= 0", "layers.N.input", "g", "gate", "g"),
    ("beta", "B T H", "sigmoid(W_b x)", "layers.N.input", "beta", "beta_sigmoid", "beta"),
    ("gate", "B T H V", "z = W_z x, before the silu", "layers.N.input", "linear_attn.in_proj_z", "z", "z"),
    (
        "state",
        "B H K V",
        "S_t = e^g_t S_(t-1) + k_t (beta_t (v_t - (e^g_t S_(t-1))^T k_t))^T after the last token, k l2-normalised",
        "query key value decay beta",
        "last_recurrent_state",
        "new_state",
        "last_recurrent_state",
    ),
    (
        "core",
        "B T H V",
        "o_t = S_t^T q_t / sqrt(K), q l2-normalised",
        "query key value decay beta",
        "core_attn_out (before linear_attn.norm)",
        "attn_output",
        "core_attn_out",
    ),
    (
        "scores",
        "B H T T",
        "A with core = A value + the read-out of the initial state, see ops.attention_map",
        "query key decay beta",
        "",
        "",
        "",
    ),
    ("normed", "B T H V", "rms_norm(core) w silu(gate)", "core gate", "linear_attn.norm", "final_output", ""),
    ("output", "B T D", "W_out normed", "normed", "linear_attn.out_proj", "linear_attn_out", "output"),
)
_SELF_ATTN: tuple[_Row, ...] = (
    (
        "query",
        "B T H K",
        "rotary(rms_norm(W_q x))",
        "layers.N.input",
        "query_states (after apply_rotary_pos_emb)",
        "Qcur",
        "q",
    ),
    (
        "key",
        "B T G K",
        "rotary(rms_norm(W_k x)), new tokens only",
        "layers.N.input",
        "key_states (after apply_rotary_pos_emb)",
        "Kcur",
        "k",
    ),
    ("value", "B T G V", "W_v x, new tokens only", "layers.N.input", "value_states", "Vcur", "v"),
    (
        "gate",
        "B T H V",
        "the gate rows of W_q x, before the sigmoid",
        "layers.N.input",
        "gate",
        "gate_reshaped",
        "gate",
    ),
    (
        "scores",
        "B H T P",
        "softmax(query key^T / sqrt(K)), over visible tokens",
        "query key",
        "attn_weights",
        "kq_soft_max",
        "",
    ),
    (
        "output",
        "B T D",
        "W_o (scores value * sigmoid(gate))",
        "query key value gate",
        "self_attn.o_proj",
        "attn_output",
        "output",
    ),
)
_MOE: tuple[_Row, ...] = (
    ("router_logits", "N E", "W_router x", "layers.N.input", "router_logits", "ffn_moe_logits", "router_logits"),
    (
        "indices",
        "N k",
        "top k experts of softmax(router_logits)",
        "router_logits",
        "router_indices",
        "ffn_moe_topk",
        "topk_ids",
    ),
    (
        "weights",
        "N k",
        "softmax(router_logits)[indices], divided by their sum",
        "router_logits indices",
        "router_scores",
        "ffn_moe_weights_norm",
        "topk_weights",
    ),
    (
        "expert_in",
        "N*k D",
        "x of each (token, expert) assignment, ordered by expert",
        "layers.N.input indices",
        "current_state",
        "",
        "",
    ),
    (
        "expert_act",
        "N*k F",
        "silu(W_gate x) * W_up x of the row's expert",
        "expert_in",
        "current_hidden_states (before down_proj)",
        "ffn_moe_swiglu",
        "",
    ),
    (
        "expert_out",
        "N*k D",
        "W_down expert_act, before the routing weight",
        "expert_act",
        "current_hidden_states (before top_k_weights)",
        "ffn_moe_down",
        "",
    ),
    (
        "routed",
        "N D",
        "sum_s weights[:, s] expert_out of the token's s-th expert",
        "expert_out weights",
        "mlp.experts",
        "ffn_moe_out",
        "",
    ),
    (
        "shared",
        "N D",
        "sigmoid(w_s x) * shared expert(x)",
        "layers.N.input",
        "shared_expert_output (after shared_expert_gate)",
        "ffn_shexp_gated",
        "",
    ),
)
_MLP: tuple[_Row, ...] = (
    (
        "output",
        "B T D",
        "routed + shared; dense: W_down (silu(W_gate x) * W_up x)",
        "routed shared",
        "mlp",
        "ffn_out",
        "",
    ),
)
_VISUAL: tuple[_Row, ...] = (
    ("embed", "patches D", "x = W_patch pixels + b + position embedding of the patch", "", "visual.blocks.0 (input)", "", ""),
    ("output", "visual_tokens D", "W_2 gelu(W_1 [norm(x) of m x m patches]), D of the decoder", "visual.blocks.N.output",
     "visual.merger", "", ""),
)
_VISUAL_BLOCK: tuple[_Row, ...] = (
    ("output", "patches D", "x' + mlp.output, with x' = x + attn.output", "attn.output mlp.output", "visual.blocks.N", "", ""),
)
_VISUAL_ATTN: tuple[_Row, ...] = (
    ("query", "patches H K", "rotary(W_q norm1(x)), by row and column", "visual.embed visual.blocks.N.output",
     "query_states (after apply_rotary_pos_emb_vision)", "", ""),
    ("key", "patches H K", "rotary(W_k norm1(x)), by row and column", "visual.embed visual.blocks.N.output",
     "key_states (after apply_rotary_pos_emb_vision)", "", ""),
    ("value", "patches H K", "W_v norm1(x)", "visual.embed visual.blocks.N.output", "value_states", "", ""),
    ("output", "patches D", "W_o softmax(query key^T / sqrt(K)) value, within the frame", "query key value",
     "visual.blocks.N.attn", "", ""),
)
_VISUAL_MLP: tuple[_Row, ...] = (
    ("output", "patches D", "W_2 gelu(W_1 norm2(x'))", "visual.blocks.N.attn.output", "visual.blocks.N.mlp", "", ""),
)


def _entries(parent: str, rows: tuple[_Row, ...], needs: str | None = None) -> Iterator[Entry]:
    def full(name: str) -> str:
        own = parent and (parent == "visual" or name != "embed") and not name.startswith(("layers.", "visual."))
        return f"{parent}.{name}" if own else name

    for leaf, shape, equation, inputs, *names in rows:
        aliases = {library: name for library, name in zip(_LIBRARIES, names, strict=True) if name}
        yield Entry(full(leaf), tuple(shape.split()), equation, tuple(map(full, inputs.split())), aliases, needs)


CATALOGUE: tuple[Entry, ...] = (
    *_entries("", _MODEL),
    *_entries("layers.N", _LAYER),
    *_entries("layers.N.linear_attn", _LINEAR_ATTN),
    *_entries("layers.N.self_attn", _SELF_ATTN),
    *_entries("layers.N.mlp", _MOE, needs="experts"),
    *_entries("layers.N.mlp", _MLP),
    *_entries("visual", _VISUAL),
    *_entries("visual.blocks.N", _VISUAL_BLOCK),
    *_entries("visual.blocks.N.attn", _VISUAL_ATTN),
    *_entries("visual.blocks.N.mlp", _VISUAL_MLP),
)
LEAVES = frozenset(entry.leaf for entry in CATALOGUE)


def catalogue() -> tuple[Entry, ...]:
    """Every named value: name, shape, equation, the values it is computed from, its names elsewhere. N: a layer number."""
    return CATALOGUE
