"""launch(): which compiled kernel runs for which arguments. Kernels are compiled for sm_90 and launched into nothing.

The stand-in driver is chosen for a whole process, where Triton must not be in its interpreter: so it has its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("launch_program.py")


@pytest.mark.skipif(os.environ.get("ASYNCOPD_SANITIZE") == "1", reason="nothing here is instrumented")
@pytest.mark.timeout(120)
def test_direct_launches_choose_what_triton_chooses() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
