"""What ran: `backends.ran`, the log and `backends.describe`."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.backends import record
from tests.backends.rms_norms import doubled, not_on_cuda, odd_width, run


class Norm(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return backends.run("rms_norm", x, self.weight, eps=1.0, caller=self)


@pytest.mark.usefixtures("own_table")
class TestRan:
    def test_counts_names_layers_and_shapes_are_recorded(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled, odd_width, before="torch")
        with backends.ran() as ran:
            for layer in (0, 1, 2, 4):
                Norm(f"layers.{layer}.norm")(arguments[0])
            run((torch.ones(5), torch.ones(5)))
        run(arguments)
        assert ran.counts == {("rms_norm", "fast"): 4, ("rms_norm", "torch"): 1}
        assert ran.calls[0] == ("rms_norm", "fast", "layers.0.norm", ((2, 3, 4), (4,)))
        assert ran.calls[-1] == ("rms_norm", "torch", "", ((5,), (5,)))
        lines = str(ran).splitlines()
        assert lines[0].split() == ["operation", "ran", "calls", "where", "shapes"]
        assert lines[1].split() == ["rms_norm", "fast", "4", "layers.{0-2,4}.norm", "[2,", "3,", "4]", "[4]"]

    def test_blocks_can_be_nested(self, arguments: tuple[Tensor, Tensor]) -> None:
        with backends.ran() as outer:
            run(arguments)
            with backends.ran() as inner:
                run(arguments)
        assert (len(outer.calls), len(inner.calls)) == (2, 1)
        assert not record.RECORDING
        assert str(backends.ran()) == "nothing ran"

    def test_calls_of_the_recomputation_are_recorded(self, arguments: tuple[Tensor, Tensor]) -> None:
        norm = Norm("layers.0.norm")
        with backends.ran() as ran:
            backends.checkpoint(norm, arguments[0]).sum().backward()
        assert ran.counts == {("rms_norm", "torch"): 2}


@pytest.mark.usefixtures("own_table")
class TestLog:
    def messages(self, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    def test_one_message_per_operation(self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        for _ in range(3):
            run(arguments)
        assert self.messages(caplog) == [("INFO", "rms_norm runs on 'torch'")]

    def test_an_unsupported_fast_implementation_is_one_warning(
        self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", doubled, not_on_cuda, before="torch")
        for _ in range(3):
            run(arguments)
        message = "rms_norm runs on 'torch' (fast was refused: query is on cpu, not on CUDA)"
        assert self.messages(caplog) == [("WARNING", message)]

    def test_an_implementation_that_ran_before_and_is_unsupported_is_a_warning(
        self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", doubled, odd_width, before="torch")
        for width in (4, 5, 4, 5):
            run((torch.ones(width), torch.ones(width)))
        assert [level for level, _ in self.messages(caplog)] == ["INFO", "WARNING"]

    def test_an_implementation_that_is_not_installed_is_no_warning(
        self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", None, before="torch", missing="fast_norms is not installed")
        run(arguments)
        message = "rms_norm runs on 'torch' (fast was refused: fast_norms is not installed)"
        assert self.messages(caplog) == [("INFO", message)]


@pytest.mark.usefixtures("own_table")
class TestDescribe:
    def test_every_implementation_with_the_reason_why_it_ran_or_not(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "gone", None, before="torch", missing="gone is not installed")
        backends.register("rms_norm", "fast", doubled, not_on_cuda, before="torch")
        backends.register("rms_norm", "slow", doubled)
        assert self.lines() == {
            "gone": "not on this machine: gone is not installed",
            "fast": "not needed yet",
            "torch": "runs anything",
            "slow": "only when chosen: torch comes first and runs anything",
        }
        run(arguments)
        lines = self.lines()
        assert lines["fast"] == "refused: query is on cpu, not on CUDA"
        assert lines["torch"] == "ran in the last call"
        with backends.use(rms_norm="slow"):
            assert self.lines()["slow"] == "chosen by backends.use"
            assert self.lines()["torch"] == "passed over: slow is chosen"

    def test_the_choice_for_the_arguments_of_a_call(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled, not_on_cuda, before="torch")
        text = backends.describe("rms_norm", *arguments, eps=1.0)
        assert "fast          cannot run these arguments: query is on cpu, not on CUDA" in text
        assert "torch         runs these arguments" in text
        with backends.use(rms_norm="fast"):
            assert "not on CUDA (and is chosen)" in backends.describe("rms_norm", *arguments, eps=1.0)

    def test_all_operations_are_listed(self) -> None:
        text = backends.describe()
        assert all(f"\n{operation}\n" in f"\n{text}\n" for operation in backends.OPERATIONS)

    def lines(self) -> dict[str, str]:
        first, *rest = backends.describe("rms_norm").splitlines()
        assert first == "rms_norm"
        return {name: reason.strip() for name, _, reason in (line.strip().partition(" ") for line in rest)}
