"""The vision tower: against a brute-force float64 oracle, in bf16 beside transformers, and everything it refuses."""

from __future__ import annotations

import functools
import math
import re
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends, taps
from qwen35moe.config import ConfigError, VisionConfig
from qwen35moe.modules.vision import Qwen3_5MoeVisionModel
from qwen35moe.ops.vision_grid import as_grids, coordinates, frame_bounds, interpolated, rotation, tokens_of
from tests.support import peer, peer_vision
from tests.support.peer import assert_all_close, assert_close

SIZES = {"depth": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 29, "patch_size": 3, "temporal_patch_size": 2,
         "in_channels": 3, "spatial_merge_size": 2, "num_position_embeddings": 25, "out_hidden_size": 10}
GRIDS = [(1, 4, 6), (3, 2, 8), (1, 12, 2), (2, 6, 4)]


def tower(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = Qwen3_5MoeVisionModel(VisionConfig(**SIZES | sizes)).eval()
    holder = torch.nn.Module()
    holder.visual = model
    peer_vision.draw(holder, seed)
    return model.to(dtype)


def pixels(grids: list[tuple[int, int, int]], config: Any, seed: int = 1) -> Tensor:
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.randn(sum(math.prod(g) for g in grids), width, generator=peer.generator(seed))


# ---------------------------------------------------------------------------------------------------------- the oracle


def places(grids: list[tuple[int, int, int]], m: int) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every patch, frames counted through, by four loops."""
    found, frame = [], 0
    for t, h, w in grids:
        for _ in range(t):
            for top in range(0, h, m):
                for left in range(0, w, m):
                    found += [(frame, top + i, left + j) for i in range(m) for j in range(m)]
            frame += 1
    return found


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """One head's query or key [K]: complex numbers (x_j, x_{j + K/2}), half of them turned by the row, half by the column."""
    half, quarter = x.shape[0] // 2, x.shape[0] // 4
    z = torch.complex(x[:half], x[half:])
    for j in range(half):
        angle = (row if j < quarter else column) * 10_000 ** (-(j % quarter) / quarter)
        z[j] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([z.real, z.imag])


Grids = list[tuple[int, int, int]]


def oracle(weights: dict[str, Tensor], config: Any, patches: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
    """Hidden states and tokens in float64, from the weights alone: convolution, torch's own resampling, loops, masks."""
    w = {name: value.double() for name, value in weights.items()}
    m, heads, patches = config.spatial_merge_size, config.num_heads, patches.double()
    where, size = places(grids, m), config.patch_size
    blocks = patches.view(-1, config.in_channels, config.temporal_patch_size, size, size)
    x = F.conv3d(blocks, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]).flatten(1)
    side = math.isqrt(config.num_position_embeddings)
    table = w["pos_embed.weight"].view(1, side, side, -1).permute(0, 3, 1, 2)
    frames = [(h, v) for t, h, v in grids for _ in range(t)]
    maps = [F.interpolate(table, size=frame, mode="bilinear", align_corners=True)[0] for frame in frames]
    x = x + torch.stack([maps[frame][:, row, column] for frame, row, column in where])
    seen = torch.tensor([[a[0] == b[0] for b in where] for a in where])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    for block in range(config.depth):
        p = f"blocks.{block}"
        q, k, v = linear(f"{p}.attn.qkv", norm(f"{p}.norm1", x)).view(len(x), 3, heads, -1).unbind(1)
        q, k = (torch.stack([torch.stack([turned(y[n, h], *where[n][1:]) for h in range(heads)]) for n in range(len(x))])
                for y in (q, k))
        scores = torch.einsum("nhk,mhk->hnm", q, k) / q.shape[-1] ** 0.5
        weights_ = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + linear(f"{p}.attn.proj", torch.einsum("hnm,mhk->nhk", weights_, v).flatten(1))
        inner = linear(f"{p}.mlp.linear_fc1", norm(f"{p}.norm2", x))
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(f"{p}.mlp.linear_fc2", inner)
    merged = linear("merger.linear_fc1", norm("merger.norm", x).view(-1, m * m * x.shape[1]))
    return x, linear("merger.linear_fc2", 0.5 * merged * (1 + torch.erf(merged / math.sqrt(2))))


ODD: list[tuple[dict[str, Any], list[tuple[int, int, int]]]] = [
    ({}, GRIDS),
    ({"spatial_merge_size": 1}, [(1, 1, 7), (2, 5, 1), (1, 3, 2), (3, 1, 1)]),
    ({"spatial_merge_size": 3, "in_channels": 1, "num_position_embeddings": 4}, [(2, 3, 9), (1, 6, 3)]),
    ({"temporal_patch_size": 1, "num_heads": 1, "hidden_size": 20, "num_position_embeddings": 1}, [(1, 2, 2), (1, 2, 14)]),
    ({"num_heads": 2, "hidden_size": 16, "depth": 3, "num_position_embeddings": 64}, [(1, 20, 2), (1, 2, 4), (4, 2, 2)]),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_the_tower_is_the_oracle(number):
    """float64 to 1e-12, float32 to 1e-5: odd grids, merge 1 to 3, one row or column, one channel, tables of one side."""
    sizes, grids = ODD[number]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = tower(number, dtype, **sizes)
        x = pixels(grids, model.config)
        hidden, tokens = oracle(model.state_dict(), model.config, x.to(dtype), grids)
        with torch.no_grad():
            found = model(x.to(dtype), torch.tensor(grids))
        assert_close(found.last_hidden_state, hidden, bound, "hidden states")
        assert_close(torch.cat(found.pooler_output), tokens, bound, "tokens")
        assert [len(part) for part in found.pooler_output] == tokens_of(grids, model.config.spatial_merge_size)


def test_pictures_do_not_see_each_other():
    """Each item alone gives what it gives among others, and each frame of a video too, bit for bit or nearly."""
    model = tower()
    x = pixels(GRIDS, model.config)
    with torch.no_grad():
        together = model(x, torch.tensor(GRIDS)).pooler_output
        for part, grid, found in zip(x.split([math.prod(g) for g in GRIDS]), GRIDS, together, strict=True):
            assert_close(model(part, torch.tensor([grid])).pooler_output[0], found, 1e-6)
            t, h, w = grid
            frames = [model(frame, torch.tensor([[1, h, w]])).pooler_output[0] for frame in part.chunk(t)]
            assert_close(torch.cat(frames), found, 1e-6)


def test_where_patches_lie():
    for grids, m in ((GRIDS, 2), ([(1, 1, 7), (2, 5, 1)], 1), ([(2, 3, 9)], 3)):
        where = torch.tensor(places(grids, m))
        assert torch.equal(coordinates(grids, m), where[:, 1:].T)
        frame = torch.bucketize(torch.arange(len(where)), frame_bounds(grids)[1:].long(), right=True)
        assert torch.equal(frame, where[:, 0])
    cos, sin = rotation(coordinates([(1, 4, 6)], 2), 12, torch.float64)
    one = torch.randn(12, dtype=torch.float64)
    for n, (_, row, column) in enumerate(places([(1, 4, 6)], 2)):
        query, _ = backends.run("rotary", one.view(1, 1, 1, -1), one.view(1, 1, 1, -1), cos[:, n : n + 1], sin[:, n : n + 1])
        assert_close(query.flatten(), turned(one, row, column), 1e-14)


def test_the_table_is_read_by_its_corners_and_learns():
    table = torch.randn(25, 3, dtype=torch.float64, requires_grad=True)
    grid = [(1, 6, 4)]
    picture = interpolated(table, grid, 1).view(6, 4, 3)
    for row, column, entry in ((0, 0, 0), (0, 3, 4), (5, 0, 20), (5, 3, 24)):
        assert torch.equal(picture[row, column], table[entry])
    assert torch.autograd.gradcheck(lambda t: interpolated(t, [(1, 6, 4), (2, 2, 2)], 2), (table,))
    assert interpolated(table.bfloat16(), grid, 1).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- bfloat16


def bf16_errors(attention: str = "eager", form: str = "auto") -> list[tuple[float, float]]:
    """Of tokens: ours and transformers' bf16 towers against our float64 one (the oracle's equal) of the same weights.
    attention, form: theirs and ours."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

    found = []
    for seed in range(12):
        sizes = {"depth": 4, "hidden_size": 48, "num_heads": 2, "out_hidden_size": 31, "num_position_embeddings": 49}
        model = tower(seed, torch.bfloat16, **sizes)
        config = Qwen3_5MoeVisionConfig(**SIZES | sizes)
        config._attn_implementation = attention
        theirs = modeling.Qwen3_5MoeVisionModel(config).eval()
        peer.to_bfloat16(theirs).load_state_dict(model.state_dict())
        x = pixels(GRIDS, model.config, seed).bfloat16()
        exact = tower(seed, torch.float64, **sizes)
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            truth = torch.cat(exact(x.double(), torch.tensor(GRIDS)).pooler_output)
            with backends.use(vision_attention=form):
                mine = torch.cat(model(x, torch.tensor(GRIDS)).pooler_output)
            other = theirs(x, grid_thw=torch.tensor(GRIDS)).pooler_output
        found.append(tuple((side.double() - truth).norm().item() / truth.norm().item() for side in (mine, other)))
    return found


def test_bf16_is_no_further_from_the_truth_than_transformers():
    errors = bf16_errors()
    assert all(mine <= 0.9 * other for mine, other in errors), errors  # its stream is not rounded after every sum


# ------------------------------------------------------------------------------------------------------ attention forms


@functools.cache
def attention_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 900, 3, 20, generator=peer.generator(2), dtype=torch.float64).to(dtype)
    return q, k, v


BOUNDS = {"one frame": [0, 900], "equal frames": [*range(0, 901, 90)], "odd frames": [0, 7, 7, 300, 301, 900]}


def rounding_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """transformers' eager attention: softmax in float32 of scores in the dtype of the inputs."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import eager_attention_forward

    module: Any = types.SimpleNamespace(num_key_value_groups=1, training=False)
    return eager_attention_forward(module, q, k, v, None, scaling=scale)[0].transpose(1, 2)


@pytest.mark.parametrize("name", BOUNDS)
def test_every_form_of_vision_attention(name):
    """Against the definition in float64; in bf16 no form is further from it than fused attention frame by frame, and the
    one that rounds its scores at three quarters of the distance of transformers' eager attention, which rounds them too."""
    bounds = torch.tensor(BOUNDS[name], dtype=torch.int32)
    truth = backends.run("vision_attention", *attention_inputs(torch.float64), cu_seqlens=bounds, scale=0.3)
    frames = [[x[a:b].transpose(0, 1)[None] for x in attention_inputs(torch.bfloat16)]
              for a, b in zip(BOUNDS[name], BOUNDS[name][1:], strict=False) if b > a]
    plain = torch.cat([F.scaled_dot_product_attention(*x, scale=0.3)[0].transpose(0, 1) for x in frames])
    eager = torch.cat([rounding_attention(*x, 0.3)[0].transpose(0, 1) for x in frames])
    limits = {"bf16_scores": 0.75 * (eager.double() - truth).norm()}
    limit = (plain.double() - truth).norm()
    for form in [entry.name for entry in backends.implementations("vision_attention") if not entry.missing]:
        with torch.no_grad(), backends.use(vision_attention=form):
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
                run = functools.partial(backends.run, "vision_attention", cu_seqlens=bounds, scale=0.3)
                try:
                    found = run(*attention_inputs(dtype))
                except ValueError as refused:
                    assert "cannot run" in str(refused)
                    continue
                assert_close(found, truth, bound, form)
            found = run(*attention_inputs(torch.bfloat16))
            assert found.dtype == torch.bfloat16 and (found.double() - truth).norm() <= limits.get(form, 1.25 * limit), form


def test_scores_are_rounded_where_that_is_fast_and_they_are_small(monkeypatch):
    q, k, v = attention_inputs(torch.bfloat16)
    bounds = {"all": torch.tensor([0, 900]), "few": torch.tensor([*range(0, 901, 90)])}
    run = functools.partial(backends.run, "vision_attention", scale=0.3)

    def took(query: Tensor, frames: str = "all") -> str:
        with torch.no_grad(), backends.ran() as ran:
            run(query, k, v, cu_seqlens=bounds[frames])
        return ran.calls[0].name

    for known, name in (((), "torch"), (("avx512_bf16", "amx_bf16"), "torch"), (("avx512_bf16",), "bf16_scores")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: dict.fromkeys(known, True), raising=False)
        assert took(q) == name
    assert took(100 * q) == took(q * math.nan) == took(q, "few") == "torch"
    refused = {"may reach [0-9]{4}, too large": 100 * q, "no backward": q.clone().requires_grad_(), "float32 on cpu": q.float()}
    for message, query in refused.items():
        with backends.use(vision_attention="bf16_scores"), pytest.raises(ValueError, match=message):
            run(query, k, v, cu_seqlens=bounds["all"])


@pytest.mark.parametrize(("spread", "missed"), [(1.4, False), (4, False), (12, False), (4, True)])
def test_rounding_scores_costs_no_more_where_they_are_large(spread, missed):
    """They are rounded as differences from about the largest of their row; rounded as they are, the error would grow. With
    large keys where no sample is taken it does, and stays below that of transformers' eager attention."""
    q, k, v = attention_inputs(torch.float64)
    k[1::8] *= 4 if missed else 1
    q = (q * spread / (q @ k.mT * 0.3).std()).bfloat16()
    k, v, bounds = k.bfloat16(), v.bfloat16(), torch.tensor([0, 900])
    run = functools.partial(backends.run, "vision_attention", cu_seqlens=bounds, scale=0.3)
    truth = run(q.double(), k.double(), v.double())
    with torch.no_grad(), backends.use(vision_attention="bf16_scores"):
        error = (run(q, k, v).double() - truth).norm() / truth.norm()
    eager = rounding_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), 0.3)[0].transpose(0, 1)
    theirs = (eager.double() - truth).norm() / truth.norm()
    assert error < (theirs if missed else min(5e-3, 0.4 * theirs)), (error, theirs)


