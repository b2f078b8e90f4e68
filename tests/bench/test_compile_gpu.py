"""The gate of the GPU kernels: planted faults shut it, a clean kernel passes, results do not depend on the run."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from bench.compile_gpu import check, cuda_sources, triton_kernels
from bench.compile_gpu.check import Job, compile_all
from bench.compile_gpu.cuda_sources import CudaJob
from bench.compile_gpu.kernel import ARCHS, ROOT, Kernel
from bench.compile_gpu.triton_kernels import TritonJob

needs_triton = pytest.mark.skipif(
    triton_kernels.reason_unavailable() is not None, reason=str(triton_kernels.reason_unavailable())
)
needs_nvcc = pytest.mark.skipif(
    cuda_sources.reason_unavailable() is not None, reason=str(cuda_sources.reason_unavailable())
)


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_sources, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def one(job: Job) -> Kernel:
    (kernel,), seconds = job.run()
    assert seconds > 0
    return kernel


# -------------------------------------------------------------------------------------------------------- Triton


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_clean_triton_kernel_passes(arch: int) -> None:
    kernel = one(TritonJob("gate_kernels", "clean", arch))
    assert kernel.violations == []
    assert kernel.source == "tests/bench/gate_kernels.py"
    assert (kernel.load_bytes, kernel.store_bytes) == (16, 16)
    assert 0 < kernel.registers <= 64
    assert kernel.compiler.startswith("triton 3")


@needs_triton
@pytest.mark.parametrize(
    ("case", "violation"),
    [
        ("fp64", "computes in fp64: "),
        ("greedy", "registers, budget 12"),
        ("spilling", "uses local memory: "),
    ],
)
def test_planted_triton_faults_are_caught(case: str, violation: str) -> None:
    (found,) = one(TritonJob("gate_kernels", case, 90)).violations
    assert violation in found
    assert found.startswith(f"tests/bench/gate_kernels.py: {case} on sm_90 ")


@needs_triton
def test_kernels_are_compiled_in_other_processes_in_order() -> None:
    jobs = [TritonJob("gate_kernels", case, 90) for case in ("clean", "no such case", "fp64")]
    clean, missing, fp64 = compile_all(jobs)
    assert [k.name for k in clean.kernels + fp64.kernels] == ["clean", "fp64"]
    assert "no such case" in missing.failure
    assert "KeyError" in missing.failure


def test_every_launched_kernel_must_be_compiled() -> None:
    kernels = "import triton\n\n@triton.jit(do_not_specialize=['n'])\ndef forgotten(x, n):\n    pass\n"
    triton_kernels.require_cases([kernels, "forgotten(x, 3)"], set())  # a device function
    for launch in ("m.forgotten[(4,)](x, n)", "launch(m.forgotten, 4, x, n, num_warps=4)", "Prepared(forgotten, n)"):
        source = f"def f(x, n):\n    {launch}\n    x[0]\n    torch.empty(3)\n"
        triton_kernels.require_cases([kernels, source], {"forgotten"})
        with pytest.raises(ValueError, match="forgotten is launched and no compile_cases"):
            triton_kernels.require_cases([kernels, source], {"another"})


@needs_triton
def test_globals_of_kernels_are_equal_to_themselves() -> None:
    """At a launch Triton compares each global that a kernel reads with a copy from the first one, by `!=`."""
    from triton.language import constexpr

    faults, read = {}, set()
    modules = [sys.modules[name] for name in triton_kernels.modules()]
    modules += [module for name, module in sys.modules.items() if name.startswith(f"{triton_kernels.PACKAGE}.")]
    for module in {id(m): m for m in (*modules, triton_kernels._import("gate_kernels"))}.values():
        for function in (value for value in vars(module).values() if hasattr(value, "used_global_vals")):
            assert function.cache_key  # finds the globals
            for (name, _), (value, _) in function.used_global_vals.items():
                read.add(name)
                if value != value or not isinstance(value, constexpr):
                    faults[function.__name__, name] = value
    assert set(faults) == {("reads_nan", "NAN")}  # the planted one
    assert {"INF", "LOG2E", "FLOOR"} <= read


@needs_triton
def test_every_kernel_is_compiled_on_every_architecture_in_one_dtype_and_on_sm_90_in_two() -> None:
    cases = {
        (name, case.name): case
        for name in triton_kernels.modules()
        for case in triton_kernels._cases(triton_kernels._import(name)).values()
    }
    jobs = triton_kernels.jobs()
    for arch in ARCHS:
        compiled = {cases[job.module, job.case].kernel.__name__ for job in jobs if job.arch == arch}
        assert compiled == {case.kernel.__name__ for case in cases.values() if arch in case.archs}
    left_out = {case for case in cases if TritonJob(*case, 90) not in jobs and 90 in cases[case].archs}
    assert left_out
    for module, name in left_out:
        assert "fp16" in name
        assert TritonJob(module, name.replace("fp16", "bf16"), 90) in jobs


@needs_triton
def test_cases_are_those_of_this_checkout() -> None:
    program = "from bench.compile_gpu import triton_kernels as t; t.modules(); print(t.sys.modules[t.PACKAGE].__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


@needs_triton
@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
@pytest.mark.parametrize(
    ("module", "case"),
    [
        ("gemm", "gemm-logits-bf16-{}"),
        ("gemm", "gemm-dweight-bf16-small-{}"),
        ("head_summary", "head-summary-bf16-{}"),
        ("regroup", "regroup-bf16"),
    ],
)
def test_matrix_products_are_those_of_the_architecture(module: str, case: str, arch: int, instruction: str) -> None:
    assert instruction in TritonJob(f"asyncopd.kernels.{module}", case.format(arch), arch).ptx()


# ---------------------------------------------------------------------------------------------------------- CUDA

CLEAN = "__global__ void scale(float4* x) { float4 v = x[threadIdx.x]; v.x *= 2.0f; x[threadIdx.x] = v; }\n"
FP64 = "__global__ void scale(float* x) { x[threadIdx.x] = float(x[threadIdx.x] * 1.1); }\n"
# 64 values that are indexed at run time; the launch bounds leave no registers for them.
SPILL = """
template <int N>
__global__ void __launch_bounds__(1024, 2) scale(float* x, int shift) {
  float v[N];
  for (int i = 0; i < N; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = v[(i + shift) % N];
}
template __global__ void scale<64>(float*, int);
"""


def cuda(tmp_path: Path, body: str, budget: str = "// max-registers: scale 32\n") -> Kernel:
    source = tmp_path / "planted.cu"
    source.write_text(budget + body)
    return one(CudaJob(source, 90))


@needs_nvcc
def test_clean_cuda_kernel_passes(tmp_path: Path) -> None:
    kernel = cuda(tmp_path, CLEAN)
    assert kernel.violations == []
    assert (kernel.name, kernel.source) == ("scale", "planted.cu")
    assert (kernel.load_bytes, kernel.store_bytes) == (16, 16)
    assert str(tmp_path) not in repr(kernel)
    again, seconds = CudaJob(tmp_path / "planted.cu", 90).run()
    assert (again, seconds) == ([kernel], 0.0), "the second time it comes from the cache"


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "budget", "violation"),
    [
        (FP64, "// max-registers: scale 32\n", "planted.cu: scale on sm_90 computes in fp64: "),
        (SPILL, "// max-registers: scale 32\n", "planted.cu: scale<64> on sm_90 uses local memory: "),
        (CLEAN, "// max-registers: scale 3\n", "registers, budget 3"),
        (CLEAN, "", "has no register budget"),
    ],
)
def test_planted_cuda_faults_are_caught(tmp_path: Path, body: str, budget: str, violation: str) -> None:
    (found,) = cuda(tmp_path, body, budget).violations
    assert violation in found


@needs_nvcc
def test_budget_of_no_kernel_and_source_that_does_not_compile_are_failures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"planted.cu: max-registers of scael, no such kernel"):
        cuda(tmp_path, CLEAN, "// max-registers: scale 32\n// max-registers: scael 32\n")
    with pytest.raises(RuntimeError, match=r"nvcc cannot compile planted.cu for sm_90:\n(.|\n)*error"):
        cuda(tmp_path, "this is no C++")


def test_shared_memory_beyond_a_block_is_a_violation() -> None:
    kernel = Kernel("triton", "kernels/x.py", "big", 80, "triton 3", 8, 8, 200_000, 0, 0, 0, 0, 16, 16)
    assert kernel.violations == [
        "kernels/x.py: big on sm_80 takes 200000 B of shared memory, a block has 166912",
    ]
    assert Kernel("triton", "kernels/x.py", "big", 90, "triton 3", 8, 8, 200_000, 0, 0, 0, 0, 16, 16).violations == []


def test_architectures_are_those_that_are_built() -> None:
    (built,) = re.findall(r"^CUDA_ARCHS = \[(.*)\]$", (ROOT / "setup.py").read_text(), re.M)
    assert tuple(map(int, built.split(","))) == ARCHS


# --------------------------------------------------------------------------------------------------- the command


def test_command_fails_by_name_and_keeps_what_it_cannot_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without nvcc: CUDA's lines stay, Triton's are replaced, and a violation is the exit status."""
    path = tmp_path / "kernels.jsonl"
    bad = Kernel("triton", "kernels/x.py", "big", 90, "triton 3", 99, 64, 0, 0, 0, 0, 0, 16, 16)
    kept = Kernel("cuda", "csrc/cuda/x.cu", "x", 90, "nvcc 13", 8, 8, 0, 0, 0, 0, 0, 16, 16)
    gone = Kernel("triton", "kernels/gone.py", "x", 90, "triton 3", 8, 8, 0, 0, 0, 0, 0, 16, 16)
    check.store(path, [kept, gone], {"triton", "cuda"})
    monkeypatch.setattr(cuda_sources, "nvcc", lambda: None)
    monkeypatch.setattr(triton_kernels, "reason_unavailable", lambda: None)
    monkeypatch.setattr(triton_kernels, "jobs", list)
    monkeypatch.setattr(check, "compile_all", lambda jobs: [check.Outcome([bad], 1.0)])
    with pytest.raises(typer.Exit) as exit_status:
        check.main(results=path)
    assert exit_status.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "csrc/cuda/*.cu were skipped: there is no nvcc" in printed
    assert "kernels/x.py: big on sm_90 takes 99 registers, budget 64" in printed
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["x", "big"]
    # The same without a violation ends well; without triton it does not.
    monkeypatch.setattr(check, "compile_all", lambda jobs: [])
    check.main(results=path)
    monkeypatch.setattr(triton_kernels, "reason_unavailable", lambda: "not installed")
    with pytest.raises(typer.Exit):
        check.main(results=path)


def test_a_kernel_that_does_not_compile_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "compile_all", lambda jobs: [check.Outcome([], 0.0, "it broke")])
    assert check.check([], Console(file=io.StringIO())) == ([], ["it broke"])


def test_kept_results_are_those_of_this_checkout_and_name_no_machine() -> None:
    """Every source is in them, every line is of a kernel that passes: `make check-gpu` makes them again."""
    lines = (ROOT / "bench" / "results" / "compiled" / "kernels.jsonl").read_text().splitlines()
    kernels = [Kernel(**json.loads(line)) for line in lines]
    assert kernels == sorted(kernels, key=lambda k: k.key)
    assert [k.violations for k in kernels] == [[]] * len(kernels)
    assert {k.source for k in kernels if k.language == "cuda"} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu")
    }
    assert {k.source for k in kernels if k.language == "triton"} == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kernels").rglob("*.py")
        if "def compile_cases()" in path.read_text()
    }
