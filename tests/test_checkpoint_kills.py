"""A save that is killed at any moment: the folder holds one checkpoint or the other, whole."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_checkpoint_write import FORMS, drawn, outcome_of

KILLS = 100


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote survives it; only a power cut would need the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def saving(path: Path, models: list[Any], first: int, pipe: int) -> int:
    """A child that saves the models in turn, in changing forms, and says so after each; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool are not there
            forms = list(FORMS.values())
            os.write(pipe, b"+")
            for number in range(first, first + 10_000):
                layout = ("grouped", "per_expert")[number % 2]
                models[number % len(models)].save_pretrained(path, layout=layout, max_shard_size=forms[number % 4 % 3])
                os.write(pipe, b"+")
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    """Three models of different sizes are saved in turn over one another until the process is killed, a hundred times and
    until a quarter of a hundred came while files were being written and one just after. A process is killed within four
    times the time that its first save took, however busy the machine is.

    After k saves were finished the folder holds the model of save k or, if that was just made the checkpoint, the one of
    save k + 1; never an older one, a mixture, or nothing.
    """
    models = [drawn(1), drawn(2, num_experts=3), drawn(3, num_experts=4, num_hidden_layers=1, layer_types=["full_attention"])]
    models[0].save_pretrained(tmp_path)
    rng, now, interrupted, later, kills = random.Random(0), 0, 0, 0, 0
    while kills < KILLS or ((interrupted < KILLS // 4 or not later) and kills < 4 * KILLS):
        kills += 1
        read, write = os.pipe()
        child = saving(tmp_path, models, now + 1, write)
        os.close(write)
        try:
            assert os.read(read, 1) == b"+"
            start = time.perf_counter()
            assert os.read(read, 1) == b"+"
            time.sleep(rng.uniform(0, 4) * (time.perf_counter() - start))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            finished = 1 + len(os.read(read, 20_000))
        finally:
            os.close(read)
        assert status == -signal.SIGKILL
        interrupted += any(tmp_path.glob(".saving-*"))
        found = outcome_of(tmp_path, *models)
        assert found in ((now + finished) % 3, (now + finished + 1) % 3)
        later += found == (now + finished + 1) % 3
        now += finished + (found != (now + finished) % 3)
    assert interrupted >= KILLS // 4, f"only {interrupted} kills came while files were being written"
    assert now >= 20 and later >= 1, (now, later)
    models[0].save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
