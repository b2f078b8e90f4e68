"""What the build and the installed distribution promise."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asyncopd
from asyncopd import _C, kernels
from asyncopd.backends import cpu, cuda, native

ROOT = Path(__file__).parents[1]


def test_extension_is_built_and_has_a_baseline() -> None:
    assert cpu.unavailable_reason() is None
    assert _C.cpu_isas()[0] == "baseline"
    assert isinstance(_C.openmp, bool)
    assert hasattr(_C, "cuda_gather_logprobs") == hasattr(_C, "cuda_topk_logprobs") == _C.cuda


def test_backends_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in kernels.unavailable_reason() or "not installed" in kernels.unavailable_reason()
    reason = cuda.unavailable_reason()
    assert reason is not None
    assert "no CUDA device" in reason or "without CUDA kernels" in reason
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "No module named 'asyncopd._C'", raising=False)
    assert "asyncopd._C cannot be imported (No module" in cpu.unavailable_reason()
    assert cuda.unavailable_reason() == cpu.unavailable_reason()


def test_cuda_backend_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="logits: got device cpu"):
        cuda.gather_logprobs(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="logits: got device cpu"):
        cuda.topk_logprobs(torch.zeros(1, 2), 1, 1.0)


def test_version_is_the_distributions() -> None:
    assert asyncopd.__version__ == importlib.metadata.version("asyncopd")


def test_no_top_level_kernels_module_is_installed() -> None:
    """Another well-known package is called `kernels`; ours is asyncopd.kernels only."""
    assert kernels.__name__ == "asyncopd.kernels"
    top_level = importlib.metadata.distribution("asyncopd").read_text("top_level.txt")
    assert top_level is not None
    # An editable install lists its finder module here as well.
    assert {name for name in top_level.split() if not name.startswith("_")} == {"asyncopd"}
    # Isolated and elsewhere, so that the checkout's own folder is not what answers.
    program = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    found = subprocess.run([sys.executable, "-I", "-c", program], cwd="/", capture_output=True, text=True, check=True)
    assert not found.stdout.startswith(str(ROOT))


def test_every_folder_of_modules_is_a_package() -> None:
    """setup.py finds packages by their __init__.py; without one a folder works here and is missing from the wheel."""
    for package in ("asyncopd", "kernels"):
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
