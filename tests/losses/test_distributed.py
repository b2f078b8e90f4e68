"""Data parallel, sharded and tensor parallel heads give the gradient of the whole batch, on two gloo processes."""

from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got, by case."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(distributed_worker.main, args=(str(folder),), nprocs=distributed_worker.WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(distributed_worker.WORLD)]


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_gradients_of_both_ranks_together(
    results: list[dict[str, Any]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")
    expected = distributed_worker.expected()
    for rank, by_case in enumerate(results):
        got = by_case[case]
        # A sharded weight is gathered, with the right gradient, or refused by name.
        if isinstance(got, str):
            assert case.startswith("fsdp"), got
            assert got.startswith(("ValueError: lm_head_weight", "TypeError: lm_head_weight")), got
            continue
        for name, gradient in got.items():
            # fp32, summed in another order.
            error = float((gradient - expected[name]).abs().max())
            assert error < 1e-5, f"rank {rank}: gradient of {name} is off by {error:.1e}"
        assert "lm_head.weight" in got
