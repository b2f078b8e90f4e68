"""A head split over processes gives what the whole head gives in one: losses, gradients and top-K."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import split_head_cases as cases
import split_head_worker as worker
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from asyncopd import VocabShard

SETUPS = worker.setups()
# Of what fp32 sums of a few hundred terms of size 1 lose, seen through one exp and one log.
ACCURACY = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-6, 2e-6), torch.bfloat16: (5e-6, 2e-6)}
Results = list[dict[Any, Any]]  # of each rank
on_each_setup = pytest.mark.parametrize(
    "setup", SETUPS, ids=["-".join(map(str, setup)).replace("torch.", "") for setup in SETUPS]
)
gloo = pytest.mark.skipif(all(device != "cpu" for device, _, _ in SETUPS), reason="torch without gloo")


@pytest.fixture(scope="module")
def ranks_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """By device, what each rank got."""

    @cache
    def run(device: str) -> Results:
        folder: Path = tmp_path_factory.mktemp(device)
        world = 2 if device == "cpu" else min(2, torch.cuda.device_count())
        mp.spawn(worker.main, args=(str(folder), device, world), nprocs=world)
        return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(world)]

    return run


@pytest.fixture
def ranks(ranks_on: Callable[[str], Results]) -> Results:
    return ranks_on("cpu")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected is made by the specification."""
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")


def assert_close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = ACCURACY[dtype]
    if name in ("hidden", "weight", "bias"):
        assert got.dtype == dtype, name
        if dtype == torch.bfloat16:  # rounded once: half a unit in the last place
            rtol = rtol + 0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.double(), expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@on_each_setup
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.usefixtures("reference")
def test_losses_and_gradients(ranks_on: Callable[[str], Results], setup: worker.Setup, case: str) -> None:
    dtype = setup[2]
    expected = worker.run_loss(cases.CASES[case], dtype, None)
    got = [rank[setup, "loss", case] for rank in ranks_on(setup[0])]
    for name in ("loss", "metrics", "hidden"):
        assert_same_bits(got[0][name], got[-1][name])
    for name in expected:
        mine = torch.cat([rank[name] for rank in got]) if name in ("weight", "bias") else got[0][name]
        if name == "metrics":
            torch.testing.assert_close(mine.double(), expected[name], rtol=2e-2, atol=1e-5, equal_nan=True)
        else:
            assert_close(name, mine, expected[name], dtype)


@pytest.mark.usefixtures("reference")
def test_the_cases_are_not_trivial() -> None:
    """Each of them has gradients in both parts of the head, and of the hidden states, but for those named."""
    cut = cases.SIZES[0]
    for name, case in cases.CASES.items():
        got = worker.run_loss(case, torch.float64, None)
        if name in ("no_rows", "no_mass", "infinite_logit", "nan_row", "nan_in_one_shard"):
            continue
        assert got["loss"].isfinite().all(), name
        assert got["hidden"].abs().amax() > 1e-3, name
        parts = (got["weight"][:cut], got["weight"][cut:])
        empty = {"shard_without_mass": [1], "sampled_ids_on_rank_1": [0]}.get(name, [])
        assert [i for i, part in enumerate(parts) if not part.any()] == empty, name