def test_a_wide_stream_makes_up_for_rounded_scores():
    """With scores rounded to bf16 our tower is still nearer to the truth than transformers' with fused attention."""
    errors = bf16_errors("sdpa", form="bf16_scores")
    assert all(mine <= 0.9 * other for mine, other in errors), errors  # its stream is not rounded after every sum


# ----------------------------------------------------------------------------------------------------- gelu in the product


def test_gelu_with_its_product_rounds_once_and_is_left_out_where_the_call_is_heard():
    form = next(entry for entry in backends.implementations("gelu_linear") if entry.name == "onednn")
    if form.missing:
        pytest.skip(form.missing)
    assert backends.verify("gelu_linear", dtypes=(torch.bfloat16,), device="cpu").ok
    rng = peer.generator(3)
    x, weight, bias = ((0.5 * torch.randn(shape, generator=rng)).bfloat16() for shape in ((90, 40), (70, 40), (70,)))
    for approximate in ("tanh", "none"):
        truth = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate=approximate)
        errors = {}
        for name in ("onednn", "torch"):
            with torch.no_grad(), backends.use(gelu_linear=name):
                found = backends.run("gelu_linear", x, weight, bias, approximate=approximate)
            errors[name] = (found.double() - truth).norm().item()
        assert errors["onednn"] < 0.8 * errors["torch"]
    model, heard = tower(0, torch.bfloat16), []
    image, grid = pixels(GRIDS, model.config), torch.tensor(GRIDS)
    with torch.no_grad(), backends.ran() as ran:
        model(image, grid)
    assert ran.counts["gelu_linear", "onednn"] == 3  # two blocks and the merger
    model.blocks[1].mlp.linear_fc1.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    with torch.no_grad(), backends.ran() as ran:
        model(image, grid)
    assert ran.counts["gelu_linear", "onednn"] == 2 and heard == [torch.Size([144, 29])]
    with backends.ran() as ran:
        model(image, grid)
    assert set(ran.counts) & {("gelu_linear", "onednn"), ("gelu_linear", "torch")} == {("gelu_linear", "torch")}


