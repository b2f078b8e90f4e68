"""The machine that runs .cu files on the host: it computes what CUDA would, and faults show, in kernels and in ours."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_on_host as host
import pytest
import torch
from torch import Tensor

pytestmark = host.NEEDED
THREADS = 64


def run(kernel: str, schedule: int, blocks: int = 1, shared: int = 4 * THREADS) -> Tensor:
    out = torch.full((blocks * THREADS,), 9e9)
    library = host.library(host.HERE / "faults.cu")
    assert library.call(f"run_{kernel}", out, blocks, shared, schedule=schedule) == 0
    return out


@pytest.mark.parametrize("schedule", host.SCHEDULES)
def test_a_correct_kernel_is_the_same_in_every_schedule(schedule: int) -> None:
    assert (run("correct", schedule, blocks=3) == 64 * 65 / 2).all()


def test_results_of_a_missing_barrier_differ_between_schedules() -> None:
    forward, backward = (run("missing_barrier", schedule) for schedule in (host.FORWARD, host.BACKWARD))
    assert forward.isnan().any()
    assert not torch.equal(forward.isnan(), backward.isnan())


def test_a_warp_may_run_far_ahead_of_another() -> None:
    seen = [run("racing_ahead", schedule) for schedule in host.SCHEDULES]
    # As written: who is last sees the next round's counter.
    assert any((values != values[0]).any() for values in seen)


def test_a_compiler_that_checks_longjmp_is_told_not_to() -> None:
    """Ubuntu's gcc defines _FORTIFY_SOURCE=3, and every switch between fibres aborted the process."""
    compiler = host.compiler()
    assert compiler is not None
    done = pytest_in_a_process(["-k", "correct_kernel", __file__], CXX=" ".join([*compiler, "-D_FORTIFY_SOURCE=3"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(host.SCHEDULES)} passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "collected"),
    [
        (["tests/backends"], {}, False),
        (["tests/backends"], {"ASYNCOPD_CUDA_ON_HOST": "1"}, True),
        (["tests/backends/test_cuda_topk.py"], {}, True),
    ],
)
def test_on_a_machine_with_a_gpu_these_tests_have_to_be_asked_for(
    arguments: list[str], environment: dict[str, str], collected: bool
) -> None:
    done = pytest_in_a_process(["--collect-only", *arguments], "torch.cuda.is_available = lambda: True", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("test_cuda_topk.py::" in done.stdout) is collected


def pytest_in_a_process(
    arguments: list[str], before: str = "pass", **environment: str
) -> subprocess.CompletedProcess[str]:
    program = f"import sys, pytest, torch; {before}; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", "--no-cov", *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV") and k != "ASYNCOPD_CUDA_ON_HOST"}
    return subprocess.run(
        command, cwd=host.ROOT, env=inherited | environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("schedule", host.SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", r"divergent block: thread 0 waits at __syncthreads on line \d+, thread 40 has ended"),
        ("barriers_of_two_lines", r"divergent block: thread 0 waits .*, thread 32 waits at __syncthreads on line"),
        ("divergent_vote", r"divergent warp: thread \d+ waits at __ballot_sync on line \d+, thread 7 has ended"),
        ("shuffle_from_nobody", r"thread \d+ waits at __shfl_sync on line \d+ and reads lane 20, which takes no part"),
        ("beyond_shared", r"byte 256 of dynamic shared memory was written, the launch has 256"),
        ("misaligned", r"thread \d+: a misaligned load on line \d+"),
    ],
)
def test_faults_are_errors_that_say_where(kernel: str, message: str, schedule: int) -> None:
    with pytest.raises(AssertionError, match=rf"block \(0, 0\): {message}"):
        run(kernel, schedule)


def test_shared_memory_that_nobody_wrote_is_nan_in_every_block() -> None:
    out = run("unwritten_shared", host.FORWARD, blocks=2).view(2, THREADS)
    # Of threads 0 to 31 the dynamic part, of 32 to 47 both.
    assert out[:, :48].isnan().all()
    assert (out[:, 48:] == 2).all()


def test_shared_memory_beyond_48_kib_has_to_be_asked_for() -> None:
    library = host.library(host.HERE / "faults.cu")
    assert library.call("run_correct", torch.zeros(THREADS), 1, 48 * 1024) == 0
    assert library.call("run_correct", torch.zeros(THREADS), 1, 48 * 1024 + 1) == 1


# ------------------------------------------------------------------------------------------ faults in our own kernels


def gather_is_right(library: host.Library, schedule: int) -> bool:
    logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(1))
    logits[1, 4000] = 30.0  # far above what its thread has seen before
    ids = torch.tensor([[0, 5002, 77]]).repeat(2, 1)
    logprobs, lse = host.gather_logprobs(logits[:, 1:], ids.clamp(max=5001), 1.0, schedule=schedule, library=library)
    z = logits[:, 1:].double()
    expected = z.log_softmax(1).gather(1, ids.clamp(max=5001))
    return _close(logprobs, expected) and _close(lse, z.logsumexp(1))


