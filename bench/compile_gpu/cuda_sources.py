"""CUDA sources, compiled by nvcc. Each names its kernels' register budgets in comments:

// max-registers: gather_kernel 40
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.compile_gpu import machine_code
from bench.compile_gpu.kernel import ARCHS, ROOT, Kernel

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "compile_gpu"  # cubins, by everything that they depend on

_BUDGET = re.compile(r"^// max-registers: (\w+) (\d+)$", re.M)


@dataclass(frozen=True, slots=True)
class CudaJob:
    """One source on one architecture."""

    source: Path
    arch: int

    def run(self) -> tuple[list[Kernel], float]:
        """Its kernels by name, and the seconds that compiling took (0 from the cache)."""
        cubin, seconds = _compile(self.source, self.arch)
        budgets = {name: int(limit) for name, limit in _BUDGET.findall(self.source.read_text())}
        code = machine_code.read(cubin)
        kernels = [self._kernel(name, code[mangled], budgets) for mangled, name in _demangled(list(code)).items()]
        unknown = sorted(name for name in budgets if not any(_function(k.name) == name for k in kernels))
        if unknown:
            raise ValueError(f"{self._relative}: max-registers of {', '.join(unknown)}, no such kernel in it")
        return sorted(kernels, key=lambda kernel: kernel.name), seconds

    @property
    def _relative(self) -> str:
        source = self.source.resolve()
        return source.relative_to(ROOT).as_posix() if source.is_relative_to(ROOT) else source.name

    def _kernel(self, name: str, code: machine_code.MachineCode, budgets: dict[str, int]) -> Kernel:
        return Kernel(
            language="cuda",
            source=self._relative,
            name=name,
            arch=self.arch,
            compiler=compiler(),
            registers=code.registers,
            max_registers=budgets.get(_function(name)),
            shared_bytes=code.shared_bytes,
            stack_bytes=code.stack_bytes,
            local_bytes=code.local_bytes,
            local_accesses=code.local_accesses,
            fp64_instructions=code.fp64_instructions,
            load_bytes=code.load_bytes,
            store_bytes=code.store_bytes,
        )


@cache
def nvcc() -> str | None:
    """As setup.py looks for it: on PATH, then in CUDA_HOME."""
    inside = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin", "nvcc")
    return shutil.which("nvcc") or (str(inside) if os.access(inside, os.X_OK) else None)


@cache
def compiler() -> str:
    tool = nvcc()
    assert tool is not None
    output = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release \S+, V(\S+)", output)
    return f"nvcc {version[1] if version else 'of unknown version'}"


def reason_unavailable() -> str | None:
    return None if nvcc() else "there is no nvcc on PATH or in CUDA_HOME/bin"


def jobs(sources: list[Path] | None = None, archs: tuple[int, ...] = ARCHS) -> list[CudaJob]:
    files = sorted(CSRC.rglob("*.cu")) if sources is None else sources
    return [CudaJob(source, arch) for source in files for arch in archs]


def _compile(source: Path, arch: int) -> tuple[Path, float]:
    tool = nvcc()
    assert tool is not None
    # As setup.py compiles them.
    options = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", f"-I{CSRC}"]
    digest = hashlib.sha256(f"{compiler()} {options[:-1]}".encode())
    # Any header may be included: together they are small.
    for path in (source, *sorted(CSRC.rglob("*.h")), *sorted(CSRC.rglob("*.cuh"))):
        digest.update(path.read_bytes())
    cubin = CACHE / f"{source.stem}-sm_{arch}-{digest.hexdigest()[:16]}.cubin"
    if cubin.exists():
        return cubin, 0.0
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = cubin.with_suffix(f".{os.getpid()}.partial")
    begin = time.perf_counter()
    done = subprocess.run([tool, *options, source, "-o", partial], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {source.name} for sm_{arch}:\n{done.stderr.strip()}")
    partial.replace(cubin)
    return cubin, time.perf_counter() - begin


def _demangled(mangled: list[str]) -> dict[str, str]:
    """Mangled name -> `kernel<float, int>`. The name of an unnamed namespace has a hash in it, and is dropped."""
    filtered = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {m: _short(full) for m, full in zip(mangled, filtered.splitlines(), strict=True)}


def _short(demangled: str) -> str:
    """Of `void (anonymous namespace)::kernel<float, (int)8>(float*)` the `kernel<float, 8>`."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled)
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)(\w+)", r"\1", name)
    before_arguments = re.match(r"(?:void )?([^()]*)", name)
    return before_arguments[1].strip() if before_arguments else name


def _function(name: str) -> str:
    return name.split("<", 1)[0].rsplit("::", 1)[-1]
