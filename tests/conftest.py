"""Fixtures that run one test on every backend of this machine.

`engine` is a backend's name, forced for the test, or "auto": whatever the device and dtype choose. `backend` is an
engine with a dtype and tolerances. A test names the ops it needs with `@pytest.mark.ops(...)`; a backend that lacks one
of them does not get the test. Tests hold CPU tensors; for a GPU's backend they are carried there and back (carried.py).
"""

import carried
import pytest
import torch
from each_backend import DEVICES, Backend, runs

from asyncopd import backends


def _engines(ops: set[str], host_only: bool) -> list[str]:
    native = [name for name in backends.BACKENDS if name != "reference" and runs(name)]
    if host_only:
        native = [name for name in native if DEVICES.get(name, "cpu") == "cpu"]
    whole = [name for name in native if all(backends.has_op(name, op) for op in ops)]
    mixed = any(backends.has_op(name, op) for name in native for op in ops) and not whole
    return ["reference", *whole, *(["auto"] if mixed else [])]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops of asyncopd.backends that a test runs")
    config.addinivalue_line("markers", "host_only: about CPU tensors themselves, of which a GPU's backend gets copies")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Processes that share the tests out (pytest-xdist) have to agree on their names.
    addresses = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not addresses, f"names with an address in them, give ids=label: {addresses[:3]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ops = {op for mark in metafunc.definition.iter_markers("ops") for op in mark.args}
    host_only = metafunc.definition.get_closest_marker("host_only") is not None
    if "engine" in metafunc.fixturenames and "backend" not in metafunc.fixturenames:
        assert ops, "a test that runs on every backend names its ops"
        metafunc.parametrize("engine", _engines(ops, host_only), indirect=True)
    if "backend" in metafunc.fixturenames:
        assert ops, "a test that runs on every backend names its ops"
        choices = [("reference", torch.float64), *((name, torch.float32) for name in _engines(ops, host_only))]
        ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in choices]
        metafunc.parametrize("backend", choices, ids=ids, indirect=True)


def _force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "auto":
        monkeypatch.delenv("ASYNCOPD_BACKEND", raising=False)
    else:
        monkeypatch.setenv("ASYNCOPD_BACKEND", name)
    if DEVICES.get(name, "cpu") != "cpu":
        carried.install(monkeypatch, name, DEVICES[name])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors here are small: a second thread would only be waited for. Tests of threads choose their own number."""
    torch.set_num_threads(1)


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    _force(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    name, dtype = request.param
    _force(name, monkeypatch)
    return Backend(name, dtype)


@pytest.fixture
def rng() -> torch.Generator:
    """Random inputs that are the same in every run and whatever ran before."""
    return torch.Generator().manual_seed(0)
