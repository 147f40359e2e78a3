"""`linear` in the form `gemv` disables oneDNN for the whole process: it never does so while another thread runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.backends import measured
from qwen35moe.ops.cpu import products

BF16 = torch.bfloat16
REASON = "another thread runs, and the switch of oneDNN is the process's"


@contextmanager
def running(kind: type[threading.Thread] = threading.Thread) -> Iterator[None]:
    """A second Python thread, which waits."""
    stop = threading.Event()
    thread = kind(target=stop.wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that were there before the test (of xdist, say) are not counted."""
    before, enumerate_threads = set(threading.enumerate()) - {threading.current_thread()}, threading.enumerate

    def others() -> list[threading.Thread]:
        return [thread for thread in enumerate_threads() if thread not in before]

    monkeypatch.setattr(threading, "enumerate", others)
    monkeypatch.setattr(threading, "active_count", lambda: len(others()))


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """gemv as the fastest form for one bfloat16 row, on any processor; records every use of oneDNN's switch."""
    uses: list[bool] = []
    switch = torch._C._set_mkldnn_enabled

    def record(value: bool) -> None:
        uses.append(value)
        switch(value)

    monkeypatch.setattr(torch._C, "_set_mkldnn_enabled", record)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: True)  # also in a build without oneDNN
    monkeypatch.setattr(products, "_CHOSEN", {(BF16, 0): "gemv"})
    monkeypatch.setattr(products, "SMALL", 1)
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    monkeypatch.setattr(measured, "allowed", lambda: True)
    return uses


def row_and_weight() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 48).to(BF16), torch.randn(40, 48).to(BF16)


@pytest.mark.usefixtures("alone")
def test_the_switch_is_used_without_other_threads_and_set_back(switched: list[bool]) -> None:
    x, weight = row_and_weight()
    y = products.product(x, weight)
    assert switched == [False, True]
    assert (y.double() - x.double() @ weight.double().t()).abs().max() <= 2**-7 * y.abs().max()
    with pytest.raises(RuntimeError):
        products.gemv_product(x[:, :-1], weight)
    assert switched == [False, True, False, True]


@pytest.mark.usefixtures("alone")
def test_with_a_second_thread_the_form_is_refused(switched: list[bool]) -> None:
    x, weight = row_and_weight()
    assert products.refusal("gemv", 1, weight) is None and products.fastest(1, weight) == "gemv"
    with running():
        assert products.refusal("gemv", 1, weight) == REASON and products.fastest(1, weight) == "torch"
        assert torch.equal(products.product(x, weight), products.torch_product(x, weight))
    assert not switched
    assert products.refusal("gemv", 1, weight) is None  # the thread has ended


@pytest.mark.usefixtures("alone")
def test_a_choice_by_name_does_not_override_it(switched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = row_and_weight()
    monkeypatch.setattr(products, "choice_of", lambda operation: "gemv")
    products.product(x, weight)
    assert switched == [False, True]
    with running():
        products.product(x, weight)
    assert switched == [False, True]


@pytest.mark.usefixtures("alone")
def test_nothing_is_measured_beside_another_thread(switched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = row_and_weight()
    monkeypatch.setattr(products, "_CHOSEN", {})
    compared: list[list[str]] = []

    def first(operation: str, kind: str, forms: dict[str, Any]) -> str:
        compared.append(list(forms))
        return next(iter(forms))

    monkeypatch.setattr(measured, "fastest", first)
    with running():
        assert products.fastest(1, weight) == "torch"
    assert not compared and not switched
    products.fastest(1, weight)
    assert len(compared) == 1 and "gemv" in compared[0]


@pytest.mark.usefixtures("alone")
def test_results_of_another_thread_stay_the_same(switched: list[bool]) -> None:
    """Another thread multiplies while this one decodes: its bits, and whether oneDNN is on, are those of a lone thread."""
    weight, (x, other) = torch.randn(72, 96).to(BF16), (torch.randn(rows, 96).to(BF16) for rows in (1, 5))
    expected = torch.nn.functional.linear(other, weight)
    started, stop, results = threading.Event(), threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            results.append(torch.equal(torch.nn.functional.linear(other, weight), expected))
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    for _ in range(50):
        products.product(x, weight)
    stop.set()
    thread.join()
    assert results and all(results) and not switched


@pytest.mark.usefixtures("alone")
def test_from_a_thread_that_is_not_the_first_it_is_refused_too(switched: list[bool]) -> None:
    x, weight = row_and_weight()
    reasons: list[str | None] = []

    def work() -> None:
        reasons.append(products.refusal("gemv", 1, weight))
        products.product(x, weight)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert reasons == [REASON] * 3 and not switched


@pytest.mark.usefixtures("alone")
def test_the_monitor_of_tqdm_does_not_count(switched: list[bool]) -> None:
    class TMonitor(threading.Thread):
        pass

    x, weight = row_and_weight()
    with running(TMonitor):
        products.product(x, weight)
        assert switched == [False, True]
        with running():
            products.product(x, weight)
    assert switched == [False, True]
