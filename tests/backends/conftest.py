"""The kernels' own tests: C++ on every instruction set of this machine, Triton on a GPU or through its interpreter.

Where nothing was compiled there are no tests of C++ (tests/test_build.py fails there, so that a lost build cannot pass
in silence). On a machine without a GPU, test_triton_interpreter.py runs Triton's in a process of their own. On a
machine with one, the CUDA kernels run there and not on the host's CPU, unless a file test_cuda_*.py is named or
ASYNCOPD_CUDA_ON_HOST=1.
"""

import os

import pytest
import torch

from asyncopd import backends
from asyncopd.backends import native

collect_ignore_glob = [
    *(["test_cpu_*.py"] if native.unavailable_reason() else []),
    *(["test_triton_kernel_*.py"] if backends.unavailable_reason("triton") else []),
    *(["test_cuda_*.py"] if torch.cuda.is_available() and os.environ.get("ASYNCOPD_CUDA_ON_HOST") != "1" else []),
]


@pytest.fixture(params=() if native._C is None else native._C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> int:
    """An instruction-set level, by its number."""
    return native._C.cpu_isas().index(request.param)