# ----------------------------------------------------------------------------------------------- what others touch it by


def test_gradients_flow_checkpointed_or_not():
    model = tower(3)
    grids = torch.tensor(GRIDS)

    def run(checkpointed: bool) -> dict[str, Tensor]:
        for block in model.blocks:
            block.gradient_checkpointing = checkpointed
        x = pixels(GRIDS, model.config).requires_grad_()
        model.zero_grad()
        torch.cat(model(x, grids).pooler_output).square().mean().backward()
        assert x.grad is not None
        return peer.gradients(model) | {"pixels": x.grad}

    with backends.ran() as plain:
        once = run(False)
    with backends.ran() as repeated:
        again = run(True)
    assert all(gradient.abs().max() > 0 for gradient in once.values())
    assert_all_close(again, once, 1e-6)
    calls = [sum(ran.counts[key] for key in ran.counts if key[0] == "vision_attention") for ran in (plain, repeated)]
    assert calls == [2, 4]


def test_gradcheck_of_a_small_tower():
    model = tower(4, torch.float64, depth=1)
    grid = torch.tensor([[1, 2, 4]])
    x = pixels([(1, 2, 4)], model.config).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.cat(model(x, grid).pooler_output), (x,))


def test_hooks_on_the_position_table_are_heard():
    model, heard = tower(), []
    model.pos_embed.register_forward_hook(lambda module, args, output: heard.append(output.shape) or output + 1)
    x = pixels(GRIDS, model.config)
    with torch.no_grad(), taps.record(model, "embed") as seen:
        model(x, torch.tensor(GRIDS))
    plain = tower()
    with torch.no_grad(), taps.record(plain, "embed") as before:
        plain(x, torch.tensor(GRIDS))
    assert heard == [torch.Size([25, 24])]
    assert_close(seen["embed"], before["embed"] + 1, 1e-5)


