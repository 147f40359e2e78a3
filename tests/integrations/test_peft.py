"""peft: adapters of ours and of transformers' model give the same logits, and decode, merge, save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe.models.vision_language import Qwen3_5MoeForConditionalGeneration
from tests.integrations.common import KINDS, SIZES, VOCABULARY, cached_logits, tiny, tokens, twin
from tests.support.configs import TINY, nested
from tests.support.peer import assert_close, relative_error

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERYTHING: dict[str, Any] = {
    "target_modules": "all-linear",
    "target_parameters": [*EXPERTS, "mlp.gate.weight", "linear_attn.conv1d.weight"],
}
# Settings of LoraConfig, with the kinds of models that have what they name.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("experts", {"target_modules": ["q_proj", "o_proj"]}),
    "delta net": ("experts", {"target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]}),
    "regular expression": ("dense", {"target_modules": r".*self_attn\.(q|k|v)_proj"}),
    "dense": ("dense", {"target_modules": ["gate_proj", "up_proj", "down_proj", "lm_head"]}),
    "shared expert": ("experts", {"target_modules": ["shared_expert.up_proj", "shared_expert_gate"]}),
    "grouped experts": ("experts", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "router": ("experts", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "embedding": ("experts", {"target_modules": ["embed_tokens"]}),
    "DoRA": ("dense", {"target_modules": ["q_proj", "out_proj", "down_proj"], "use_dora": True}),
    "rank-stabilised": ("experts", {"target_modules": ["v_proj"], "use_rslora": True, "lora_bias": False}),
    "whole modules": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole head": ("experts", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("experts", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "tokens of a tied head": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
}  # fmt: skip


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 3, "lora_alpha": 5} | settings))


def adapted(model: Any, **settings: Any) -> Any:
    """A model with a random adapter. What is trained gets noise in the order of the names: models differ in that of modules."""
    with_adapter = peft.get_peft_model(model, lora(**settings)).eval()
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(with_adapter.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter)
                parameter.mul_(0 if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else 1).add_(noise * 0.2)
    return with_adapter


# ------------------------------------------------------------------------------------------ ours and transformers'


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_transformers_work_here_and_the_reverse(name: str, tmp_path: Path) -> None:
    kind, settings = ADAPTERS[name]
    theirs = adapted(twin(tiny(kind)), task_type="CAUSAL_LM", **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "theirs").eval()
    expected = theirs(tokens()).logits
    assert relative_error(ours(tokens()).logits, expected) < 2e-5
    assert relative_error(tiny(kind)(tokens()).logits, expected) > 1e-2
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(twin(tiny(kind)), tmp_path / "ours").eval()
    assert relative_error(again(tokens()).logits, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_adapters_are_those_in_transformers_model(name: str) -> None:
    kind, settings = ADAPTERS[name]
    ours, theirs = adapted(tiny(kind), **settings), adapted(twin(tiny(kind)), **settings)
    gradients: list[dict[str, Tensor]] = []
    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for parameter, expected in gradients[1].items():
        assert (gradients[0][parameter] is None) == (expected is None), parameter
        if expected is not None:
            assert_close(gradients[0][parameter], expected, 1e-3, parameter)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_with_the_head(kind: str, task: str | None) -> None:
    """Logits with an adapter are those of a model whose weights are W + (alpha / r) B A."""
    model = adapted(tiny(kind), target_modules="all-linear", task_type=task)
    plain, changed = tiny(kind), 0
    if kind == "tied":  # the adapter belongs to the head alone
        plain.set_output_embeddings(nn.Linear(*plain.lm_head.weight.shape[::-1], bias=False).requires_grad_(False))
        plain.lm_head.weight.copy_(plain.get_input_embeddings().weight)
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * 5 / 3
                plain.get_submodule(name).weight.add_(delta)
                changed += 1
    linear = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    assert changed == len(linear) and "lm_head" in linear
    output = model(input_ids=tokens(), labels=tokens(), return_dict=True)
    assert relative_error(output.logits, plain(tokens()).logits) < 2e-5
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    if kind == "router loss":
        expected = expected + 0.3 * output.aux_loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, tiny(kind)(tokens()).logits)


@pytest.mark.parametrize("options", [{"output_logits": False}, {"logits_to_keep": 2}], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_loss_without_logits_goes_through_the_adapter_of_the_head(dora: bool, options: dict[str, Any]) -> None:
    model = adapted(tiny(), target_modules=["lm_head"], use_dora=dora)
    losses, gradients = [], []
    for chosen in ({}, options):
        model.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens(), **chosen).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for own, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(own, expected, 1e-4)


def test_a_multimodal_model_with_adapters(tmp_path: Path) -> None:
    from qwen35moe.config import Config

    def multimodal() -> Any:
        return Qwen3_5MoeForConditionalGeneration(Config.from_dict(nested(TINY | SIZES))).init_weights(seed=3).eval()

    model = adapted(multimodal(), target_modules="all-linear", task_type="CAUSAL_LM")
    assert any("visual" in name and "lora_A" in name for name, _ in model.named_parameters())
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(multimodal(), tmp_path).eval()(tokens()).logits, expected)
    assert relative_error(model.merge_and_unload()(tokens()).logits, expected) < 2e-5


# ------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_cached_decoding_with_adapters_everywhere(kind: str) -> None:
    settings = EVERYTHING if kind == "experts" else {"target_modules": "all-linear"}
    model = adapted(tiny(kind), **settings)
    with torch.no_grad():
        whole = model(tokens()).logits
    assert relative_error(cached_logits(model, model.get_base_model().new_cache(2)), whole) < 2e-5
    assert relative_error(whole, tiny(kind)(tokens()).logits) > 0.1
    merged = model.merge_and_unload()
    assert relative_error(merged(tokens()).logits, whole) < 5e-5


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_generation_through_an_adapter(task: str | None) -> None:
    settings = EVERYTHING | {"task_type": task}
    model, expected = adapted(tiny(eos_token_id=None), **settings), tokens()
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=5), expected)
    with model.disable_adapter():
        plain = model.generate(input_ids=tokens(), max_new_tokens=5)
    assert torch.equal(plain, tiny(eos_token_id=None).generate(tokens(), max_new_tokens=5))
    assert not torch.equal(plain, expected)


def test_several_adapters_one_after_the_other(tmp_path: Path) -> None:
    model = adapted(tiny(), target_modules=["q_proj"])
    model.add_adapter("other", lora(target_modules=["v_proj", "in_proj_qkv"]))
    model.eval()
    first = model(tokens()).logits
    model.set_adapter("other")
    second = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert relative_error(first, second) > 1e-2
    model.set_adapter("default")
    assert torch.equal(model(tokens()).logits, first)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.eval().set_adapter("other")
    assert torch.equal(loaded(tokens()).logits, second)


# ------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_models_answer_alike_and_are_saved(name: str, tmp_path: Path) -> None:
    kind, settings = ADAPTERS[name]
    model = adapted(tiny(kind), **settings)
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny(kind))
    assert relative_error(merged(tokens()).logits, expected) < 5e-5
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert relative_error(loaded(tokens()).logits, expected) < 5e-5
    assert loaded.config.tie_word_embeddings == bool(merged.all_tied_weights_keys)


def test_a_head_that_was_trained_apart_from_its_tied_embedding_is_saved(tmp_path: Path) -> None:
    """modules_to_save=["lm_head"] of a tied model: peft then says tie_word_embeddings = False."""
    model = tiny("tied")
    adapter = peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        adapter.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.3)
    expected = adapter(tokens()).logits
    merged = adapter.merge_and_unload()
    assert merged.config.tie_word_embeddings is False and not merged.all_tied_weights_keys
    merged.save_pretrained(tmp_path)
    assert relative_error(type(merged).from_pretrained(tmp_path)(tokens()).logits, expected) < 2e-5


def test_a_tied_head_gets_its_own_weights_before_it_is_merged(tmp_path: Path) -> None:
    """peft merges into the parameter, which a tied head shares with the embedding: it warns, and this is the way out."""
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        peft.get_peft_model(tiny("tied"), lora(target_modules=["lm_head"])).merge_and_unload()
    model = tiny("tied")
    head = nn.Linear(TINY["hidden_size"], VOCABULARY, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.set_output_embeddings(head)
    assert torch.equal(model(tokens()).logits, tiny("tied")(tokens()).logits)
    adapter = adapted(model, target_modules="all-linear")
    expected = adapter(tokens()).logits
    with pytest.raises(ValueError, match="no plain weight of a Linear"):
        model.resize_token_embeddings(VOCABULARY + 1)
    merged = adapter.merge_and_unload()
    assert relative_error(merged(tokens()).logits, expected) < 5e-5
    merged.save_pretrained(tmp_path)
    assert relative_error(type(merged).from_pretrained(tmp_path)(tokens()).logits, expected) < 5e-5


def test_adapters_on_unfused_experts(tmp_path: Path) -> None:
    model = tiny()
    model.unfuse_experts()
    adapter = adapted(model, target_modules=["experts.2.gate_proj", "experts.3.down_proj", "experts.5.up_proj"])
    expected = adapter(tokens()).logits
    assert relative_error(tiny()(tokens()).logits, expected) > 1e-3
    adapter.save_pretrained(tmp_path / "adapter")
    other = tiny()
    other.unfuse_experts()
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert relative_error(loaded(tokens()).logits, expected) < 1e-6
    with pytest.raises(ValueError, match="merge or remove adapters"):
        model.fuse_experts()
    merged = adapter.merge_and_unload()
    merged.fuse_experts()
    merged.save_pretrained(tmp_path / "merged")
    assert relative_error(type(merged).from_pretrained(tmp_path / "merged")(tokens()).logits, expected) < 2e-5


# ------------------------------------------------------------------------------------------ training, files, other methods


def test_training_moves_the_chosen_tokens_alone() -> None:
    model = peft.get_peft_model(tiny("tied"), lora(target_modules=["q_proj"], trainable_token_indices=[1, 5])).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = tokens()
    ids[0, 2], ids[1, 3] = 1, 5
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in moved)
    assert any("trainable_tokens_delta" in name for name in moved)
    base = model.merge_and_unload()
    changed = (base.get_input_embeddings().weight - tiny("tied").get_input_embeddings().weight).abs().sum(1) > 0
    assert changed.nonzero().flatten().tolist() == [1, 5]
    assert base.lm_head.weight is base.get_input_embeddings().weight


def test_trainer_trains_saves_and_resumes_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tests.integrations.test_trainer import losses, trainer

    def run(folder: str, resume: str | None = None) -> tuple[Any, list[float]]:
        torch.manual_seed(4)
        model = peft.get_peft_model(tiny(), lora(target_modules=["q_proj", "in_proj_qkv"], task_type="CAUSAL_LM"))
        done = trainer(tmp_path / folder, model, save_strategy="steps", save_steps=1, gradient_checkpointing=True)
        assert done.model_accepts_loss_kwargs is True
        done.train(resume_from_checkpoint=resume)
        return model.eval(), losses(done)

    model, values = run("whole")
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    resumed, _ = run("again", str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(resumed(tokens()).logits, model(tokens()).logits, 1e-5)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "whole" / "checkpoint-3").eval()
    assert_close(loaded(tokens()).logits, model(tokens()).logits, 1e-6)


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    """peft compares the vocabulary with the base model's, and saves the embeddings if it was changed."""
    tiny().save_pretrained(tmp_path / "base")
    files = pytest.importorskip("safetensors.torch")
    for rows in (VOCABULARY, VOCABULARY + 4):
        model = type(tiny()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(rows)
        adapter = adapted(model, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapter.save_pretrained(tmp_path / str(rows))
        saved = json.loads((tmp_path / str(rows) / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
        names = files.load_file(tmp_path / str(rows) / "adapter_model.safetensors")
        assert any("embed_tokens" in name for name in names) == (rows != VOCABULARY)
        other = type(tiny()).from_pretrained(tmp_path / "base")
        other.resize_token_embeddings(rows)
        loaded = peft.PeftModel.from_pretrained(other, tmp_path / str(rows)).eval()
        assert_close(loaded(tokens()).logits, adapter(tokens()).logits, 1e-6)


OTHER_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"target_modules": ["q_proj", "in_proj_qkv"], "init_weights": False}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "single tokens": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_give_what_they_give_in_transformers_model(name: str) -> None:
    kind, settings = OTHER_METHODS[name]
    actual: list[tuple[Tensor, Tensor]] = []
    for base in (tiny(eos_token_id=None), twin(tiny(eos_token_id=None))):
        torch.manual_seed(4)
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
        output = model(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), labels=tokens())
        actual.append((output.loss.detach(), output.logits.detach()))
    for own, expected in zip(*actual, strict=True):
        assert relative_error(own, expected) < 2e-5


VIRTUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
}


@pytest.mark.parametrize("name", VIRTUAL)
def test_generation_sees_the_virtual_tokens(name: str) -> None:
    """Greedy tokens are those of whole forwards, ours and transformers'; padding changes nothing. (transformers' own generate
    loses the virtual tokens with transformers 5.24 and peft 0.21.)"""
    kind, settings = VIRTUAL[name]
    answers: list[Tensor] = []  # of whole forwards
    models = []
    for base in (tiny(eos_token_id=None), twin(tiny(eos_token_id=None))):
        torch.manual_seed(4)
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.mul_(20)
        models.append(model)
        answer = tokens()
        with torch.no_grad():
            for _ in range(5):
                answer = torch.cat([answer, model(input_ids=answer).logits[:, -1].argmax(-1, keepdim=True)], 1)
        answers.append(answer)
    model, expected = models[0], answers[1]
    assert torch.equal(answers[0], expected)
    assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False, pad_token_id=59), expected)
    assert not torch.equal(expected, tiny(eos_token_id=None).generate(tokens(), max_new_tokens=5))
    padded, mask = F.pad(tokens(), (2, 0)), F.pad(torch.ones_like(tokens()), (2, 0))
    padded[1], mask[1] = F.pad(tokens()[1], (0, 2)), F.pad(torch.ones(9, dtype=torch.int64), (0, 2))
    actual = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(actual[:, -5:], expected[:, -5:])
    options = dict(max_new_tokens=5, n=2, do_sample=True, top_k=1)
    twice = model.generate(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), **options)
    assert torch.equal(twice, expected.repeat_interleave(2, 0))
    cache = model.get_base_model().new_cache(2)
    model.generate(input_ids=tokens(), max_new_tokens=5, cache=cache)
    with pytest.raises(ValueError, match="already holds 16 tokens"):
        model.generate(input_ids=expected, max_new_tokens=5, cache=cache)
    plain = model.get_base_model().generate(tokens(), max_new_tokens=5)  # peft has put our method back
    assert torch.equal(plain, tiny(eos_token_id=None).generate(tokens(), max_new_tokens=5))


