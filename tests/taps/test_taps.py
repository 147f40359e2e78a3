"""Named values: recorded, replaced, selected by token, and faithful under checkpointing and compilation."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from qwen35moe import backends, taps
from qwen35moe.taps import tap

# Pairwise different, so that a wrong axis cannot pass.
B, T, D, H, V, E, S, VOCABULARY = 2, 5, 12, 3, 4, 7, 6, 11
ALL_OF_LINEAR_ATTN = "qkv conv query key value decay beta gate state core scores normed output"
ALL_OF_SELF_ATTN = "query key value gate scores output"
ALL_OF_MLP = "router_logits indices weights expert_in expert_act expert_out routed shared output"


class LinearAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(H))
        self.in_proj_a = nn.Linear(D, H, bias=False)
        self.out_proj = nn.Linear(H * V, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        decay = tap(self, "decay", -self.A_log.exp() * self.in_proj_a(x).sigmoid())
        core = tap(self, "core", decay.exp()[..., None].expand(-1, -1, -1, V) * torch.arange(1.0, V + 1))
        tap(self, "state", core.sum(1)[:, :, None].expand(-1, -1, V + 1, -1))
        return tap(self, "output", self.out_proj(core.flatten(2)))


class SelfAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = tap(self, "scores", (x @ x.mT).softmax(-1)[:, None].expand(-1, H, -1, -1))
        return tap(self, "output", self.o_proj(scores.mean(1) @ x))


class SparseMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList()

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        logits = tap(self, "router_logits", self.gate(rows))
        indices = tap(self, "indices", logits.topk(S).indices)
        tap(self, "expert_in", rows.repeat_interleave(S, 0))
        routed = tap(self, "routed", rows * indices.float().mean(-1, keepdim=True))
        return tap(self, "output", routed.view_as(hidden))


class DenseMlp(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return tap(self, "output", hidden.tanh())


class Layer(nn.Module):
    def __init__(self, index: int, dense: bool) -> None:
        super().__init__()
        if index % 2:
            self.self_attn = SelfAttn()
        else:
            self.linear_attn = LinearAttn()
        self.mlp = DenseMlp() if dense else SparseMlp()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = tap(self, "input", hidden)
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        hidden = hidden + mixer(hidden)
        return tap(self, "output", hidden + self.mlp(hidden))


class TextModel(nn.Module):
    def __init__(self, layers: int = 3, dense: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Layer(index, dense) for index in range(layers))
        self.checkpointing = False

    def forward(self, ids: Tensor) -> Tensor:
        hidden = tap(self, "embed", self.embed_tokens(ids))
        for layer in self.layers:
            hidden = backends.checkpoint(layer, hidden) if self.checkpointing else layer(hidden)
        return tap(self, "norm", hidden)


class CausalLM(nn.Module):
    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.model = TextModel(dense=dense)
        self.lm_head = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = TextModel()
        self.mtp = nn.Module()
        self.mtp.layers = nn.ModuleList([Layer(1, dense=False)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.mtp.get_submodule("layers.0")(self.model.get_submodule("language_model")(ids))


@pytest.fixture
def model() -> CausalLM:
    return CausalLM()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


@pytest.fixture(autouse=True)
def nobody_listens_afterwards() -> Iterator[None]:
    yield
    assert not taps._listeners


# ----------------------------------------------------------------------------------------------------------- catalogue


class TestCatalogue:
    def test_has_every_public_name_once(self) -> None:
        names = [entry.name for entry in taps.catalogue()]
        expected = ["embed", "norm", "layers.N.input", "layers.N.output"]
        for part, leaves in (("linear_attn", ALL_OF_LINEAR_ATTN), ("self_attn", ALL_OF_SELF_ATTN), ("mlp", ALL_OF_MLP)):
            expected += [f"layers.N.{part}.{leaf}" for leaf in leaves.split()]
        tower = "embed output blocks.N.output blocks.N.mlp.output " + " ".join(
            f"blocks.N.attn.{leaf}" for leaf in "query key value output".split())
        expected += [f"visual.{name}" for name in tower.split()]
        assert sorted(names) == sorted(expected)

    def test_inputs_are_names_of_the_catalogue(self) -> None:
        names = {entry.name for entry in taps.catalogue()}
        for entry in taps.catalogue():
            assert set(entry.inputs) <= names, entry.name
            assert entry.name in ("embed", "visual.embed") or entry.inputs, entry.name

    def test_shapes_use_the_letters_and_names_have_equations(self) -> None:
        for entry in taps.catalogue():
            assert set(entry.shape) <= set("B T M D H G K V C E S F N R P J".split()), entry.name
            assert entry.equation and entry.parent == ".".join(entry.name.split(".")[:-1])
            assert set(entry.aliases) <= {"transformers", "llama.cpp", "vllm"}

    def test_aliases_in_transformers_are_names_of_its_source(self) -> None:
        modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
        with open(modeling.__file__, encoding="utf-8") as file:
            words = set(re.findall(r"\w+", file.read()))
        for entry in taps.catalogue():
            if alias := entry.aliases.get("transformers"):
                said = set(re.findall(r"\w+", alias)) - {"after", "before", "input", "output", "N"}
                assert said <= words, (entry.name, alias)

    def test_a_few_aliases(self) -> None:
        aliases = {entry.name: entry.aliases for entry in taps.catalogue()}
        assert aliases["layers.N.linear_attn.qkv"]["llama.cpp"] == "linear_attn_qkv_mixed"
        assert aliases["layers.N.mlp.router_logits"]["llama.cpp"] == "ffn_moe_logits"
        assert aliases["layers.N.linear_attn.decay"]["transformers"] == "g"


# -------------------------------------------------------------------------------------------------------------- record


class TestRecord:
    def test_a_value_by_name(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.2.linear_attn.decay") as seen:
            assert len(seen) == 0
            model(ids)
        value = seen["layers.2.linear_attn.decay"]
        assert isinstance(value, Tensor) and value.shape == (B, T, H) and (value < 0).all()
        assert list(seen) == ["layers.2.linear_attn.decay"]

    def test_patterns(self, model: CausalLM, ids: Tensor) -> None:
        cases = {
            "layers.*.linear_attn.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "layers.N.linear_attn.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "layers.1.*": [f"layers.1.{x}" for x in ("input", "mlp.expert_in", "mlp.indices", "mlp.output")]
            + [f"layers.1.{x}" for x in ("mlp.routed", "mlp.router_logits", "output")]
            + ["layers.1.self_attn.output", "layers.1.self_attn.scores"],
            "*.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "embed": ["embed"],
            "norm": ["norm"],
            "layers.[01].output": ["layers.0.output", "layers.1.output"],
            "model.layers.0.output": ["layers.0.output"],
            "model.language_model.layers.0.output": ["layers.0.output"],
        }
        for pattern, names in cases.items():
            with taps.record(model, pattern) as seen:
                model(ids)
            assert sorted(seen) == sorted(names), pattern
        with taps.record(model, ["embed", "*.scores"]) as seen:
            model(ids)
        assert sorted(seen) == ["embed", "layers.1.self_attn.scores"]
        assert seen["model.embed"] is seen["embed"]

    def test_names_do_not_depend_on_what_is_around_the_text_model(self, ids: Tensor) -> None:
        text, outer = TextModel(), Multimodal()
        wrapped = nn.Module()
        wrapped.base_model = nn.Module()
        wrapped.base_model.model = CausalLM()
        for model in (text, wrapped):
            with taps.record(model, "layers.0.output") as seen:
                (model if model is text else wrapped.base_model.get_submodule("model"))(ids)
            assert list(seen) == ["layers.0.output"]
        with taps.record(outer, ["layers.0.output", "mtp.layers.0.self_attn.scores"]) as seen:
            outer(ids)
        assert sorted(seen) == ["layers.0.output", "mtp.layers.0.self_attn.scores"]

    def test_a_layer_or_a_mixer_alone(self) -> None:
        layer, x = Layer(0, dense=False), torch.randn(B, T, D)
        with taps.record(layer, ["linear_attn.decay", "output"]) as seen:
            layer(x)
        assert sorted(seen) == ["linear_attn.decay", "output"]
        with taps.record(layer.linear_attn, "decay", positions=-1) as seen:
            layer(x)
        assert [(name, value.shape) for name, value in seen.items()] == [("decay", (B, 1, H))]

    def test_several_forwards_give_a_list(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.output") as seen:
            model(ids)
            model(ids[:, :1])
            assert [value.shape[1] for value in seen["layers.0.output"]] == [T, 1]
            seen.clear()
            model(ids)
        assert isinstance(seen["layers.0.output"], Tensor)
        assert len(seen.all("layers.0.output")) == 1

    def test_stays_on_the_graph(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, ["layers.0.output", "layers.0.mlp.indices"]) as seen:
            loss = model(ids).square().sum()
        (grad,) = torch.autograd.grad(loss, seen["layers.0.output"])
        assert grad.shape == (B, T, D) and grad.abs().min() > 0
        with torch.no_grad(), taps.record(model, "layers.0.output") as seen:
            model(ids)
        assert not seen["layers.0.output"].requires_grad

    def test_what_was_heard_does_not_change_later(self) -> None:
        """A static cache is one buffer, written in place at every step."""
        mixer, buffer = LinearAttn(), torch.zeros(B, H, V)
        with taps.record(mixer, "state") as seen:
            for step in range(3):
                tap(mixer, "state", buffer.fill_(step))
        assert [value.max().item() for value in seen["state"]] == [0, 1, 2]

    def test_changes_nothing(self, model: CausalLM, ids: Tensor) -> None:
        without = model(ids)
        with taps.record(model, "*"):
            assert torch.equal(model(ids), without)

    def test_unknown_names_raise_with_near_ones(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match=r"matches no named value of this CausalLM; near: .*linear_attn\.decay"):
            taps.record(model, "layers.0.linear_attn.decays")
        with pytest.raises(ValueError, match="layers.0.linear_attn.decay"):
            taps.record(model, "layers.9.linear_attn.decay")
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(model, ["embed", "layers.1.linear_attn.decay"])  # layer 1 is an attention layer
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(CausalLM(dense=True), "*.router_logits")
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(model, "decay")

    def test_what_was_not_heard_says_so(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "*.output") as seen:
            model(ids)
        with pytest.raises(KeyError, match=r"layers\.0\.outputs was not heard; heard: .*layers\.0\.output"):
            seen["layers.0.outputs"]

    def test_a_tap_outside_the_catalogue_is_the_author_s_error(self, model: CausalLM) -> None:
        tap(model, "nonsense", torch.ones(1))  # free while nobody listens
        with taps.record(model, "embed"), pytest.raises(AssertionError, match="'nonsense' is not in the catalogue"):
            tap(model, "nonsense", torch.ones(1))

    def test_models_do_not_hear_each_other_and_listeners_nest(self, ids: Tensor) -> None:
        one, two = CausalLM(), CausalLM()
        with taps.record(one, "layers.0.output") as first, taps.record(one, "*") as all_of_one:
            with taps.record(two, "layers.0.output") as second:
                two(ids)
            assert not first and len(second) == 1
            one(ids)
            two(ids)
        assert torch.equal(first["layers.0.output"], all_of_one["layers.0.output"])
        assert len(second.all("layers.0.output")) == len(first.all("layers.0.output")) == 1

    def test_the_block_ends_with_an_error_too(self, model: CausalLM) -> None:
        with pytest.raises(RuntimeError), taps.record(model, "embed"):
            raise RuntimeError


class TestPositions:
    @pytest.mark.parametrize(
        ("positions", "kept"),
        [(-1, [4]), (0, [0]), ([0, 3, -2], [0, 3, 3]), (slice(1, None, 2), [1, 3]), (slice(9, None), []), ([], [])],
    )
    def test_selects_tokens(self, model: CausalLM, ids: Tensor, positions: taps.Positions, kept: list[int]) -> None:
        names = ["layers.1.output", "layers.1.self_attn.scores", "layers.1.mlp.router_logits", "layers.0.mlp.indices"]
        with taps.record(model, names) as whole, taps.record(model, names, positions=positions) as some:
            model(ids)
        assert torch.equal(some["layers.1.output"], whole["layers.1.output"][:, kept])
        assert torch.equal(some["layers.1.self_attn.scores"], whole["layers.1.self_attn.scores"][:, :, kept])
        logits = whole["layers.1.mlp.router_logits"].view(B, T, E)
        assert torch.equal(some["layers.1.mlp.router_logits"], logits[:, kept])
        assert some["layers.0.mlp.indices"].shape == (B, len(kept), S)

    def test_gradients_reach_the_selection(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.output", positions=[1]) as seen:
            model(ids)
        seen["layers.0.output"].sum().backward()
        assert model.model.embed_tokens.weight.grad is not None

    def test_values_without_a_token_axis(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.*", positions=-1) as seen:
            model(ids)
        assert seen["layers.0.linear_attn.state"].shape == (B, H, V + 1, V)
        assert seen["layers.0.mlp.expert_in"].shape == (B * T * S, D)
        assert seen["layers.0.linear_attn.core"].shape == (B, 1, H, V)
        with pytest.raises(ValueError, match=r"layers.0.linear_attn.state \[B, H, K, V\] has no token axis"):
            taps.record(model, "layers.0.linear_attn.state", positions=-1)

    def test_outside_the_sequence(self, model: CausalLM, ids: Tensor) -> None:
        with pytest.raises(ValueError, match=r"positions=\[5\] reaches outside the 5 tokens of layers.0.output"):
            with taps.record(model, "layers.0.output", positions=5):
                model(ids)

    def test_rows_that_cannot_be_told_apart(self) -> None:
        mlp = SparseMlp()
        with pytest.raises(ValueError, match="cannot tell the tokens of router_logits"):
            with taps.record(mlp, "router_logits", positions=0):
                mlp(torch.randn(B, T, D))

    def test_not_positions(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match="a slice, an int or a list of ints"):
            taps.record(model, "embed", positions=[0.5])  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------------------- patch


class TestPatch:
    def test_replaces_a_value_and_what_follows(self, model: CausalLM, ids: Tensor) -> None:
        before = model(ids)
        with taps.patch(model, {"layers.0.mlp.routed": torch.zeros_like}), taps.record(model, "*") as seen:
            assert not torch.equal(model(ids), before)
        assert seen["layers.0.mlp.routed"].abs().max() == 0
        assert seen["layers.0.mlp.output"].abs().max() == 0
        assert torch.equal(model(ids), before)

    def test_in_the_order_of_opening_and_before_recordings(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "embed") as early, taps.patch(model, {"embed": lambda x: x + 1}):
            with taps.patch(model, {"embed": lambda x: x * 10}), taps.record(model, "embed") as late:
                model(ids)
        expected = (model.model.embed_tokens(ids) + 1) * 10
        assert torch.equal(early["embed"], expected) and torch.equal(late["embed"], expected)

    def test_one_function_for_many_values(self, model: CausalLM, ids: Tensor) -> None:
        with taps.patch(model, {"*.decay": torch.zeros_like, "layers.2.*.decay": lambda g: g - 1}):
            with taps.record(model, "*.decay") as seen:
                model(ids)
        assert (seen["layers.0.linear_attn.decay"] == 0).all() and (seen["layers.2.linear_attn.decay"] == -1).all()

    def test_gradients_flow_through_it(self, model: CausalLM, ids: Tensor) -> None:
        scale = torch.tensor(2.0, requires_grad=True)
        with taps.patch(model, {"layers.0.output": lambda x: x * scale}):
            model(ids).square().sum().backward()
        assert scale.grad is not None and scale.grad != 0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x[:, 1:], r"embed returned \[2, 4, 12\], the value has \[2, 5, 12\]"),
            (lambda x: x.double(), r"embed returned torch.float64 on cpu, the value is torch.float32 on cpu: use .to"),
            (lambda x: None, "embed returned NoneType, not a tensor"),
        ],
    )
    def test_checks_what_the_function_returns(self, model: CausalLM, ids: Tensor, function, message: str) -> None:
        with pytest.raises(ValueError, match=message), taps.patch(model, {"embed": function}):
            model(ids)

    def test_refuses_what_is_no_function_or_no_name(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match="expected a function of the value, got Tensor"):
            taps.patch(model, {"embed": torch.zeros(1)})  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="matches no named value"):
            taps.patch(model, {"layers.0.embed": torch.zeros_like})

    def test_only_its_own_model(self, ids: Tensor) -> None:
        one, two = CausalLM(), CausalLM()
        before = two(ids)
        with taps.patch(one, {"embed": torch.zeros_like}):
            assert torch.equal(two(ids), before)


def test_listening_is_about_a_module_and_its_own_names(model: CausalLM) -> None:
    mixer = model.model.layers[0].get_submodule("linear_attn")
    assert not taps.tapped(mixer, ("decay", "core"))
    with taps.record(model, "layers.0.*.decay"):
        assert taps.tapped(mixer, ("decay", "core")) and not taps.tapped(mixer, ("core",))
        assert not taps.tapped(model.model.layers[2].get_submodule("linear_attn"), ("decay",))
    with taps.patch(model, {"*.core": torch.zeros_like}):
        assert taps.tapped(mixer, ("core",)) and not taps.tapped(model, ("core",))


# ------------------------------------------------------------------------------------------------------- checkpointing


class TestCheckpointing:
    """Gradients with activation checkpointing equal those without, whatever is listened to and when it ends."""

    def gradients(self, model: CausalLM, ids: Tensor, checkpointing: bool, patches: dict, late: dict) -> list[Tensor]:
        model.zero_grad()
        model.model.checkpointing = checkpointing
        with taps.patch(model, patches), taps.record(model, "*") as seen:
            loss = model(ids).square().mean()
        with taps.patch(model, late), taps.record(model, "*") as seen_late:
            loss.backward()
        assert all(len(seen.all(name)) == 1 for name in seen), "recorded again"
        assert not seen_late
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    @pytest.mark.parametrize("patched", [False, True])
    @pytest.mark.parametrize("late", [False, True])
    def test_recomputes_with_the_patches_of_the_forward(
        self, model: CausalLM, ids: Tensor, patched: bool, late: bool
    ) -> None:
        patches = {"*.decay": lambda g: g * 0.5, "layers.1.output": torch.tanh} if patched else {}
        lates = {"*.decay": torch.zeros_like, "*.output": lambda x: x * 100} if late else {}
        plain = self.gradients(model, ids, False, patches, lates)
        checkpointed = self.gradients(model, ids, True, patches, lates)
        assert len(plain) == len(checkpointed) > 5
        for a, b in zip(plain, checkpointed, strict=True):
            assert torch.equal(a, b)
        if patched:
            unpatched = self.gradients(model, ids, True, {}, {})
            assert any(not torch.equal(a, b) for a, b in zip(plain, unpatched, strict=True))

    def test_recorded_values_are_on_the_graph(self, model: CausalLM, ids: Tensor) -> None:
        grads = []
        for model.model.checkpointing in (False, True):
            with taps.record(model, "layers.1.output") as seen:
                loss = model(ids).square().sum()
            grads.append(torch.autograd.grad(loss, seen["layers.1.output"])[0])
        assert torch.equal(*grads)

    def test_backward_twice(self, model: CausalLM, ids: Tensor) -> None:
        model.model.checkpointing = True
        with taps.patch(model, {"*.decay": lambda g: g * 0.5}):
            loss = model(ids).square().mean()
        first = torch.autograd.grad(loss, list(model.model.parameters()), retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, list(model.model.parameters()), allow_unused=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)

    def test_nested(self, ids: Tensor) -> None:
        layer, x = Layer(0, dense=True), torch.randn(B, T, D, requires_grad=True)
        inner = layer.linear_attn.forward
        layer.linear_attn.forward = lambda t: backends.checkpoint(inner, t)  # type: ignore[method-assign]
        grads = []
        for run in (lambda t: layer(t), lambda t: backends.checkpoint(layer, t)):
            with taps.patch(layer, {"linear_attn.decay": lambda g: g * 0.5}), taps.record(layer, "*") as seen:
                y = run(x)
            with taps.patch(layer, {"linear_attn.decay": torch.zeros_like}):
                grads.append(torch.autograd.grad(y.square().sum(), x)[0])
            assert all(len(seen.all(name)) == 1 for name in seen)
        assert torch.equal(*grads)

    def test_the_contexts_alone(self, model: CausalLM, ids: Tensor) -> None:
        """taps.checkpoint_contexts is enough where no backend is chosen."""
        layer, x = model.model.layers[0], torch.randn(B, T, D, requires_grad=True)
        calls = []
        with taps.patch(model, {"layers.0.linear_attn.decay": lambda g: calls.append(1) or g * 0.5}):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=taps.checkpoint_contexts)
        y.sum().backward()
        assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------------- compile


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_one_graph_when_nobody_listens(self, model: CausalLM, ids: Tensor) -> None:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids), model(ids))

    def test_listening_later_is_heard(self, model: CausalLM, ids: Tensor) -> None:
        compiled = torch.compile(model, backend="eager")
        before = compiled(ids)
        assert isinstance(compiled, nn.Module)
        with taps.record(compiled, "layers.0.*.decay") as seen:
            compiled(ids)
        assert seen["layers.0.linear_attn.decay"].shape == (B, T, H)
        with taps.patch(model, {"layers.0.output": torch.zeros_like}):
            patched = model(ids)
            assert torch.equal(compiled(ids), patched) and not torch.equal(patched, before)
        assert torch.equal(compiled(ids), before)


def test_a_tap_without_listeners_returns_the_value_itself(model: CausalLM) -> None:
    value = torch.ones(3)
    assert tap(model, "embed", value) is value


# ------------------------------------------------------------------------------------------------------ the real model


def test_the_model_forms_every_value_of_the_catalogue_in_its_shape() -> None:
    """Each letter stands for one size throughout a module, and the sizes are pairwise different."""
    from qwen35moe import Config, Qwen3_5MoeForCausalLM

    config = Config.preset("35b-a3b").replace(
        **{"num_hidden_layers": 4, "num_experts": 9, "num_experts_per_tok": 3, "hidden_size": 40, "vocab_size": 50},
        **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6},
        **{"linear_key_head_dim": 12, "linear_value_head_dim": 8},
    )
    model = Qwen3_5MoeForCausalLM(config.text_config)
    model.init_weights(seed=0)
    with taps.record(model, "*") as seen:
        model(torch.randint(50, (B, T)))

    heard = {re.sub(r"\d+", "N", name) for name in seen}
    assert heard == {entry.name for entry in taps.catalogue() if not entry.name.startswith("visual.")}
    for name, value in seen.items():
        entry = next(entry for entry in taps.catalogue() if entry.name == re.sub(r"\d+", "N", name))
        linear = ".linear_attn." in name
        sizes = {"B": B, "T": T, "M": T, "D": 40, "E": 9, "S": 3, "F": 24, "N": B * T, "R": 3 * B * T}
        sizes |= {"H": 6, "G": 2, "K": 12, "V": 8, "C": 96} if linear else {"H": 4, "G": 2, "K": 16, "V": 16}
        assert list(value.shape) == [sizes[letter] for letter in entry.shape], name
    decay, beta = seen["layers.0.linear_attn.decay"], seen["layers.0.linear_attn.beta"]
    assert (decay <= 0).all() and (0 < beta).all() and (beta < 1).all()
    scores = seen["layers.3.self_attn.scores"]
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))
    weights = seen["layers.0.mlp.weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
