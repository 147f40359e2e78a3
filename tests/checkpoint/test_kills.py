"""A save that is killed at any moment leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_replace import FORMS, outcome_of
from tests.checkpoint.test_write import drawn

KILLS = 100
pytestmark = pytest.mark.usefixtures("quick_disk")


def saving(path: Path, models: list[Any], first: int, pipe: int) -> int:
    """A child process that saves the models in turn, in varying forms, and writes a byte after each; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool do not exist in the child
            forms = list(FORMS.values())
            os.write(pipe, b"+")
            for number in range(first, first + 10_000):
                layout = ("grouped", "per_expert")[number % 2]
                models[number % len(models)].save_pretrained(path, layout=layout, max_shard_size=forms[number % 4 % 3])
                os.write(pipe, b"+")
        finally:
            os._exit(1)
    return child


def seconds_of_a_save(path: Path, models: list[Any]) -> float:
    """The mean time of the first six saves of `saving`."""
    read, write = os.pipe()
    child = saving(path, models, 0, write)
    os.close(write)
    try:
        assert os.read(read, 1) == b"+"
        start, finished = time.monotonic(), 0
        while finished < 6:
            written = os.read(read, 100)
            assert written, "the child process has ended"
            finished += len(written)
        return (time.monotonic() - start) / finished
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_hundred_kills_at_random_moments(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three models of different sizes are saved over one another in turn until the process is killed: a hundred times, and
    until 25 kills came while files were being written and one just after, and 20 saves were finished. The moments of the
    kills are measured in saves of this machine.

    After k finished saves the folder contains the model of save k or, if it was just committed, of save k + 1; never an
    older one, a mixture, or no model.
    """
    models = [drawn(1), drawn(2, num_experts=3), drawn(3, num_experts=4, num_hidden_layers=1, layer_types=["full_attention"])]
    models[0].save_pretrained(tmp_path)
    seconds = seconds_of_a_save(tmp_path_factory.mktemp("timed"), models)
    rng, now, interrupted, later, kills = random.Random(0), 0, 0, 0, 0
    while kills < KILLS or ((interrupted < KILLS // 4 or now < 20 or not later) and kills < 4 * KILLS):
        kills += 1
        read, write = os.pipe()
        child = saving(tmp_path, models, now + 1, write)
        os.close(write)
        try:
            assert os.read(read, 1) == b"+"
            time.sleep(rng.uniform(0, 4 * seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            finished = len(os.read(read, 20_000))
        finally:
            os.close(read)
        assert status == -signal.SIGKILL
        interrupted += any(tmp_path.glob(".saving-*"))
        outcome = outcome_of(tmp_path, *models)
        assert outcome in ((now + finished) % 3, (now + finished + 1) % 3)
        later += outcome == (now + finished + 1) % 3
        now += finished + (outcome != (now + finished) % 3)
    assert interrupted >= KILLS // 4, f"only {interrupted} kills came while files were being written"
    assert now >= 20 and later >= 1, (now, later)
    models[0].save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
