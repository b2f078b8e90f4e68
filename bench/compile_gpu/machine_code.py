"""What a compiled kernel needs and does, read from its cubin with cuobjdump.

Spills show as a stack frame and as LDL/STL instructions; `LOCAL:`, which cuobjdump reports too, stays 0 then.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_GLOBAL = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)")
_PTX_ACCESS = re.compile(r"\b(ld|st)(?:\.\w+)*?\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
# To shared memory, past the registers.
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")
_PTX_FP64 = re.compile(r"^\s*(?:@\S+ )?\w[\w.]*\.f64\b", re.M)
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
# Arithmetic, conversions and the seeds of division and square root.
_FP64 = re.compile(r"\bD(?:ADD|MUL|FMA|MNMX|SETP|MMA)\b|\.F64\b|\b(?:RCP|RSQ)64H\b")


class ToolMissing(RuntimeError):
    """A compiler or disassembler is not on this machine; the message says which and where it would come from."""


@dataclass(frozen=True, slots=True)
class MachineCode:
    """A kernel's registers per thread, static bytes of each memory, and what its instructions (SASS) do."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int
    local_accesses: int
    fp64_instructions: int
    load_bytes: int  # of the widest global load of a thread; 0 without one. Bulk copies (TMA) are no thread's
    store_bytes: int


@cache
def cuobjdump() -> str:
    """The CUDA toolkit's, or else the one in triton's wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise ToolMissing("no cuobjdump on PATH or in triton's wheel (pip install 'asyncopd[triton]')")


def _dump(option: str, cubin: Path) -> str:
    tool = cuobjdump()
    # It calls nvdisasm, which lies beside it.
    env = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True, env=env).stdout


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel needs: registers per thread, static bytes of each memory. A spill has a stack frame."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


def usage(cubin: Path) -> dict[str, Usage]:
    """Mangled kernel name -> what it needs; without its instructions, which take a hundred times as long to read."""
    return {name: Usage(*map(int, numbers)) for name, *numbers in _USAGE.findall(_dump("-res-usage", cubin))}


@dataclass(frozen=True, slots=True)
class Ptx:
    """What the instructions of a kernel's PTX do; of loads and stores the widest of a thread."""

    fp64_instructions: int
    load_bytes: int
    store_bytes: int


def read_ptx(ptx: str) -> Ptx:
    widths = {"ld": 0, "st": 0}
    for opcode, vector, bits in _PTX_ACCESS.findall(ptx):
        widths[opcode] = max(widths[opcode], int(vector or 1) * int(bits) // 8)
    copies = [int(size, 0) for size in _PTX_COPY.findall(ptx)]
    return Ptx(len(_PTX_FP64.findall(ptx)), max([widths["ld"], *copies]), widths["st"])


def read(cubin: Path) -> dict[str, MachineCode]:
    """Mangled kernel name -> what is known of it."""
    code: dict[str, str] = {}
    for section in re.split(r"^\s*Function : ", _dump("-sass", cubin), flags=re.M)[1:]:
        name, _, sass = section.partition("\n")
        code[name.strip()] = sass
    lines = _USAGE.findall(_dump("-res-usage", cubin))
    kernels = {name: _describe(code[name], *map(int, numbers)) for name, *numbers in lines if name in code}
    if not kernels or len(kernels) != len(code):
        raise RuntimeError(f"cuobjdump: {len(lines)} resource lines for the {len(code)} kernels of {cubin.name}")
    return kernels


def _describe(sass: str, registers: int, stack: int, shared: int, local: int) -> MachineCode:
    widest = {"load": 0, "store": 0}
    for opcode, modifiers in _GLOBAL.findall(sass):
        kind = "store" if opcode == "STG" else "load"
        widest[kind] = max(widest[kind], _access_bytes(modifiers))
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        local_bytes=local,
        local_accesses=len(_LOCAL.findall(sass)),
        fp64_instructions=len(_FP64.findall(sass)),
        load_bytes=widest["load"],
        store_bytes=widest["store"],
    )


def _access_bytes(modifiers: str) -> int:
    """Of ".E.128.CONSTANT" 16, of ".E.U16" 2; an access without a size has 4."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)
    return int(sizes[0]) // 8 if sizes else 4
