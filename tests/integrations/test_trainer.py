"""transformers' Trainer: what it trains, evaluates and saves, against loops and formulas that are written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.common import KINDS, VOCABULARY, next_token_sum, targets, tiny, tokens, twin
from tests.support.chat import write_folder
from tests.support.peer import assert_close, relative_error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ROWS, LENGTH, RATE = 4, 9, 0.05


class Rows(torch.utils.data.Dataset):
    """Rows of different numbers of labels; the first label of each row is one, which no position predicts."""

    def __init__(self, rows: int = ROWS, **columns: Any) -> None:
        self.ids = tokens(rows, LENGTH)
        self.labels = self.ids.clone()
        for row in range(rows):
            self.labels[row, 1 + row : 2 + 2 * row] = -100
        self.columns = columns

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index], **self.columns}


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=ROWS, max_steps=3, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5,
    )  # fmt: skip
    return transformers.TrainingArguments(str(folder), **(settings | changes))


def trainer(folder: Path, model: Any, *, data: Any = None, more: dict[str, Any] | None = None, **changes: Any) -> Any:
    data = Rows() if data is None else data
    return transformers.Trainer(model, arguments(folder, **changes), train_dataset=data, eval_dataset=data, **(more or {}))


def losses(done: Any) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def written_out(model: Any, steps: int = 3, coefficient: float = 0.0) -> list[float]:
    """Gradient descent on the mean over all labels of all rows, one row at a time; the loss of each step."""
    data, model = Rows(), model.train()
    count, per_step = targets(data.labels), []
    for _ in range(steps):
        model.zero_grad()
        total = 0.0
        for row in range(ROWS):
            ids, labels = data.ids[row : row + 1], data.labels[row : row + 1]
            output = model(ids, output_router_logits=coefficient > 0)
            loss = next_token_sum(output.logits, labels) / count
            if coefficient:
                loss = loss + coefficient * output.aux_loss
            loss.backward()
            total += loss.item()
        per_step.append(total)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * (0 if parameter.grad is None else parameter.grad)
    return per_step


def assert_same_weights(model: Any, other: Any, bound: float) -> None:
    for (name, own), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(own, theirs, bound, name)


# ------------------------------------------------------------------------------------------------------------- training


def test_trainer_finds_what_it_asks_a_model_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny())
    assert made.model_accepts_loss_kwargs is True
    assert getattr(made, "_loss_shifts_labels", True) is True
    assert made.label_names == ["labels"]
    assert made.model.config.use_cache is False


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_are_those_of_a_written_out_loop(kind: str, tmp_path: Path) -> None:
    """Four micro-batches with different numbers of labels: each step is the gradient of one mean over all of them."""
    model, own = tiny(kind, torch.float64), tiny(kind, torch.float64)
    done = trainer(tmp_path, model)
    done.train()
    expected = written_out(own, coefficient=0.3 if kind == "router loss" else 0.0)
    assert losses(done) == pytest.approx(expected, rel=1e-6)  # Trainer sums them in float32
    assert expected[0] > expected[-1] + 0.01  # it learns, and so the steps differ
    assert_same_weights(model, own, 1e-10)


def test_a_step_is_that_of_transformers_model(tmp_path: Path) -> None:
    """The same Trainer with the same weights in transformers' model: the same logged losses, router losses among them."""
    model = tiny("router loss", torch.float64)
    theirs = trainer(tmp_path / "theirs", twin(model))
    ours = trainer(tmp_path / "ours", model)
    theirs.train()
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_of_activations_changes_no_gradient(kwargs: dict[str, Any] | None, tmp_path: Path) -> None:
    model, own = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    done = trainer(tmp_path, model, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    done.train()
    assert model.is_gradient_checkpointing
    written_out(own)
    assert_same_weights(model, own, 1e-10)


def test_bf16_training_is_autocast(tmp_path: Path) -> None:
    model, own = tiny(), tiny().train()
    done = trainer(tmp_path, model, bf16=True, max_steps=1)
    done.train()
    data = Rows()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(ROWS):
        with torch.autocast("cpu", torch.bfloat16):
            logits = own(data.ids[row : row + 1]).logits
        total += next_token_sum(logits.float(), data.labels[row : row + 1]).detach()
    assert losses(done)[0] == pytest.approx(total.item() / targets(data.labels), abs=1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["experts", "tied"])
def test_label_smoothing_is_its_formula(kind: str, tmp_path: Path) -> None:
    """(1 - e) * cross-entropy + e * mean over the vocabulary of -log p, as means over all labels that count."""
    data, epsilon = Rows(), 0.2
    done = trainer(tmp_path, tiny(kind), label_smoothing_factor=epsilon, max_steps=1, per_device_train_batch_size=ROWS,
                   gradient_accumulation_steps=1)  # fmt: skip
    done.train()
    logits = tiny(kind)(data.ids).logits.detach().double()
    counted = data.labels[:, 1:] != -100
    log_p = F.log_softmax(logits[:, :-1], -1)
    nll = next_token_sum(logits, data.labels) / counted.sum()
    smooth = -log_p.mean(-1)[counted].mean()
    assert losses(done)[0] == pytest.approx(((1 - epsilon) * nll + epsilon * smooth).item(), abs=1e-4)


def test_unused_columns_are_removed(tmp_path: Path) -> None:
    """Trainer reads the names of forward's arguments: other columns of the data do not reach the model."""
    model, own = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    trainer(tmp_path, model, data=Rows(source="a book", length=LENGTH)).train()
    written_out(own)
    assert_same_weights(model, own, 1e-10)


def test_rows_grouped_by_length_are_trained_alike(tmp_path: Path) -> None:
    names = {field for field in transformers.TrainingArguments.__dataclass_fields__}
    option = {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in names else {"group_by_length": True}
    model, own = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    trainer(tmp_path, model, **option).train()
    written_out(own)
    assert_same_weights(model, own, 1e-10)


def test_operations_and_parameters_are_counted(tmp_path: Path) -> None:
    model = tiny("tied")
    done = trainer(tmp_path, model, max_steps=2)
    done.train()
    embedding = VOCABULARY * model.config.text_config.hidden_size
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == total and model.num_parameters(exclude_embeddings=True) == total - embedding
    assert done.state.total_flos == 6 * 2 * ROWS * LENGTH * (total - embedding)
    assert model.floating_point_ops({"input_ids": tokens()}) == 6 * tokens().numel() * (total - embedding)


# ------------------------------------------------------------------------------------------------------------- collators


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_folder(tmp_path / "tokenizer")
    file = str(tmp_path / "tokenizer" / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<|endoftext|>")


def test_flattened_rows_do_not_see_one_another(tmp_path: Path) -> None:
    """DataCollatorWithFlattening puts the rows into one, with position_ids that start again."""
    data = [{"input_ids": tokens(1, n, n)[0].tolist()} for n in (4, 7, 5)]
    for flash in (False, True):
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
        model = tiny(dtype=torch.float64)
        done = trainer(tmp_path, model, data=data, more={"data_collator": collator}, max_steps=1,
                       per_device_train_batch_size=3, gradient_accumulation_steps=1, remove_unused_columns=False)  # fmt: skip
        done.train()
        own, total = tiny(dtype=torch.float64), 0.0
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            total += next_token_sum(own(ids).logits, ids).item()
        assert losses(done)[0] == pytest.approx(total / (3 + 6 + 4), abs=1e-6)


def test_padded_batches_of_a_language_modelling_collator(tokenizer: Any, tmp_path: Path) -> None:
    data = [{"input_ids": tokens(1, n, n)[0].tolist()} for n in (4, 7, 5)]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = tiny(dtype=torch.float64, vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=None)
    own = tiny(dtype=torch.float64, vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=None)
    more = {"data_collator": collator, "processing_class": tokenizer}
    done = trainer(tmp_path, model, data=data, more=more, max_steps=1, per_device_train_batch_size=3,
                   gradient_accumulation_steps=1)  # fmt: skip
    done.train()
    total = 0.0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        total += next_token_sum(own(ids).logits, ids).item()
    assert losses(done)[0] == pytest.approx(total / (3 + 6 + 4), abs=1e-6)
    assert model.config.pad_token_id == tokenizer.pad_token_id  # Trainer aligns the configuration with the tokenizer


# ------------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_prediction(kind: str, tmp_path: Path) -> None:
    model, data, seen = tiny(kind, torch.float64), Rows(), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"mean": float(np.mean(prediction.predictions))}

    done = trainer(tmp_path, model, more={"compute_metrics": metrics}, per_device_eval_batch_size=ROWS)
    with torch.no_grad():
        output = model(data.ids)
    expected = next_token_sum(output.logits, data.labels).item() / targets(data.labels)
    if kind == "router loss":
        expected += 0.3 * output.aux_loss.item()
    evaluation = done.evaluate()
    assert evaluation["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert evaluation["eval_mean"] == pytest.approx(output.logits.mean().item(), abs=1e-8)
    assert isinstance(seen[0].predictions, np.ndarray), "predictions are the logits alone"
    predicted = done.predict(data)
    assert relative_error(torch.from_numpy(predicted.predictions), output.logits) < 1e-6
    assert np.array_equal(predicted.label_ids, data.labels.numpy())
    unlabelled = done.predict([{"input_ids": row} for row in data.ids])
    assert relative_error(torch.from_numpy(unlabelled.predictions), output.logits) < 1e-6


# ------------------------------------------------------------------------------------------------------------- checkpoints


def read_again(model: Any, folder: Path) -> Any:
    assert (folder / "config.json").is_file()
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_weights_of_one_without_a_break(kind: str, tmp_path: Path) -> None:
    whole = tiny(kind)
    settings = dict(optim="adamw_torch", max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.01)
    trainer(tmp_path / "whole", whole, **settings).train()
    checkpoints = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    resumed = tiny(kind, seed=2)  # other weights: those of the checkpoint replace them
    trainer(tmp_path / "again", resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(resumed, whole, 1e-6)
    loaded = read_again(whole, tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(loaded(tokens()).logits, whole.eval()(tokens()).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind == "tied")
    if kind in ("experts", "dense"):  # transformers reads it too
        theirs = getattr(transformers, type(whole).__name__).from_pretrained(
            tmp_path / "whole" / "checkpoint-4", attn_implementation="eager", experts_implementation="eager"
        )
        assert relative_error(loaded(tokens()).logits, theirs.eval()(tokens()).logits) < 1e-4


def test_unfused_experts_are_saved_and_resumed(tmp_path: Path) -> None:
    model = tiny()
    model.unfuse_experts()
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer(tmp_path, model, **settings).train()
    resumed = tiny(seed=2)
    resumed.unfuse_experts()
    trainer(tmp_path / "again", resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(resumed, model, 1e-6)
    loaded = read_again(model, tmp_path / "checkpoint-2")
    assert relative_error(loaded(tokens()).logits, model.eval()(tokens()).logits) < 1e-5


def test_the_best_checkpoint_is_loaded_and_old_ones_are_removed(tmp_path: Path) -> None:
    """A learning rate that makes the last steps worse: the weights at the end are those of the best evaluation."""
    model = tiny("tied")
    done = trainer(tmp_path, model, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                   save_total_limit=2, load_best_model_at_end=True, learning_rate=2.0)  # fmt: skip
    done.train()
    by_step = {entry["step"]: entry["eval_loss"] for entry in done.state.log_history if "eval_loss" in entry}
    best = min(by_step, key=lambda step: by_step[step])
    assert done.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert done.evaluate()["eval_loss"] == pytest.approx(by_step[best], rel=1e-5)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"} or best == 4
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_save_model_writes_tokenizer_and_arguments_too(tokenizer: Any, tmp_path: Path) -> None:
    done = trainer(tmp_path, tiny("tied"), more={"processing_class": tokenizer})
    done.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_args.bin"} <= names
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


def test_gathered_weights_of_a_sharded_model_are_the_ones_saved(tmp_path: Path) -> None:
    """With FSDP, Trainer passes the whole weights as state_dict, and the model holds its shard alone."""
    model = tiny()
    gathered = {name: 2 * value for name, value in model.state_dict().items()}
    trainer(tmp_path, model)._save(str(tmp_path / "whole"), state_dict=gathered)
    loaded = type(model).from_pretrained(tmp_path / "whole").state_dict()
    assert loaded.keys() == gathered.keys() and all(torch.equal(loaded[name], value) for name, value in gathered.items())


def test_trainer_saves_other_models_as_before(tmp_path: Path) -> None:
    trainer(tmp_path / "ours", tiny()).save_model(str(tmp_path / "ours"))
    theirs = twin(tiny())
    trainer(tmp_path / "theirs", theirs).save_model(str(tmp_path / "theirs"))
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["transformers_version"]
    bare = torch.nn.Linear(3, 2)
    trainer(tmp_path / "bare", bare).save_model(str(tmp_path / "bare"))
    assert not (tmp_path / "bare" / "config.json").exists() and (tmp_path / "bare" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------- loss functions


def test_the_loss_function_is_that_of_transformers() -> None:
    """Libraries call model.loss_function with logits of their own."""
    model, labels = tiny(), Rows().labels
    logits = torch.randn(ROWS, LENGTH, VOCABULARY)
    theirs = twin(model).loss_function

    def values(**options: Any) -> tuple[Tensor, Tensor]:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **options)
        return loss, theirs(logits=logits, labels=labels, vocab_size=VOCABULARY, **options)

    options: tuple[dict[str, Any], ...] = (
        {}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": labels.flip(1)},
    )  # fmt: skip
    for chosen in options:
        actual, expected = values(**chosen)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6), chosen
    with pytest.raises(ValueError, match="vocab_size=99.*61"):
        model.loss_function(logits, labels, vocab_size=99)
    with pytest.raises(ValueError, match="label 99.*61"):
        model.loss_function(logits, labels.masked_fill(labels == labels[0, -1], 99))
    assert model.loss_function(logits, labels).item() == pytest.approx(values()[1].item(), rel=1e-6)
    labels = labels.masked_fill(labels == -100, 0)
    actual, expected = values(ignore_index=0)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
