"""Checkpoints from the Hub: a local server that behaves like the Hub, and the cache of its downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

from qwen35moe import Config, Qwen3_5MoeForCausalLM
from qwen35moe.checkpoint import CheckpointError
from qwen35moe.checkpoint.hub import fetch, folder_of

NAME, OLD, NEW = "owner/tiny-moe", "1" * 40, "2" * 40


class Hub:
    """A server for one repository, {revision: (commit, folder)}, that records its requests."""

    def __init__(self) -> None:
        self.revisions: dict[str, tuple[str, Path]] = {}
        self.requests: list[tuple[str, str]] = []  # (method, file)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                owner, repository, kind, revision, *rest = [*self.path.strip("/").split("/"), *4 * [""]]
                if kind != "resolve":
                    return self.refuse("EntryNotFound")  # the library sends other requests too
                file = "/".join(filter(None, rest))
                hub.requests.append((self.command, file))
                if f"{owner}/{repository}" != NAME:
                    return self.refuse("RepoNotFound")
                if revision not in hub.revisions:
                    return self.refuse("RevisionNotFound")
                commit, folder = hub.revisions[revision]
                if not (folder / file).is_file():
                    return self.refuse("EntryNotFound", commit)
                data = (folder / file).read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def refuse(self, code: str, commit: str | None = None) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                if commit:
                    self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def downloaded(self) -> set[str]:
        return {file for method, file in self.requests if method == "GET"}


def save(folder: Path, seed: int) -> Qwen3_5MoeForCausalLM:
    config = Config.from_dict(
        dict(
            model_type="qwen3_5_moe_text", vocab_size=61, hidden_size=24, num_hidden_layers=4, head_dim=16,
            num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=12, num_experts=5, num_experts_per_tok=2,
            moe_intermediate_size=10, shared_expert_intermediate_size=14,
        )
    )
    model = Qwen3_5MoeForCausalLM(config).init_weights(seed=seed).eval()
    model.save_pretrained(folder, max_shard_size=30_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return model


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, Qwen3_5MoeForCausalLM]]]:
    hub, models = Hub(), {}
    for seed, commit in enumerate((OLD, NEW)):
        folder = tmp_path_factory.mktemp("repository")
        models[commit] = save(folder, seed)
        hub.revisions[commit] = (commit, folder)
    hub.revisions["main"] = hub.revisions[NEW]
    hub.revisions["v1"] = hub.revisions[OLD]
    yield hub, models
    hub.server.shutdown()


@pytest.fixture
def hub(
    repository: tuple[Hub, dict[str, Qwen3_5MoeForCausalLM]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    hub, _ = repository
    settings = {
        "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hub.requests.clear()
    revisions = dict(hub.revisions)
    yield hub
    hub.revisions = revisions


@pytest.fixture
def models(repository: tuple[Hub, dict[str, Qwen3_5MoeForCausalLM]]) -> dict[str, Qwen3_5MoeForCausalLM]:
    return repository[1]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_hub_name_loads_and_only_what_is_needed_is_downloaded(hub: Hub, models: dict[str, Qwen3_5MoeForCausalLM]) -> None:
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(NAME), models[NEW])
    got = hub.downloaded()
    assert {"config.json", "model.safetensors.index.json"} <= got and sum(f.endswith(".safetensors") for f in got) > 2
    assert all(file.endswith((".json", ".safetensors")) for file in got) and "tokenizer.json" not in got


def test_a_second_start_sends_no_request(
    hub: Hub, models: dict[str, Qwen3_5MoeForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(NAME)
    hub.requests.clear()
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(NAME), models[NEW]) and hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(NAME), models[NEW]) and hub.requests == []


def test_a_revision_is_pinned(hub: Hub, models: dict[str, Qwen3_5MoeForCausalLM]) -> None:
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(NAME, revision="v1"), models[OLD])
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(NAME, revision=NEW), models[NEW])
    assert fetch(NAME, revision=OLD).name == OLD and fetch(NAME).name == NEW


def test_a_branch_that_moves_while_it_is_fetched_is_read_from_one_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.revisions["main"] = hub.revisions[OLD]
    real = huggingface_hub.hf_hub_download

    def moving(name: str, file: str, **options: object) -> str:
        path = real(name, file, **options)  # type: ignore[arg-type]
        hub.revisions["main"] = hub.revisions[NEW]
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moving)
    folder = fetch(NAME)
    assert folder.name == OLD
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert files and all((folder / file).exists() for file in files)


def test_an_interrupted_download_is_completed(hub: Hub) -> None:
    folder = fetch(NAME)
    shard = next(folder.glob("*.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    hub.requests.clear()
    assert fetch(NAME) == folder and shard.exists()
    assert hub.downloaded() == {shard.name}


def test_only_the_shards_of_wanted_tensors_are_downloaded(hub: Hub) -> None:
    folder = fetch(NAME, wanted=lambda name: ".layers.0." in name)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in weight_map.items() if ".layers.0." in name}
    assert {file for file in hub.downloaded() if file.endswith(".safetensors")} == wanted < set(weight_map.values())


def test_required_and_optional_files(hub: Hub) -> None:
    folder = fetch(NAME, required=["tokenizer.json"], optional=["chat_template.jinja"])
    assert (folder / "tokenizer.json").exists() and not (folder / "chat_template.jinja").exists()
    with pytest.raises(CheckpointError, match=rf"owner/tiny-moe on the Hub \(commit {NEW}\) lacks vocabulary.json"):
        fetch(NAME, required=["vocabulary.json"])


def test_unavailable_files_are_reported(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no folder owner/other, and owner/other cannot be fetched from the Hub"):
        fetch("owner/other")
    with pytest.raises(CheckpointError, match="owner/tiny-moe at revision v9 cannot be fetched"):
        fetch(NAME, revision="v9")
    with pytest.raises(CheckpointError, match=r"revision='v1' needs a name on the Hub"):
        folder_of(tmp_path, revision="v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot be fetched from the Hub"):
        fetch(NAME)


def test_an_index_may_not_name_files_outside(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, file in enumerate(("../../secret.safetensors", "/etc/passwd", "x/../y.safetensors", "weights.bin")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        commit = "3" * 39 + str(number)
        hub.revisions["main"] = hub.revisions[commit] = (commit, folder)
        with pytest.raises(CheckpointError, match="must name a .safetensors file of the repository"):
            fetch(NAME)
