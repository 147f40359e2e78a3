"""lm-evaluation-harness: HFLM(pretrained=model); its numbers against sums over log-probabilities that are written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.common import tiny
from tests.support.chat import write_folder

pytest.importorskip("lm_eval")
transformers: Any = pytest.importorskip("transformers")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
QUESTIONS = [("one two", " three", " four"), ("a cat", " sat", " stood up"), ("yes", " no", " yes")]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_folder(folder / "files")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "files" / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny("experts", vocab_size=len(tokenizer), **special)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu")


def request(kind: str, *arguments: Any) -> Any:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_probability(harness: Any, context: str, continuation: str) -> tuple[float, bool]:
    """The sum over the tokens of `continuation`, and whether each is the most probable one."""
    before = harness.tokenizer.encode(context)
    whole = harness.tokenizer.encode(context + continuation)
    with torch.no_grad():
        log_p = harness.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    terms = [(log_p[t - 1, whole[t]].item(), int(log_p[t - 1].argmax()) == whole[t]) for t in range(len(before), len(whole))]
    return sum(value for value, _ in terms), all(best for _, best in terms)


def test_log_likelihoods_are_sums_over_tokens(harness: Any) -> None:
    pairs = [(context, answer) for context, *answers in QUESTIONS for answer in answers]
    actual = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (value, greedy), pair in zip(actual, pairs, strict=True):
        expected, best = log_probability(harness, *pair)
        assert value == pytest.approx(expected, abs=1e-3) and greedy == best, pair
    rolling = harness.loglikelihood_rolling([request("loglikelihood_rolling", "one two three")], disable_tqdm=True)
    start = harness.tokenizer.decode([harness.prefix_token_id])
    assert rolling[0] == pytest.approx(log_probability(harness, start, "one two three")[0], abs=1e-3)


def greedy(harness: Any, context: str, count: int) -> str:
    ids: Tensor = torch.tensor([harness.tokenizer.encode(context)])
    prompt = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, harness.model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == harness.tokenizer.eos_token_id:
                break
    return harness.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)


def test_generation_until_a_stop_string(harness: Any) -> None:
    """Two contexts of different lengths in one padded batch."""
    contexts = [context for context, *_ in QUESTIONS]
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    actual = harness.generate_until([request("generate_until", c, dict(settings)) for c in contexts], disable_tqdm=True)
    for text, context in zip(actual, contexts, strict=True):
        assert text == greedy(harness, context, 6).split("\n\n")[0], context
    stop = actual[0][2]  # a character of the answer: what follows is cut off
    cut = harness.generate_until([request("generate_until", contexts[0], settings | {"until": [stop]})], disable_tqdm=True)
    assert cut == [actual[0].split(stop)[0]]


@pytest.mark.slow
def test_a_task_from_local_data(harness: Any, tmp_path: Path) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    rows = [{"question": q, "choices": [a, b], "answer": i % 2} for i, (q, a, b) in enumerate(QUESTIONS)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(config={
        "task": "three_questions", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    })  # fmt: skip
    done = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0, log_samples=False)
    scores = [[log_probability(harness, q, answer)[0] for answer in answers] for q, *answers in QUESTIONS]
    right = [max(range(2), key=lambda j: pair[j]) == i % 2 for i, pair in enumerate(scores)]
    assert done["results"]["three_questions"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert done["config"]["model_num_parameters"] == harness.model.num_parameters()
