"""`make sanitize` tests an instrumented build, and that build sees a read beyond the end of a row."""

import os
import subprocess
import sys

import pytest

from asyncopd.backends.native import _C

pytestmark = pytest.mark.skipif(
    os.environ.get("ASYNCOPD_SANITIZE") != "1", reason="needs a build with sanitizers: make sanitize"
)

READ_TOO_FAR = """
import torch
from asyncopd import _C
logits, lse = torch.zeros(1, 1000), torch.zeros(1)
_C.cpu_gather_logprobs(
    logits=logits.data_ptr(), dtype=0, row_stride=1000, ids=0, id_type=1, rows=1, vocab={vocab}, num_ids=0,
    inv_temperature=1.0, logprobs=0, lse=lse.data_ptr(), threads=1,
)
"""


def test_the_build_is_instrumented() -> None:
    assert _C.sanitized


@pytest.mark.parametrize(("vocab", "caught"), [(1000, False), (1001, True)])
def test_a_read_beyond_the_end_is_seen(vocab: int, caught: bool) -> None:
    script = READ_TOO_FAR.format(vocab=vocab)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode != 0) == caught
    assert ("heap-buffer-overflow" in run.stderr) == caught
