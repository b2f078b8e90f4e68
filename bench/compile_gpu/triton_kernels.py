"""Triton's kernels, at the block sizes and dtypes that their modules name (`compile_cases()`)."""

import ast
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.compile_gpu import machine_code
from bench.compile_gpu.kernel import ARCHS, ROOT, Kernel

PACKAGE = "asyncopd.kernels"
EVERY_CASE = 90  # the architecture on which cases in every dtype are compiled


@dataclass(frozen=True, slots=True)
class TritonJob:
    """One compile case on one architecture, by name: kernels do not travel between processes."""

    module: str
    case: str
    arch: int

    def ptx(self) -> str:
        return str(_compile(_cases(_import(self.module))[self.case], self.arch).asm["ptx"])

    def run(self) -> tuple[list[Kernel], float]:
        """The kernel, and the seconds that compiling took (near 0 where Triton has it in its cache)."""
        source = _import(self.module)
        case = _cases(source)[self.case]
        begin = time.perf_counter()
        compiled = _compile(case, self.arch)
        seconds = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            (needs,) = machine_code.usage(cubin).values()
            # Disassembling takes as long as compiling, and what it would show besides is in the PTX.
            spills = needs.stack_bytes > 0 or needs.local_bytes > 0
            local_accesses = next(iter(machine_code.read(cubin).values())).local_accesses if spills else 0
        # A Python float that became fp64 may be folded away by ptxas and is a fault all the same.
        ptx = machine_code.read_ptx(compiled.asm["ptx"])
        kernel = Kernel(
            language="triton",
            source=_relative(source),
            name=case.name,
            arch=self.arch,
            compiler=compiler(),
            registers=needs.registers,
            max_registers=case.max_registers,
            shared_bytes=compiled.metadata.shared,
            stack_bytes=needs.stack_bytes,
            local_bytes=needs.local_bytes,
            local_accesses=local_accesses,
            fp64_instructions=ptx.fp64_instructions,
            load_bytes=ptx.load_bytes,
            store_bytes=ptx.store_bytes,
        )
        return [kernel], seconds


def compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def reason_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'asyncopd[triton]')"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled"
    return None


def modules() -> list[str]:
    """Every module of kernels/ that has something to compile, in order; ValueError if a launched kernel has no case."""
    files = sorted(path for path in (ROOT / "kernels").rglob("*.py") if path.name != "__init__.py")
    names = [".".join((PACKAGE, *path.relative_to(ROOT / "kernels").with_suffix("").parts)) for path in files]
    found = [name for name in names if hasattr(_import(name), "compile_cases")]
    compiled = {case.kernel.__name__ for name in found for case in _cases(_import(name)).values()}
    require_cases([path.read_text() for path in files], compiled)
    return found


def require_cases(sources: list[str], compiled: set[str]) -> None:
    """ValueError if these modules launch a kernel of theirs that is not compiled: nobody would check it."""
    defined = {function for source in sources for function in _jitted(source)}
    launched = {function for source in sources for function in _launched(source)}
    if missing := sorted((launched & defined) - compiled):
        raise ValueError(f"kernels/: {', '.join(missing)} is launched and no compile_cases() has it")


def _jitted(source: str) -> set[str]:
    """Names of the functions that have a decorator triton.jit."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)}


def _launched(source: str) -> set[str]:
    """X of every `X[...](...)`, `launch(X, ...)` and `Prepared(X, ...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    kernels = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    kernels += [call.args[0] for call in calls if call.args and ast.unparse(call.func) in ("launch", "Prepared")]
    return {ast.unparse(kernel).rsplit(".", 1)[-1] for kernel in kernels}


def jobs(module_names: list[str] | None = None, archs: tuple[int, ...] = ARCHS) -> list[TritonJob]:
    """Of cases that differ in the dtypes of tensors alone, sm_90 has all but fp16 beside bf16; the others have one.

    All of them took twice as long. fp16 has the instructions of bf16; and a dtype changes what is converted, not what
    is designed for an architecture. (bench.launch_check compiles every dtype for sm_90.)
    """
    names = modules() if module_names is None else module_names
    cases = [(name, case) for name in names for case in _cases(_import(name)).values()]
    first: dict[tuple[Any, ...], Any] = {}  # in bf16 if there is one
    for _, case in sorted(cases, key=lambda named: not _takes("*bf16", named[1])):
        first.setdefault(_shape(case), case)

    def wanted(case: Any, arch: int) -> bool:
        twin = first[_shape(case)]
        if arch not in case.archs:
            return False
        if arch == EVERY_CASE:
            return case is twin or not (_takes("*fp16", case) and _takes("*bf16", twin))
        return case is twin

    return [TritonJob(name, case.name, arch) for name, case in cases for arch in archs if wanted(case, arch)]


def _takes(kind: str, case: Any) -> bool:
    return kind in case.signature.values()


def _shape(case: Any) -> tuple[Any, ...]:
    """All that a case is compiled for but the dtypes of its float tensors."""
    types = tuple(re.sub(r"^\*(bf16|fp16|fp32)$", "*float", kind) for kind in case.signature.values())
    constants = tuple(sorted((name, repr(value)) for name, value in case.constexprs.items()))
    return case.kernel.__name__, types, constants, case.num_warps, case.num_stages, case.divisible, case.archs


def _compile(case: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    positions = {name: i for i, name in enumerate(case.signature)}
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constexprs,
        attrs={(positions[name],): [["tt.divisibility", 16]] for name in case.divisible},
    )
    # As kernels are launched: `sum += a * b` is one instruction, and Triton 3.10 changes the default.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _cases(module: ModuleType) -> dict[str, Any]:
    cases = module.compile_cases()
    named = {case.name: case for case in cases}
    if len(named) != len(cases):
        raise ValueError(f"{module.__name__}.compile_cases(): two cases have one name")
    return named


def _import(name: str) -> ModuleType:
    if name.startswith(PACKAGE):
        _use_checkout()
    return importlib.import_module(name)


def _use_checkout() -> None:
    """asyncopd.kernels is where the package was installed from, if it was; what is checked here is this checkout."""
    folder = ROOT / "kernels"
    if PACKAGE in sys.modules:
        loaded = sys.modules[PACKAGE].__file__
        if loaded is None or Path(loaded).parent.resolve() != folder:
            raise RuntimeError(f"{PACKAGE} was imported from {loaded} before, expected {folder}")
        return
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def _relative(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).resolve().relative_to(ROOT).as_posix()
