"""Run by test_launch.py: changes one argument at a time and compares what launch() runs with what Triton would."""

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget

from asyncopd.kernels import launch as module
from asyncopd.kernels.launch import launch

runs: list[tuple[int, Any, Any, Any]] = []  # programs, stream, what was loaded, arguments
by_triton = [0]


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        assert (y, z) == (1, 1)
        runs.append((x, stream, function, rest[4:]))


class Utils:
    loaded = 0

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        Utils.loaded += 1
        return 1, Utils.loaded, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, _: int) -> None:
        pass


DRIVER = SimpleNamespace(
    launcher_cls=Launcher,
    utils=Utils(),
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 7,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)


@triton.jit(do_not_specialize=["seed"])
def kernel(out, a, other, n, m, seed, f, C: tl.constexpr):
    value = tl.load(a) + n + m + seed + f + C
    if other is not None:
        value += tl.load(other)
    tl.store(out, value)


def compiled_for(*args: Any, num_warps: int = 4, **more: Any) -> int:
    """What launch() runs, which must be what Triton's own path runs."""
    options = {"num_warps": num_warps, **more}
    launch(kernel, 3, *args, **options)  # first of all through Triton
    before = by_triton[0]
    launch(kernel, 5, *args, **options)
    assert by_triton[0] == before, "a second launch went through Triton"
    programs, stream, function, arguments = runs[-1]
    assert (programs, stream) == (5, 7)
    assert all(mine is given for mine, given in zip(arguments, args, strict=True))
    # Options in launch()'s order: Triton's key has it.
    kernel[(5,)](*args, num_warps=num_warps, enable_fp_fusion=True, **more)
    assert runs[-1][2] == function, f"{function} ran, Triton chooses {runs[-1][2]}"
    return function


def main() -> None:
    triton.runtime.driver.set_active(DRIVER)
    of_triton = kernel.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        by_triton[0] += 1
        return of_triton(*args, **kwargs)

    kernel.run = counted
    out, a, b = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    usual = (out, a, None, 32, 48, 5, 0.5, 2)
    base = compiled_for(*usual)

    def changed(at: int, value: Any) -> int:
        return compiled_for(*usual[:at], value, *usual[at + 1 :])

    def same(at: int, *values: Any) -> None:
        assert all(changed(at, value) == base for value in values), (at, values)

    def another(at: int, *values: Any) -> None:
        found = [changed(at, value) for value in values]
        assert len({base, *found}) == 1 + len(values), (at, values)

    same(1, b, b[4:], b[16:])
    another(1, b[1:], b.half(), b.bfloat16(), b.long(), b.double())
    assert changed(1, b[1:]) == changed(1, b[2:])
    another(2, b, b[1:], b.half())
    for at in (3, 4):
        same(at, 0, 16, 160, 2**31 - 16)
        another(at, 1, 17, 2**31, 2**31 + 1, 2**63, 1.0)
        assert changed(at, 17) == changed(at, 2) == changed(at, -1)
        assert changed(at, -16) == base
        assert changed(at, -(2**31) - 16) == changed(at, 2**31)
        assert changed(at, True) != changed(at, 1)
    same(5, 0, 1, 16, -1, -(2**31))
    another(5, 2**31, 2**63)
    assert changed(5, 2**31) == changed(5, -(2**31) - 1)
    same(6, 1.0, float("inf"), float("nan"), -0.0)
    another(6, 17, 1)
    another(7, 3, 4, 2.5)
    another_device = compiled_for(*usual, num_warps=8)
    assert another_device != base
    assert compiled_for(*usual, num_stages=1) not in (base, another_device)

    # Whoever listens to launches hears all of them.
    heard = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(heard.append)
        before = by_triton[0]
        launch(kernel, 5, *usual, num_warps=4)
        assert by_triton[0] == before + 1
        chain.remove(heard.append)
    # Untested versions.
    module.DIRECT = False
    before = by_triton[0]
    launch(kernel, 5, *usual, num_warps=4)
    assert by_triton[0] == before + 1


main()