@pytest.mark.parametrize("pack_first", [True, False])
def test_adapters_on_packed_weights(pack_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is that of the plain model; training and merging are refused until the weights are unpacked."""
    monkeypatch.setattr("qwen35moe.models.packed_weights.SMALL", 200)
    targets: dict[str, Any] = {"target_modules": ["q_proj", "out_proj"], "target_parameters": EXPERTS[:1]}
    settings = peft.LoraConfig(r=3, **targets, init_lora_weights=False)
    models = []
    for packed in (False, True):
        model = tiny("experts")
        if packed and pack_first:
            model.pack_weights()
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, settings).eval())
        if packed and not pack_first:
            assert models[1].base_model.model.pack_weights().weights > 5
    ids = tokens(2, 9)
    plain, adapted = models
    with torch.no_grad():
        assert_close(adapted(input_ids=ids).logits, plain(input_ids=ids).logits, 1e-5)
    with pytest.raises(ValueError, match="no gradient through packed weights"):
        adapted(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match=r"unpack_weights\(\)"):
        adapted.merge_and_unload()
    if not pack_first:
        adapted.base_model.model.unpack_weights()
        with torch.no_grad():
            assert_close(adapted.merge_and_unload()(input_ids=ids).logits, plain(input_ids=ids).logits, 1e-5)
