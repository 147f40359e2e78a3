"""Writes where.md, the table from equations to lines of code: `python docs/reference/where.py`.

An entry names a function (or `Class.method`) and, for one line of it, a fragment that occurs in exactly one of its statements.
The function may move to another file of the package. A name or fragment that is missing or ambiguous is an error.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qwen35moe"
PAGE = Path(__file__).with_name("where.md")
Definition = ast.FunctionDef | ast.ClassDef

HEAD = """# Where each equation is computed

Written by `python docs/reference/where.py`; do not edit. Letters as in [Notation](notation.md). Listed are definitions; the
faster forms in `ops/cpu/` and the kernels have the same contract and are tested against them.
"""


@dataclass(frozen=True)
class Line:
    """An equation and the line that computes it. `name` is "folder/file.py:function" where several files define it."""

    equation: str
    name: str
    fragment: str = ""


SECTIONS: dict[str, tuple[Line, ...]] = {
    "Decoder": (
        Line("h = embed(tokens)", "Qwen3_5MoeTextModel.embed", "self.embed_tokens("),
        Line("h' = h + mixer(rms_norm(h))", "DecoderLayer.forward", "run(self._mixer_of_norm"),
        Line("h = h' + mlp(rms_norm(h'))", "DecoderLayer.forward", "run(self.mlp, normed, router)"),
        Line("logits = W_head rms_norm(h)", "Qwen3_5MoeForCausalLM.predict", "logits_of(self.lm_head"),
        Line("dense mlp: W_down (silu(W_gate x) · W_up x)", "MLP.forward", "F.silu(project(self.gate_proj, x))"),
    ),
    "Norms": (
        Line("rms_norm: x / √(mean(x²) + ε) · (1 + w)", "ops/norm.py:rms_norm", "(1.0 + weight"),
        Line("gated_rms_norm: x / √(mean(x²) + ε) · w · silu(gate)", "ops/norm.py:gated_rms_norm", "F.silu(gate"),
        Line("unit length: x / √(Σ x² + 1e-6)", "l2_norm", "torch.rsqrt"),
    ),
    "Positions": (
        Line("angle per position of pair j: θ^(-2j/R)", "inverse_frequencies", "rope.rope_theta**exponent"),
        Line("YaRN: frequency / factor for slow pairs, a linear blend between", "_yarn", "plain / factor * slow"),
        Line("YaRN: scale of cos and sin, 0.1 ln(factor) + 1", "_yarn_temperature", "math.log(scale) + 1.0"),
        Line("M-RoPE: pair j uses height where j mod 3 = 1, width where j mod 3 = 2", "rotary_tables", "% 3 == axis"),
        Line("rotary: (x_j, x_{j+R/2}) turned by its angle", "ops/rope.py:_rotated", "first * cos - second * sin"),
        Line("an image: (p, p + row, p + column), then p + max(h, w)", "models/vision_positions.py:positions", "+ within"),
    ),
    "Gated Attention": (
        Line("q, gate = W_q x", "GatedAttention.forward", "project(self.q_proj, x)"),
        Line("softmax(q kᵀ / √K) over the visible keys", "attention_weights", ".softmax(-1)"),
        Line("which keys a query sees", "causal_mask", "key <= (starts"),
        Line("weights · v", "weighted_values", "torch.einsum"),
        Line("W_o (attention · σ(gate))", "GatedAttention.forward", "gate.sigmoid()"),
    ),
    "Gated DeltaNet": (
        Line("silu(Σ_w W_conv[:, w] · x_{t-W+1+w})", "ops/convolution.py:short_convolution", "for w in range(taps)"),
        Line("decay = -exp(A_log) · softplus(W_a x + dt_bias); β = σ(W_b x)", "decay_and_beta", "F.softplus("),
        Line("α_t S_{t-1}: forget", "ops/delta_rule.py:gated_delta_rule", "decay[:, t].exp()"),
        Line("(α_t S_{t-1})ᵀ k_t: recall", "ops/delta_rule.py:gated_delta_rule", 'torch.einsum("bhk,bhkv->bhv", k[:, t]'),
        Line("β_t (v_t - recalled): the correction", "ops/delta_rule.py:gated_delta_rule", "beta[:, t, :, None]"),
        Line("S_t = α_t S_{t-1} + k_t ⊗ correction", "ops/delta_rule.py:gated_delta_rule", "bhk,bhv->bhkv"),
        Line("o_t = S_tᵀ q_t / √K", "ops/delta_rule.py:gated_delta_rule", 'torch.einsum("bhk,bhkv->bhv", q[:, t]'),
        Line("one cached token, as one operation", "ops/decode_step.py:delta_net_step"),
        Line("attention map: o_i = Σ_j map_ij v_j", "attention_map", "_times_transform("),
    ),
    "Gated DeltaNet in chunks": (
        Line("d_ij = exp(decay_{j+1} + ... + decay_i)", "within_chunks", "decay_between = "),
        Line("a_ij = β_i d_ij (k_i · k_j), j < i", "within_chunks", "system = "),
        Line("x = (I + a)⁻¹ diag(β)", "within_chunks", "solve_triangular("),
        Line("u_i = Σ_j x_ij v_j", "within_chunks", "u = "),
        Line("y_i = Σ_j x_ij d_j0 k_j", "within_chunks", "y = einsum("),
        Line("p_ij = d_ij (q_i · k_j)", "within_chunks", "scores = "),
        Line("w_i = u_i - S_0ᵀ y_i", "across_chunk", "w = chunk.u"),
        Line("o_i = d_i0 S_0ᵀ q_i + Σ_j p_ij w_j", "across_chunk", "chunk.scores, w"),
        Line("S_M = d_M0 S_0 + Σ_j d_Mj k_j ⊗ w_j", "across_chunk", "chunk.k, w"),
        Line("the fast form on CPUs", "chunked_forward"),
        Line("its gradients", "chunked_backward"),
    ),
    "Mixture of experts": (
        Line("logits = W_router x", "ops/experts.py:router", "F.linear(hidden, weight)"),
        Line("p = softmax(logits), in float32", "router_choice", ".softmax(-1)"),
        Line("the k largest", "router_choice", ".topk("),
        Line("w = top_k(p) / Σ top_k(p)", "router_choice", "chosen.sum(-1"),
        Line("silu(gate_e x) · up_e x", "ops/experts.py:experts", ".chunk(2"),
        Line("Σ_j w_j expert_{e_j}(x)", "ops/experts.py:experts", "index_add"),
        Line("σ(w_s x)", "SparseMoeBlock.forward", "project(self.shared_expert_gate, rows)"),
        Line("+ σ(w_s x) · shared_expert(x)", "SparseMoeBlock.forward", "self.shared_expert(rows)"),
        Line("f_e: choices of expert e per token", "load_balancing_loss", "fractions = counts /"),
        Line("p_e: mean probability", "load_balancing_loss", "means = probabilities /"),
        Line("load-balancing loss: E · Σ_e f_e p_e", "load_balancing_loss", "loss = experts *"),
        Line("the same over parts of a batch", "LoadBalance._loss", "loss = "),
        Line("z-loss: mean (log Σ_e exp logits_e)²", "router_z_loss", ".logsumexp(-1)"),
        Line("loss + router_aux_loss_coef · load-balancing loss", "Qwen3_5MoeForCausalLM.predict", ".router_aux_loss_coef"),
    ),
    "Loss": (
        Line("labels shifted to their predictions", "shift_labels", "labels[:, 1:]"),
        Line("cross entropy: mean of -log softmax(logits)[label]", "ops/losses.py:cross_entropy", "F.cross_entropy("),
        Line("the same without the logits in memory", "chunked_linear_cross_entropy", "_summed(hidden, weight, labels.long())"),
    ),
    "Vision": (
        Line("W_patch pixels + b", "_Projection.forward", "ops.linear("),
        Line("learned table, interpolated to the grid", "interpolated", "_interpolated_axis(_interpolated_axis("),
        Line("angle of row and column: position · θ^(-2j/(K/2))", "vision_grid.py:rotation", "THETA **"),
        Line("softmax(q kᵀ / √K) within a frame", "ops/vision_attention.py:vision_attention", ".softmax(-1)"),
        Line("x' = x + attention(norm(x))", "VisionBlock._forward", "self.attn("),
        Line("x' + W_2 gelu(W_1 norm(x'))", "VisionBlock._forward", "self.mlp("),
        Line("gelu(W x + b)", "ops/gelu_linear.py:gelu_linear", "F.gelu("),
        Line("token = W_2 gelu(W_1 [norm(y_1), ..., norm(y_mm)])", "PatchMerger.forward", "project(self.linear_fc2, "),
    ),
    "Sampling": (
        Line("logits / temperature", "ops/sampling.py:temperature", "scaled = x / value"),
        Line("top-k", "ops/sampling.py:top_k", "masked_fill("),
        Line("top-p: the smallest set with probability ≥ p", "ops/sampling.py:top_p", "<= 1 - p"),
        Line("min-p: p_i ≥ p · max p", "ops/sampling.py:min_p", "probability.amax("),
        Line("repetition penalty", "ops/sampling.py:repetition_penalty", "x * penalty"),
        Line("presence penalty", "ops/sampling.py:presence_penalty", "torch.where(generated, x - penalty"),
        Line("the draw: first i with p_1 + ... + p_i > u", "ops/sampling.py:sample", "torch.searchsorted("),
    ),
}


def definitions(path: Path) -> Iterator[tuple[str, Definition]]:
    """(qualified name, node) of every function and class of a file."""
    pending: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text(encoding="utf-8")))]
    while pending:
        prefix, parent = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name, node
                pending.append((f"{prefix}{node.name}.", node))


def index() -> dict[str, list[tuple[Path, Definition]]]:
    """Every definition of the package by its qualified name."""
    known: dict[str, list[tuple[Path, Definition]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, node in definitions(path):
            known.setdefault(name, []).append((path, node))
    return known


def place(line: Line, known: dict[str, list[tuple[Path, Definition]]]) -> tuple[Path, int]:
    """File and line number of an entry; ValueError where they are not unique."""
    file, _, name = line.name.rpartition(":")
    nodes = [(path, node) for path, node in known.get(name, []) if path.as_posix().endswith(file)]
    if len(nodes) != 1:
        where = ", ".join(path.relative_to(ROOT).as_posix() for path, _ in nodes) or "no file"
        raise ValueError(f"{line.equation!r}: {line.name} is defined in {where}; correct its entry in docs/reference/where.py")
    (path, node), *_ = nodes
    if not line.fragment:
        return path, node.lineno
    source = path.read_text(encoding="utf-8").splitlines()
    body = node.body[1:] if ast.get_docstring(node) else node.body
    numbers = [n for n in range(body[0].lineno, node.end_lineno + 1) if line.fragment in source[n - 1]]
    if len(numbers) != 1:
        raise ValueError(
            f"{line.equation!r}: {line.fragment!r} is on {len(numbers)} lines of {line.name} "
            f"({path.relative_to(ROOT).as_posix()}:{node.lineno}); correct its entry in docs/reference/where.py"
        )
    return path, numbers[0]


def render() -> str:
    """The page; ValueError with every entry that is not found."""
    known, problems, parts = index(), [], [HEAD]
    for title, lines in SECTIONS.items():
        rows = [f"## {title}\n\n| equation | code | where |\n|---|---|---|"]
        for line in lines:
            try:
                path, number = place(line, known)
            except ValueError as error:
                problems.append(str(error))
                continue
            code = path.read_text(encoding="utf-8").splitlines()[number - 1].split("  # ")[0].strip().replace("|", "\\|")
            short, whole = path.relative_to(PACKAGE).as_posix(), path.relative_to(ROOT).as_posix()
            rows.append(f"| {line.equation} | `{code}` | [{short}:{number}](../../{whole}#L{number}) |")
        parts.append("\n".join(rows) + "\n")
    if problems:
        raise ValueError("\n".join(problems))
    return "\n".join(parts)


if __name__ == "__main__":
    try:
        PAGE.write_text(render(), encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))