def test_contradictions_are_refused():
    model = tower()
    x = pixels(GRIDS, model.config)
    for grid, message in (
        (torch.tensor(GRIDS[:2]), "pixel values have 144 patches, the grids"),
        (torch.tensor([[1, 3, 4]]), re.escape("(1, 3, 4): rows and columns must be positive multiples of 2")),
        (torch.tensor([[0, 4, 4]]), "frames at least 1"),
        (torch.tensor([1, 4, 4]), r"integers \[items, 3\]"),
        (torch.zeros(0, 3, dtype=torch.long), "at least one item"),
        (torch.tensor([[1.0, 4.0, 4.0]]), "torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, grid)
    for wrong in (x[:, :-1], x[None], x.long()):
        with pytest.raises(ValueError, match=r"pixel values must be floats \[patches, 54\]"):
            model(wrong, torch.tensor(GRIDS))
    with pytest.raises(ValueError, match="image_grid_thw contains"):
        as_grids(torch.tensor([[1, -2, 2]]), 2, "image_grid_thw")


def test_in_chans_is_another_name_of_in_channels():
    assert VisionConfig.from_dict({"in_chans": 4}).in_channels == 4
    assert VisionConfig.from_dict({"in_chans": 3, "in_channels": 3}).in_channels == 3
    with pytest.raises(ConfigError, match="in_chans = 4 contradicts in_channels = 3"):
        VisionConfig.from_dict({"in_chans": 4, "in_channels": 3})


def test_bf16_and_meta_towers():
    model = tower(0, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    x = pixels(GRIDS, model.config)
    with torch.no_grad():
        assert model(x, torch.tensor(GRIDS)).pooler_output[0].dtype == torch.bfloat16  # float pixels are rounded once
        assert torch.equal(model(x.bfloat16(), torch.tensor(GRIDS)).last_hidden_state,
                           model(x, torch.tensor(GRIDS)).last_hidden_state)
    with torch.device("meta"):
        empty = Qwen3_5MoeVisionModel(VisionConfig(**SIZES))
    assert {name: p.shape for name, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
