"""sample_support: the rollout's own token, rows with nothing left to draw, and broken rows."""

import math

import pytest
import torch
from each_backend import Backend

from asyncopd import sample_support

pytestmark = pytest.mark.ops("sample_support")
INF = float("inf")


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_rollouts_token_takes_the_place_of_the_first_draw(
    backend: Backend, rng: torch.Generator, id_dtype: torch.dtype
) -> None:
    z = backend.tensor(torch.randn(9, 14, generator=rng, dtype=torch.float64))
    own = torch.randint(0, 14, (9,), generator=rng)
    plain = sample_support(z, num_samples=4, seed=1)
    draw = sample_support(z, num_samples=4, seed=1, sampled_ids=own.to(id_dtype))
    assert torch.equal(draw.ids[:, 0], own)
    assert torch.equal(draw.ids[:, 1:], plain.ids[:, 1:])
    log_mu = z.double().log_softmax(1)
    backend.close(draw.log_weights, -math.log(4) - log_mu.gather(1, draw.ids))
    backend.close(draw.logprobs, log_mu.gather(1, draw.ids))


def test_a_rollouts_token_that_is_in_the_head_replaces_nothing(backend: Backend, rng: torch.Generator) -> None:
    z = backend.tensor(torch.randn(6, 12, generator=rng, dtype=torch.float64))
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    own = torch.stack([order[n, rank] for n, rank in enumerate([0, 2, 3, 1, 7, 11])])
    plain = sample_support(z, num_samples=2, head=3, seed=5)
    draw = sample_support(z, num_samples=2, head=3, seed=5, sampled_ids=own)
    first = torch.tensor([0, 0, 1, 0, 1, 1]).bool()
    assert torch.equal(draw.ids[:, 3], torch.where(first, own, plain.ids[:, 3]))
    assert torch.equal(draw.ids[:, 4], plain.ids[:, 4])
    rest = z.double().scatter(1, order[:, :3], -INF).logsumexp(1, keepdim=True)
    backend.close(draw.log_weights[:, 3:], rest - math.log(2) - z.double().gather(1, draw.ids[:, 3:]))


@pytest.mark.host_only
def test_a_rollouts_token_without_probability_is_refused(engine: str) -> None:
    z = torch.zeros(2, 4)
    z[1, 3] = -INF
    with pytest.raises(ValueError, match=r"sampled_ids"):
        sample_support(z, num_samples=2, seed=0, sampled_ids=torch.tensor([0, 3]))


@pytest.mark.host_only
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_a_rollouts_token_outside_the_vocabulary_is_refused(engine: str, bad: int) -> None:
    with pytest.raises(ValueError, match=r"sampled_ids"):
        sample_support(torch.zeros(2, 4), num_samples=2, seed=0, sampled_ids=torch.tensor([0, bad]))


@pytest.mark.parametrize("head", [2, 5])
def test_a_tail_without_mass_is_padding(backend: Backend, head: int) -> None:
    z = torch.full((2, 5), -INF)
    z[:, 1], z[:, 3] = 1.0, 2.0
    z[1] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    draw = sample_support(backend.tensor(z), num_samples=3, head=head, seed=4)
    assert (draw.ids[0, head:] == -1).all()
    assert (draw.log_weights[0, head:] == -INF).all()
    assert (draw.logprobs[0, head:] == -INF).all()
    assert draw.ids[0, :2].tolist() == [3, 1]
    if head == 2:
        assert set(draw.ids[1, 2:].tolist()) <= {0, 1, 2}
    else:
        assert (draw.ids[1, 5:] == -1).all()
    assert not draw.log_weights.isnan().any()


def test_a_rollouts_token_in_the_head_of_a_row_without_a_tail(backend: Backend) -> None:
    z = torch.full((1, 4), -INF)
    z[0, 2] = 0.0
    draw = sample_support(backend.tensor(z), num_samples=2, head=1, seed=4, sampled_ids=torch.tensor([2]))
    assert draw.ids.tolist() == [[2, -1, -1]]


def test_a_nan_row_has_valid_ids_and_leaves_its_neighbours_alone(backend: Backend, rng: torch.Generator) -> None:
    z = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    clean = sample_support(backend.tensor(z), num_samples=4, head=2, seed=3)
    z[1, 7] = float("nan")
    draw = sample_support(backend.tensor(z), num_samples=4, head=2, seed=3)
    assert ((draw.ids[1] >= 0) & (draw.ids[1] < 20)).all()
    assert draw.logprobs[1].isnan().all()
    assert draw.logsumexp[1].isnan()
    for mine, theirs in zip(draw, clean, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])


def test_strides_are_followed(backend: Backend, rng: torch.Generator) -> None:
    base = backend.tensor(torch.randn(12, 40, generator=rng, dtype=torch.float64))
    for z in (base[::2, 3:30], base[:, ::2], base.t()):
        mine = sample_support(z, num_samples=5, head=2, seed=9)
        theirs = sample_support(z.contiguous(), num_samples=5, head=2, seed=9)
        assert torch.equal(mine.ids, theirs.ids)
        torch.testing.assert_close(mine.log_weights, theirs.log_weights)


def test_no_rows(backend: Backend) -> None:
    draw = sample_support(backend.tensor(torch.empty(0, 5)), num_samples=2, head=1, seed=0)
    assert draw.ids.shape == draw.log_weights.shape == (0, 3)


def test_the_result_carries_no_gradient(backend: Backend, rng: torch.Generator) -> None:
    draw = sample_support(backend.tensor(torch.randn(2, 5, generator=rng)).requires_grad_(), num_samples=2, seed=0)
    assert not any(t.requires_grad for t in draw)
