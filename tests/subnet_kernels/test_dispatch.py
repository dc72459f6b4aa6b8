"""The dispatch point names what runs, and why."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

import subnet_kernels
from subnet_kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
has_numba = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not has_numba, reason="numba is not installed")


@pytest.fixture(autouse=True)
def _forget_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SUBNET_KERNELS_BACKEND", raising=False)
    dispatch._fastest.cache_clear()
    dispatch._implementation.cache_clear()
    yield
    dispatch._fastest.cache_clear()
    dispatch._implementation.cache_clear()


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))


@needs_numba
def test_choose_takes_the_compiled_form_on_the_cpu() -> None:
    choice = subnet_kernels.choose("gather", CPU)
    assert (choice.backend, choice.reason) == ("cpu", "numba compiles for this CPU")
    assert choice.function.__module__ == "subnet_kernels.cpu.copies"


def test_choose_says_when_there_is_only_the_reference() -> None:
    choice = subnet_kernels.choose("pack_bits", CPU)
    assert choice.backend == "reference"
    assert "`pack_bits` has no other implementation" in choice.reason


@pytest.mark.parametrize(("device", "package"), [(CPU, "numba"), (CUDA, "triton")])
def test_choose_says_once_aloud_what_is_missing(
    device: torch.device, package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(package, monkeypatch)
    with caplog.at_level(logging.WARNING):
        choices = [subnet_kernels.choose(op, device) for op in ("gather", "scatter", "gather")]
    assert {(choice.backend, choice.reason) for choice in choices} == {("reference", f"{package} is not installed")}
    assert [record.message.partition(",")[0] for record in caplog.records] == [f"{package} is not installed"]


def test_choose_knows_no_faster_form_for_other_devices() -> None:
    choice = subnet_kernels.choose("gather", torch.device("mps"))
    assert (choice.backend, choice.reason) == ("reference", "there is no faster implementation for mps")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_numba)])
def test_choose_follows_the_environment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", backend)
    choice = subnet_kernels.choose("gather", CPU)
    assert (choice.backend, choice.reason) == (backend, "it was asked for")
    assert subnet_kernels.choose("pack_bits", CPU).backend == "reference"


def test_choose_puts_its_argument_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "cpu")
    assert subnet_kernels.choose("gather", CPU, backend="reference").backend == "reference"


def test_choose_refuses_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "numba")
    with pytest.raises(ValueError, match="`numba` is not a backend; choose one of reference, cpu, triton"):
        subnet_kernels.choose("gather", CPU)


def test_choose_refuses_a_backend_that_cannot_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="`cpu` cannot run on cuda"):
        subnet_kernels.choose("gather", CUDA, backend="cpu")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        subnet_kernels.choose("gather", CPU, backend="triton")


def test_choose_refuses_an_unknown_op() -> None:
    with pytest.raises(KeyError, match="is not an op"):
        subnet_kernels.choose("gahter", CPU)


@needs_numba
def test_backends_name_a_function_of_every_op() -> None:
    chosen = subnet_kernels.backends(CPU)
    assert set(chosen) == set(subnet_kernels.ops.__all__)
    for backend in ("reference", "cpu"):
        for op in (op for op, offered in dispatch._OPS.items() if backend in offered):
            assert callable(subnet_kernels.choose(op, CPU, backend=backend).function), op
