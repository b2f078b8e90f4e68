"""What can be wrong with launches that raised nothing."""

from collections.abc import Iterable
from typing import Any

from bench.compile_gpu import machine_code
from bench.launch_check.driver import Compiled


def fp64(kernel: Compiled) -> list[str]:
    """Arguments of 64 bits: kernels take fp32, and a GPU computes fp64 at a 64th of its rate. And the arithmetic."""
    found = [f"argument {name} is {kind}" for name, kind in kernel.types.items() if kind.lstrip("*") == "fp64"]
    if count := machine_code.read_ptx(kernel.ptx.read_text()).fp64_instructions:
        found.append(f"{count} fp64 instructions in its PTX")
    return [f"{kernel.name}: {what}" for what in found]


def changed_globals(functions: Iterable[Any]) -> list[str]:
    """Globals that no longer equal what a kernel was compiled with: Triton then refuses to launch it, in some calls.

    A NaN never equals itself. And a launch that does not go through Triton's own path would use the old value.
    """
    found = []
    for function in functions:
        for (name, _), (compiled, scope) in function.used_global_vals.items():
            if (now := scope.get(name)) != compiled:
                found.append(f"{function.__name__}: global {name} was {compiled} at compilation and is {now} now")
    return found