def topk_is_right(library: host.Library, schedule: int) -> bool:
    generator = torch.Generator().manual_seed(1)
    rising = torch.arange(20_001) / 100.0
    rows = [2 * torch.randn(20_001, generator=generator), rising, torch.randint(0, 30, (20_001,), generator=generator)]
    rows.append(torch.zeros(20_001))
    # Fewer numbers than k, all in the last part.
    rows.append(torch.full((20_001,), -float("inf")).index_fill(0, torch.tensor([20_000, 19_990]), 1.0))
    logits = torch.stack(rows)
    expected_ids = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :70]
    log_p = logits.double().log_softmax(1)
    for parts in (1, 3):
        ids, logprobs, lse = host.topk_logprobs(logits, 70, 1.0, parts=parts, schedule=schedule, library=library)
        right = torch.equal(ids, expected_ids) and _close(logprobs, log_p.gather(1, expected_ids))
        if not (right and _close(lse, logits.double().logsumexp(1))):
            return False
    return True


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.double(), expected, rtol=2**-23, atol=3e-6)


# Header or source, what is changed in it, into what, and the check that has to notice.
MUTANTS = {
    "wrong lane": ("row.cuh", "mask = 16; mask > 0; mask >>= 1", "mask = 16; mask > 1; mask >>= 1", gather_is_right),
    "no barrier between warps": ("row.cuh", "= pair;\n  __syncthreads();", "= pair;", gather_is_right),
    "column twice": ("row.cuh", "first + kColumns <= vocab", "first + kColumns <= vocab + 1", gather_is_right),
    "sum of the old maximum": ("row.cuh", "sum *= rescale(max, top, scale);", "", gather_is_right),
    "bin off by one": ("select.cuh", "reached - inside < needed", "reached - inside <= needed", topk_is_right),
    "scan off by one": ("select.cuh", "if (lane >= delta)", "if (lane > delta)", topk_is_right),
    "histogram without a barrier": (
        "select.cuh",
        "= 0;\n      __syncthreads();\n      const Key digit",
        "= 0;\n      const Key digit",
        topk_is_right,
    ),
    "keys moved before they are read": ("select.cuh", ": 0;\n      __syncthreads();", ": 0;", topk_is_right),
    "order of ties": ("select.cuh", "a < b) == descending", "a <= b) == descending && a >> 8 != b >> 8", topk_is_right),
    "bound that loses ties": ("topk.cu", "value_below<T>(static_cast", "key_value<T>(static_cast", topk_is_right),
    "buffer one chunk too small": ("topk.cu", "> room_for(k))) {", "> room_for(k) + 4096)) {", topk_is_right),
    "segment lost": ("topk.cu", "kSegmentChunks == kSegmentChunks - 1", "kSegmentChunks == 7", topk_is_right),
    "scratch of the next part": ("topk.cu", "(n * parts + part) * k", "(n * parts + parts - 1) * k", topk_is_right),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_in_the_kernels_are_caught(name: str, tmp_path: Path) -> None:
    file, old, new, is_right = MUTANTS[name]
    kernels = tmp_path / "cuda"
    shutil.copytree(host.CSRC / "cuda", kernels)
    (tmp_path / "cpu").mkdir()
    shutil.copy(host.CSRC / "cpu" / "codes.h", tmp_path / "cpu")
    text = (kernels / file).read_text()
    assert text.count(old) == 1, "the fault has lost its place"
    (kernels / file).write_text(text.replace(old, new))
    source = kernels / ("gather.cu" if is_right is gather_is_right else "topk.cu")
    library = host.Library(host.build([source], tmp_path))
    assert not _always(is_right, library)


@pytest.mark.parametrize("is_right", [gather_is_right, topk_is_right])
def test_without_a_fault_the_same_checks_pass(is_right: Callable[[host.Library, int], bool]) -> None:
    assert _always(is_right, host.kernels())


def _always(is_right: Callable[[host.Library, int], bool], library: host.Library) -> bool:
    try:
        return all(is_right(library, schedule) for schedule in host.SCHEDULES)
    except AssertionError:  # the machine stopped it
        return False
