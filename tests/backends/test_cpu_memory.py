"""Pages that are asked for before a large gradient is written."""

import os
import platform
import re
import resource

import pytest
import torch

_C = pytest.importorskip("asyncopd._C")
VERSION = re.match(r"(\d+)\.(\d+)", platform.release())
HAS_POPULATE = platform.system() == "Linux" and VERSION is not None and tuple(map(int, VERSION.groups())) >= (5, 14)
MIB = 1 << 20


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(not HAS_POPULATE, reason="this system has no MADV_POPULATE_WRITE")
@pytest.mark.skipif(_C.sanitized, reason="the sanitizer's shadow has faults of its own")
@pytest.mark.parametrize("threads", [1, 3])
def test_writing_meets_no_faults(threads: int) -> None:
    memory = torch.empty(64 * MIB + 12345, dtype=torch.uint8)  # so large that it is new
    _C.cpu_populate(memory.data_ptr(), memory.nbytes, threads)
    before = faults()
    memory.fill_(1)
    pages = memory.nbytes // os.sysconf("SC_PAGESIZE")
    assert faults() - before < pages / 20


@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 5 * MIB + 17])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8191, 4 * MIB, 40 * MIB + 1])
def test_what_the_memory_holds_stays(begin: int, size: int) -> None:
    """Pages that are there stand between pages that are not; the first of each 4 MiB decides about those."""
    memory = torch.empty(64 * MIB, dtype=torch.uint8)  # so large that it is new
    written = torch.arange(3 * MIB + 5000, memory.nbytes, 777_777)
    memory[written] = 7
    _C.cpu_populate(memory.data_ptr() + begin, size, 2)
    assert (memory[written] == 7).all()
