"""Prepared launches are Triton's own: the variant for the tensors at hand, in eager code and whatever ran before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import launch_kernels
import triton
from triton import knobs
from triton.runtime import JITFunction

from asyncopd.kernels import launch as launch_module
from asyncopd.kernels.launch import Prepared
from bench.launch_check.driver import Launch, Recorder, stand_in

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret or torch.cuda.is_available(), reason="compiled kernels, on a machine without a GPU"
)
MEMORY = torch.zeros(512)
X, Y = MEMORY[:128], MEMORY[128:256]
REST = (96, 32, 5, 0.5, 128, "add")  # size, stride, plain, factor, BLOCK and WORD of `every_argument`
TENSORS: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "base": (X, Y, Y),
    "one + 4 bytes": (MEMORY[1:129], Y, Y),
    "another + 4 bytes": (X, MEMORY[129:257], Y),
    "all + 8 bytes": (MEMORY[2:130], MEMORY[130:258], MEMORY[130:258]),
    "+ 16 bytes": (MEMORY[4:132], Y, Y),
    "bf16": (torch.zeros(128, dtype=torch.bfloat16), Y, Y),
    "int64": (X, Y, torch.zeros(128, dtype=torch.int64)),
    "parameter": (torch.nn.Parameter(X, requires_grad=False), Y, Y),
}


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with stand_in(keep_launches=True) as recorder:
            yield recorder


@pytest.fixture
def own_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that Triton's own path launches."""
    found: list[str] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


def only(recorder: Recorder) -> Launch:
    assert recorder.launches is not None
    (launch,) = recorder.launches
    recorder.launches.clear()
    return launch


def by_triton(recorder: Recorder, programs: int, *args: Any, num_warps: int = 4, **options: Any) -> Launch:
    kernel = launch_kernels.every_argument
    kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=True, **options)
    return only(recorder)


def assert_same(actual: Launch, expected: Launch) -> None:
    for name in ("function", "grid", "types", "binary", "handle", "packed_metadata"):
        assert getattr(actual, name) == getattr(expected, name), name
    for ours, theirs in zip(actual.arguments, expected.arguments, strict=True):
        assert ours is theirs or (type(ours) is type(theirs) and ours == theirs)


def test_every_launch_is_that_of_triton(recorder: Recorder, own_launches: list[str]) -> None:
    expected = {name: by_triton(recorder, 3, *tensors, *REST) for name, tensors in TENSORS.items()}
    assert len({launch.binary for launch in expected.values()}) == len(TENSORS) - 2  # + 16 bytes, parameter
    prepared = Prepared(launch_kernels.every_argument, *REST, num_warps=4)
    names = list(TENSORS)
    for name in [*names, *names]:  # first what `launch` finds is kept, once the key's form is known
        prepared(3, *TENSORS[name])
        assert_same(only(recorder), expected[name])
    own_launches.clear()
    for name in [*reversed(names), *names[::2], *names[1::2]]:
        for called in (name, "base"):
            prepared(3, *TENSORS[called])
            assert_same(only(recorder), expected[called])
    assert bool(own_launches) != launch_module.DIRECT


def test_what_is_prepared_is_one_variant_each(recorder: Recorder) -> None:
    """Equal tensors, other numbers: no launch takes what another prepared."""
    rests = [REST, (1, *REST[1:]), (97, *REST[1:]), (2**31, *REST[1:]), (*REST[:4], 64, "none")]
    prepared = [Prepared(launch_kernels.every_argument, *rest, num_warps=4) for rest in rests]
    prepared.append(Prepared(launch_kernels.every_argument, *REST, num_warps=2, num_stages=2))
    for _ in range(3):
        for rest, call in zip(rests, prepared, strict=False):
            call(2, X, Y, Y)
            assert_same(only(recorder), by_triton(recorder, 2, X, Y, Y, *rest))
        prepared[-1](2, X, Y, Y)
        actual = only(recorder)
        assert_same(actual, by_triton(recorder, 2, X, Y, Y, *REST, num_warps=2, num_stages=2))


def test_numbers_at_the_call(recorder: Recorder, own_launches: list[str]) -> None:
    """An int that Triton does not specialise, whatever its value; beyond 32 bits it is another variant."""
    prepared = Prepared(launch_kernels.every_argument, 0.5, 128, "add", num_warps=4)
    leading = [(X, Y, Y, 96, 32, plain) for plain in (5, 1, 16, -1, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1)]
    for _ in range(2):
        for args in leading:
            prepared(1, *args)
            assert_same(only(recorder), by_triton(recorder, 1, *args, 0.5, 128, "add"))
    own_launches.clear()
    prepared(1, X, Y, Y, 96, 32, 12345)
    recorder.launches.clear()  # type: ignore[union-attr]
    assert bool(own_launches) != launch_module.DIRECT


def test_triton_launches_where_hooks_are_set(recorder: Recorder, own_launches: list[str]) -> None:
    prepared = Prepared(launch_kernels.every_argument, *REST, num_warps=4)
    for _ in range(3):
        prepared(1, X, Y, Y)
    own_launches.clear()
    knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    try:
        prepared(1, X, Y, Y)
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    assert own_launches == ["every_argument"]
    recorder.launches.clear()  # type: ignore[union-attr]


def test_triton_launches_in_versions_that_were_not_tested(
    recorder: Recorder, own_launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared(launch_kernels.every_argument, *REST, num_warps=4)
    for _ in range(3):
        prepared(1, X, Y, Y)
    own_launches.clear()
    monkeypatch.setattr(launch_module, "DIRECT", False)
    for _ in range(2):
        prepared(1, X, Y, Y)
    assert own_launches == ["every_argument"] * 2
    recorder.launches.clear()  # type: ignore[union-attr]


@pytest.mark.parametrize(("way", "devices"), [("prepared", (1, 2)), ("launch", (3, 4))])
def test_each_device_has_its_own_kernel(
    recorder: Recorder,
    own_launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    devices: tuple[int, int],
) -> None:
    """A kernel is loaded on one device; what runs on another is loaded there, by Triton's path."""
    kernel = launch_kernels.every_argument
    prepared = Prepared(kernel, *REST, num_warps=4)
    by_triton = []
    for device in (*devices, *devices):
        monkeypatch.setattr(triton.runtime.driver.active, "get_current_device", lambda device=device: device)
        for _ in range(3):
            if way == "prepared":
                prepared(1, X, Y, Y)
            else:
                launch_module.launch(kernel, 1, X, Y, Y, *REST, num_warps=4)
        by_triton.append(len(own_launches))
    assert by_triton == ([1, 2, 2, 2] if launch_module.DIRECT else [3, 6, 9, 12])
    recorder.launches.clear()  # type: ignore[union-attr]
