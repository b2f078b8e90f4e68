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
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank got, by engine, case and loss."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(distributed_worker.main, args=(str(folder),), nprocs=distributed_worker.WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(distributed_worker.WORLD)]


@pytest.mark.parametrize("where", distributed_worker.ENGINES)
@pytest.mark.parametrize("loss", distributed_worker.LOSSES)
@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_gradients_of_both_ranks_together(
    results: list[dict[Any, Any]], case: str, loss: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")
    expected = distributed_worker.expected(distributed_worker.LOSSES[loss])
    assert expected["lm_head.weight"].abs().max() > 1e-2
    for rank, by_case in enumerate(results):
        got = by_case[where, case, loss]
        assert set(got) == ({"lm_head.weight"} if case == "tensor_parallel" else set(expected))
        for name, gradient in got.items():
            # fp32, summed in another order.
            error = float((gradient - expected[name]).abs().max())
            assert error < 1e-5, f"rank {rank}: gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("where", distributed_worker.ENGINES)
@pytest.mark.parametrize("how", ["tensor parallel", "fsdp"])
def test_a_sharded_head_scores_as_the_whole_one(
    results: list[dict[Any, Any]], how: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", where)
    expected = distributed_worker.scored(distributed_worker.Model().lm_head.weight)
    for by_case in results:
        for got, wanted in zip(by_case[where, f"scored by {how}"], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
