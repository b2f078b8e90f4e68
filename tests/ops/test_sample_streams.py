"""sample_support: the same stream gives the same draw, another stream another one, whatever runs around it."""

import pytest
import torch

from asyncopd import sample_support
from asyncopd.backends.reference import rows

pytestmark = pytest.mark.ops("sample_support")


def logits(rng: torch.Generator, n: int, v: int) -> torch.Tensor:
    return torch.randn(n, v, generator=rng)


@pytest.mark.parametrize("head", [0, 3])
def test_a_stream_draws_the_same_in_any_batch(engine: str, rng: torch.Generator, head: int) -> None:
    z, streams = logits(rng, 9, 61), torch.randint(-(2**63), 2**63 - 1, (9,), generator=rng)
    whole = sample_support(z, num_samples=5, head=head, seed=streams)
    order = torch.randperm(9, generator=rng)
    shuffled = sample_support(z[order], num_samples=5, head=head, seed=streams[order])
    for mine, theirs in zip(shuffled, whole, strict=True):
        torch.testing.assert_close(mine, theirs[order], rtol=0, atol=0)
    for n in range(9):
        alone = sample_support(z[n : n + 1], num_samples=5, head=head, seed=streams[n : n + 1])
        assert torch.equal(alone.ids[0], whole.ids[n])


@pytest.mark.parametrize("tile", [1, 130, 10_000])
@pytest.mark.parametrize("by_stream", [False, True])
def test_chunk_size_does_not_matter(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile: int, by_stream: bool
) -> None:
    z = logits(rng, 10, 61).double()
    seed = torch.arange(10) * 7 if by_stream else 12
    whole = sample_support(z, num_samples=5, head=2, seed=seed)
    monkeypatch.setattr(rows, "TILE_ELEMENTS", tile)
    for mine, theirs in zip(sample_support(z, num_samples=5, head=2, seed=seed), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_thread_count_does_not_matter(engine: str, rng: torch.Generator) -> None:
    z, threads = logits(rng, 64, 999), torch.get_num_threads()
    draws = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            draws.append(sample_support(z, num_samples=8, head=2, seed=3).ids)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32])
def test_row_0_of_an_int_seed_is_the_stream_of_that_number(engine: str, rng: torch.Generator, seed: int) -> None:
    z = logits(rng, 4, 200)
    by_seed = sample_support(z, num_samples=16, seed=seed)
    by_stream = sample_support(z[:1], num_samples=16, seed=torch.tensor([seed]))
    assert torch.equal(by_seed.ids[:1], by_stream.ids)


def test_rows_and_seeds_do_not_collide(engine: str) -> None:
    # 64 draws of 500 equal tokens: two equal rows by chance have probability 500^-64.
    z = torch.zeros(40, 500)
    seen = set()
    for seed in (0, 1, 2, 3, 2**31, 2**32, 2**32 + 1, -1):
        seen |= {tuple(row) for row in sample_support(z, num_samples=64, seed=seed).ids.tolist()}
    assert len(seen) == 8 * 40


def test_draws_of_a_row_differ_among_themselves(engine: str) -> None:
    ids = sample_support(torch.zeros(1, 100_000), num_samples=200, seed=5).ids[0]
    assert len(set(ids.tolist())) > 190  # 0.2 collisions are expected


def test_more_draws_extend_fewer_and_reweigh_them(engine: str, rng: torch.Generator) -> None:
    z = logits(rng, 5, 30)
    few, many = (sample_support(z, num_samples=m, seed=9) for m in (4, 8))
    assert torch.equal(few.ids, many.ids[:, :4])
    # log M is in the weight: fp32 rounding of log 2.
    torch.testing.assert_close(few.log_weights - many.log_weights[:, :4], torch.full((5, 4), 2.0).log())


def test_the_global_generator_is_left_alone(engine: str, rng: torch.Generator) -> None:
    before = torch.get_rng_state()
    sample_support(logits(rng, 3, 20), num_samples=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