@on_each_setup
@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("case", cases.TOPK)
@pytest.mark.usefixtures("reference")
def test_topk(ranks_on: Callable[[str], Results], setup: worker.Setup, kind: str, case: str) -> None:
    dtype = setup[2]
    expected = worker.run_topk(case, dtype, None, linear=kind == "linear")
    got = [rank[setup, kind, case] for rank in ranks_on(setup[0])]
    for name in expected:
        assert_same_bits(got[0][name], got[-1][name])
    assert got[0]["ids"].dtype == torch.int64
    # A NaN row has valid ids, and that is all that is said of them.
    known = ~expected["logsumexp"].isnan()
    assert torch.equal(got[0]["ids"][known], expected["ids"][known])
    ids = got[0]["ids"]
    assert ((ids >= 0) & (ids < cases.V)).all()
    assert all(len(set(row.tolist())) == ids.shape[1] for row in ids)
    for name in ("logprobs", "logsumexp"):
        assert got[0][name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(name, got[0][name], expected[name], dtype)


@pytest.mark.usefixtures("reference")
def test_the_cases_of_topk_cross_the_cut() -> None:
    for name in cases.TOPK:
        top = worker.run_topk(name, torch.float64, None, linear=True)
        known = ~top["logsumexp"].isnan()
        here = top["ids"][known] >= cases.SIZES[0]
        assert here.any(), name
        assert name in ("one", "one_sided") or not here.all(), name
    top = worker.run_topk("ties", torch.float64, None, linear=True)
    ties = top["logprobs"][:, 1:] == top["logprobs"][:, :-1]
    crossing = (top["ids"][:, 1:] >= cases.SIZES[0]) & (top["ids"][:, :-1] < cases.SIZES[0])
    assert (ties & crossing).any()


@gloo
def test_shards_follow_each_other(ranks: Results) -> None:
    first, second = cases.SIZES
    assert ranks[0]["shard"] == (0, first, first + second, cases.SIZES)
    assert ranks[1]["shard"] == (first, second, first + second, cases.SIZES)


@gloo
@pytest.mark.usefixtures("reference")
def test_the_ranks_are_those_of_the_group(ranks: Results) -> None:
    expected = {
        **worker.run_loss(cases.CASES["everything"], torch.float64, None),
        **worker.run_topk("plain", torch.float64, None, linear=True),
    }
    for rank in ranks:
        got, told = rank["alone"]
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
        assert told.startswith("group: this rank is not one of it"), told


@gloo
def test_nothing_is_as_large_as_the_logits_of_a_shard(ranks: Results) -> None:
    for rank in ranks:
        sizes = dict(rank["memory"])
        logits = sizes.pop("N x V_r")
        assert logits == 256 * 1024 * 4
        for name, size in sizes.items():
            assert size <= logits // 2, name


SAID = {
    "weight": r"lm_head_weight: got shape \[151, 6\], expected the {size} ids of this shard, {first}\.\.{last} of 151",
    "bias": r"bias: got shape \[151\], expected \[{size}\]",
    "dtensor": r"TypeError: lm_head_weight: got a DTensor, expected .*lm_head_weight.to_local\(\)",
    "id_too_large": r"ValueError: ids: got values from -1 to 151, expected -1 \(pad\) or 0\.\.150",
    "id_below_the_pad": r"ValueError: ids: got values from -2 ",
    "mask": r"ValueError: mask: got shape \[8\], expected \[7\]",
    "option": "ValueError: tail: got 'bucket' with a sampled support",
    "k": r"ValueError: k: got 152, expected 1\.\.151",
    "logits": r"ValueError: logits: got shape \[2, {more}\], expected the {size} ids of this shard",
    "size": r"ValueError: size: got \[0, 1\] on the ranks of the group, expected at least 1",
    "vocab": r"ValueError: vocab: got 152 on rank 1, expected 151, the sum of the sizes \[130, 21\]",
    "size_type": "TypeError: size: got float on rank 0, expected an int",
    "shard": r"TypeError: shard: got int, expected a VocabShard \(VocabShard.of\(size, group\)\)",
    "size_tensor": "TypeError: size: got Tensor on rank 0, expected an int",
}


@gloo
@pytest.mark.parametrize("name", SAID)
def test_wrong_arguments_are_refused_by_name_on_every_rank(ranks: Results, name: str) -> None:
    for rank, results in enumerate(ranks):
        assert set(results["refusals"]) == set(SAID)
        size, first = cases.SIZES[rank], (0, *cases.SIZES)[rank]
        expected = SAID[name].format(size=size, first=first, last=first + size - 1, more=size + 1)
        assert re.search(expected, results["refusals"][name]), results["refusals"][name]


@gloo
@pytest.mark.parametrize("what", ["everything", "mean_baseline", "sampled", "top-K"])
@pytest.mark.parametrize("how", ["compiled", "autocast"])
def test_compiled_and_under_autocast(ranks: Results, how: str, what: str) -> None:
    for rank in ranks:
        got, expected = rank["features"][f"{how} {what}"]
        for name in expected:
            assert_same_bits(got[name], expected[name])


@gloo
def test_an_id_that_no_rank_holds_shows_where_it_cannot_be_refused(ranks: Results) -> None:
    for rank in ranks:
        assert rank["unseen id"].isnan().tolist() == [True, False, False, False, False, False, False]


@gloo
def test_ids_may_lie_otherwise_on_one_of_the_ranks(ranks: Results) -> None:
    for rank in ranks:
        assert_same_bits(*rank["layouts"])


def test_a_shard_needs_a_process_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        VocabShard.of(5)
