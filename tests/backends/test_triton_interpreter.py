"""Triton kernels on a machine without a GPU: their own tests and the shared ones, through Triton's interpreter.

The interpreter is chosen when the kernels are imported, so it gets a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncopd import backends

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

# (files, selection, the fewest tests that it must find). A program takes 5 to 20 ms there, so shared tests of thousands
# of programs stay out, and where a head with everything stands for those with less, those with less do.
FILES = {
    "own": (["tests/backends/test_triton_kernel_numeric.py", "tests/backends/test_triton_kernel_topk.py"], "", 40),
    "own-draws": (
        ["tests/backends/test_triton_kernel_gather.py", "tests/backends/test_triton_kernel_sample.py"],
        "",
        15,
    ),
    "own-products": (
        [
            "tests/backends/test_triton_kernel_gemm.py",
            "tests/backends/test_triton_kernel_linear_topk.py",
            "tests/backends/test_triton_kernel_tuning.py",
        ],
        "",
        100,
    ),
    "own-head": (["tests/backends/test_triton_kernel_head.py"], "", 35),
    "own-frozen-head": (
        ["tests/backends/test_triton_kernel_head_frozen.py", "tests/backends/test_triton_kernel_scale.py"],
        "",
        45,
    ),
    "own-sampled-head": (["tests/backends/test_triton_kernel_sparse_head.py"], "", 55),
    "own-losses": (["tests/backends/test_triton_kernel_kl.py"], "", 35),
    "shared-logits": (
        [
            "tests/ops/test_topk.py",
            "tests/ops/test_gather.py",
            "tests/ops/test_sample_edges.py",
            "tests/ops/test_sample_streams.py",
        ],
        "triton and not (thread_count or do_not_collide or transposed or (strides_are_followed and sample))",
        50,
    ),
    "shared-head": (
        [
            "tests/ops/test_linear_gather.py",
            "tests/ops/test_linear_logits.py",
            "tests/ops/test_linear_topk.py",
            "tests/ops/test_accumulate.py",
            "tests/losses/test_gradients_in_forward.py",
        ],
        "triton and not (accumulate_in_fp32 or (materialised_logits and not softcap))",
        60,
    ),
    "shared-losses": (
        [
            "tests/losses/test_corrections.py",
            "tests/losses/test_full_support.py::test_a_bucket_of_rounding_errors_is_empty",
            "tests/losses/test_gradients.py",
            "tests/losses/test_infinite_logits.py",
            "tests/losses/test_metrics.py",
            "tests/losses/test_zero_sum.py",
        ],
        "triton and not (masses and False)",
        150,
    ),
    # Eager calls and ops: the same bits, the same refusals.
    "shared-eager": (["tests/ops/test_eager.py"], "triton and (upstream or dropped or what_is_plain)", 40),
    # What rounding to 16 bits or a layout does, which the interpreter shows as an H100 does.
    "shared-rounding": (
        ["tests/losses/test_torch_integration.py", "tests/losses/test_field_bugs.py"],
        "triton and (test_autocast or overflow or minus_inf or 0_times_inf or p_minus_1)",
        10,
    ),
    "features": (
        [
            "tests/ops/test_opcheck.py",
            "tests/ops/test_capture.py",
            "tests/ops/test_torch_features.py",
            "tests/ops/test_vocab_shards.py",
        ],
        "triton",
        12,
    ),
}


@pytest.mark.skipif(os.environ.get("ASYNCOPD_SANITIZE") == "1", reason="nothing here is instrumented")
@pytest.mark.skipif(backends.unavailable_reason("triton") is None, reason="the kernels run in this process")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_kernels_pass_through_the_interpreter(name: str) -> None:
    files, selection, at_least = FILES[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "-k", selection, *files]
    # Measured line by line, the interpreter takes twice as long, and the kernels' lines are not counted anyway.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment = {**inherited, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    # A selection that no longer matches must not pass.
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least, run.stdout
