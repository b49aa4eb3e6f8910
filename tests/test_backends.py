"""Choosing an implementation."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import rds_fast
from rds_fast import backends


def test_reference_is_always_available() -> None:
    assert "reference" in rds_fast.backends.available()
    assert "reference" in rds_fast.backends.available("cpu")
    assert rds_fast.backends.available(torch.device("mps")) == ("reference",)


@pytest.mark.parametrize("device", ["bogus", "", "cpu:x", 1.5, torch.ones(1)], ids=repr)
def test_a_device_that_is_none(device: object) -> None:
    with pytest.raises(ValueError, match=r"device is .*; it must be a torch\.device or the name of one, such as 'cpu'"):
        backends.available(device)


def test_auto_on_cpu_is_native_where_it_was_built() -> None:
    expected = "native" if "native" in backends.available("cpu") else "reference"
    assert backends.select(torch.ones(1)) == expected


def test_use_backend_nests_and_is_left_on_an_exception() -> None:
    x = torch.ones(1)
    before = backends.select(x)
    with rds_fast.use_backend("reference"):
        with rds_fast.use_backend("auto"):
            assert backends.select(x) == before
        assert backends.select(x) == "reference"
    with contextlib.suppress(KeyError), rds_fast.use_backend("reference"):
        raise KeyError
    assert backends.select(x) == before


def test_another_thread_keeps_its_own_choice() -> None:
    seen = []
    with rds_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.select(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen == [backends.automatic("cpu")]


def test_an_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="backend is 'cuda'; it must be one of 'auto', 'reference', 'native', 'triton'"),
        rds_fast.use_backend("cuda"),
    ):
        pass


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._triton_failure.cache_clear()
    with rds_fast.use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was requested .* on cpu"):
        rds_fast.logsumexp(torch.ones(2, 3), 1)
    backends._triton_failure.cache_clear()


def test_a_forced_backend_does_not_concern_what_is_made_of_pytorch_s_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._triton_failure.cache_clear()
    x = torch.randn(2, 3, 8, 8)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    with rds_fast.use_backend("triton"), rds_fast.fast_double_backward():
        y = layers(x)
        with pytest.raises(RuntimeError, match=r"'triton' was requested .* on cpu"):
            torch.nn.functional.batch_norm(y, None, None, training=True)
    assert "Convolution" in type(y.grad_fn.next_functions[0][0].next_functions[0][0]).__name__
    assert torch.equal(y, layers(x))
    backends._triton_failure.cache_clear()


def test_the_choice_of_the_forward_holds_in_the_backward() -> None:
    if "native" not in backends.available("cpu"):
        pytest.skip(str(backends.failure("native", "cpu")))
    x = torch.randn(3, 4, requires_grad=True)
    with rds_fast.use_backend("native"):
        lse = rds_fast.logsumexp(x, 1)
    with rds_fast.use_backend("reference"):
        (gx,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    assert "LogSumExpBackward" in type(gx.grad_fn).__name__


def test_a_library_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    backends._native_failure.cache_clear()
    assert "_native_cpu.so was not built" in str(backends.failure("native", "cpu"))
    (tmp_path / "_native_cpu.so").write_text("no library")
    backends._native_failure.cache_clear()
    assert "built for another PyTorch or system" in str(backends.failure("native", "cpu"))
    monkeypatch.undo()
    backends._native_failure.cache_clear()
