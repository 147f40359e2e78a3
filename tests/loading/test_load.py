"""load() and load_processor(): options that reach the loader, checkpoints without a tokenizer, names of the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import qwen35moe
from qwen35moe import loading
from qwen35moe.checkpoint import CheckpointError
from qwen35moe.checkpoint.hub import BUNDLED
from qwen35moe.checkpoint.tiny import tiny_config
from tests.checkpoint.test_hub import NAME, NEW, Hub, repository  # noqa: F401

IDS = torch.tensor([[303, 402, 388, 310]])


def test_what_load_gives_is_saved_and_loaded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = qwen35moe.load("tiny")
    model.save_pretrained(tmp_path / "x")
    with caplog.at_level(logging.WARNING):
        again, none = qwen35moe.load(tmp_path / "x")
    assert none is None and "no tokenizer.json" in caplog.text and "tokenizer.save_pretrained(folder)" in caplog.text
    assert type(again) is type(model) and torch.equal(again(IDS).logits, model(IDS).logits)
    tokenizer.save_pretrained(tmp_path / "x")
    same = qwen35moe.load(tmp_path / "x")[1]
    assert same("And God said")["input_ids"].tolist() == tokenizer("And God said")["input_ids"].tolist()
    processor = qwen35moe.load_processor("tiny")
    processor.save_pretrained(tmp_path / "y")
    model.save_pretrained(tmp_path / "y")
    chat = [{"role": "user", "content": [{"type": "image", "image": str(BUNDLED / "example.png")}]}]
    for reader in (processor, qwen35moe.load_processor(tmp_path / "y")):
        inputs = reader.apply_chat_template(chat, add_generation_prompt=True)
        assert qwen35moe.load(tmp_path / "y")[0].generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_options_reach_the_loader(tmp_path: Path) -> None:
    small, _ = qwen35moe.load("tiny", layers=iter([0, 3]), experts=range(5), parts={"text"}, dtype=torch.float32)
    assert type(small).__name__ == "Qwen3_5MoeForCausalLM" and small.dtype == torch.float32
    assert (small.config.num_hidden_layers, small.config.num_experts) == (2, 5)
    direct = qwen35moe.Qwen3_5MoeForCausalLM.from_pretrained("tiny", layers=[0, 3], experts=range(5), dtype=torch.float32)
    assert torch.equal(small(IDS).logits, direct(IDS).logits)
    theirs, tokenizer = qwen35moe.load("tiny", torch_dtype="float32", device_map="auto", trust_remote_code=True)
    assert theirs.dtype == torch.float32 and tokenizer is not None and theirs.name_or_path == "tiny"
    assert all(p.is_meta for p in qwen35moe.load("tiny", device="meta")[0].parameters())
    copied, _ = qwen35moe.load("tiny", weights="copy", config=qwen35moe.AutoConfig.from_pretrained("tiny").to_dict())
    assert type(copied).__name__ == "Qwen3_5MoeForConditionalGeneration"
    dense = qwen35moe.Qwen3_5ForCausalLM(tiny_config(dense=True))
    dense.save_pretrained(tmp_path)
    assert type(qwen35moe.load(tmp_path, output_router_logits=True)[0]).__name__ == "Qwen3_5ForCausalLM"
    for wrong, words in (({"layer": [0]}, "did you mean 'layers'"), ({"layers": [9]}, "layer 9"), ({"parts": "mtp"}, "mtp")):
        with pytest.raises((TypeError, ValueError), match=words):
            qwen35moe.load("tiny", **wrong)
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="give a folder with config.json, a Hub name"):
            qwen35moe.load(name)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Hub, Any]:  # noqa: F811
    import huggingface_hub.constants as constants

    server, models = repository
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    server.requests.clear()
    return server, models[NEW]


def test_only_the_needed_files_of_a_hub_name_are_fetched(hub: tuple[Hub, Any], tmp_path: Path) -> None:
    server, model = hub
    config = qwen35moe.AutoConfig.from_pretrained(NAME, cache_dir=tmp_path / "cache", token=False)
    assert config.hidden_size == 24 and config.name_or_path == NAME
    assert not [file for file in server.downloaded() if file.endswith(".safetensors")]
    with pytest.raises(ValueError):  # the tokenizer of this repository is an empty object
        qwen35moe.AutoTokenizer.from_pretrained(NAME, cache_dir=tmp_path / "cache")
    assert not [file for file in server.downloaded() if file.endswith(".safetensors")]
    with pytest.raises(CheckpointError, match="cannot be fetched|lacks"):
        qwen35moe.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path / "cache", local_files_only=True)
    loaded = qwen35moe.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path / "cache", revision="main")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and loaded.name_or_path == NAME
    assert [file for file in server.downloaded() if file.endswith(".safetensors")]
    assert not (tmp_path / "default").exists(), "cache_dir is used instead of the default"
    server.requests.clear()
    again = qwen35moe.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not server.downloaded()


def test_the_keywords_of_the_hub_reach_its_library(tmp_path: Path) -> None:
    import huggingface_hub

    received: list[dict[str, Any]] = []

    def download(name: str, file: str, **options: Any) -> str:
        received.append(options)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    with mock.patch.object(huggingface_hub, "hf_hub_download", download):
        autos = (qwen35moe.AutoTokenizer, qwen35moe.AutoConfig, qwen35moe.AutoModel, qwen35moe.Qwen3_5MoeForCausalLM)
        for door in (qwen35moe.load, qwen35moe.load_processor, *(auto.from_pretrained for auto in autos)):
            received.clear()
            with pytest.raises(CheckpointError, match="owner/name"):
                door("owner/name", token="secret", cache_dir=tmp_path, force_download=True, revision="v1")
            wanted = {"token": "secret", "cache_dir": tmp_path, "local_files_only": False, "force_download": True}
            assert received and all(options == {**wanted, "revision": "v1"} for options in received)


def test_a_tokenizer_that_is_not_cached_yet_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights may be in the cache without it; where it cannot be had, the folder without it serves."""
    requests: list[Any] = []

    def fetch(name: str, *, required: Any = (), **options: Any) -> Path:
        requests.append(required)
        if required:
            raise CheckpointError("cannot be fetched")
        return tmp_path

    monkeypatch.setattr("qwen35moe.checkpoint.hub.fetch", fetch)
    assert loading.find("owner/name") == tmp_path and requests == [["tokenizer.json"], ()]
