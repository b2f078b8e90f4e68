"""topk_logprobs: the exact ids, in a promised order, with their log-probabilities."""

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import topk_logprobs

pytestmark = pytest.mark.ops("topk_logprobs")
INF = float("inf")


def stable_ids(logits: Tensor, k: int) -> Tensor:
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]


def check(backend: Backend, logits: Tensor, k: int, temperature: float = 1.0) -> None:
    logits = backend.tensor(logits)
    out = topk_logprobs(logits, k, temperature=temperature)
    log_p = (logits.double() / temperature).log_softmax(1)
    assert torch.equal(out.ids, stable_ids(logits, k))
    backend.close(out.logprobs, log_p.gather(1, out.ids))
    backend.close(out.logsumexp, (logits.double() / temperature).logsumexp(1))


@pytest.mark.parametrize("k", [1, 2, 63, 127])
def test_order_and_values_at_an_odd_vocabulary(backend: Backend, rng: torch.Generator, k: int) -> None:
    check(backend, 4 * torch.randn(9, 127, generator=rng, dtype=torch.float64), k)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 3.0])
def test_temperature_divides_the_logits(backend: Backend, rng: torch.Generator, temperature: float) -> None:
    check(backend, 2 * torch.randn(4, 33, generator=rng, dtype=torch.float64), 5, temperature)


def test_ties_go_to_the_smaller_id(backend: Backend, rng: torch.Generator) -> None:
    # Five values over 300 tokens: every boundary of a top-k cuts through a tie.
    logits = torch.randint(0, 5, (16, 300), generator=rng).double()
    for k in (1, 7, 64, 299):
        check(backend, logits, k)


def test_temperature_does_not_reorder_near_ties(engine: str) -> None:
    # 64 neighbours just below 2, ascending: divided by 1.9 in fp32 many become equal. The order is that of the logits.
    ascending = torch.tensor([2.0 - 2.0**-23 * (64 - i) for i in range(64)])
    assert (ascending / 1.9).unique().numel() < 64
    assert topk_logprobs(ascending[None], 64, temperature=1.9).ids[0].tolist() == list(range(63, -1, -1))


def test_all_tokens_are_a_distribution(backend: Backend, rng: torch.Generator) -> None:
    out = topk_logprobs(backend.tensor(torch.randn(3, 41, generator=rng)), 41)
    backend.close(out.logprobs.exp().sum(1), torch.ones(3))
    assert (out.ids.sort(1).values == torch.arange(41)).all()


def test_minus_inf_logits_come_last_and_have_no_mass(backend: Backend, rng: torch.Generator) -> None:
    logits = torch.randn(4, 10, generator=rng, dtype=torch.float64)
    logits[:, [0, 3, 9]] = -INF
    out = topk_logprobs(backend.tensor(logits), 10)
    assert torch.equal(out.ids[:, 7:], torch.tensor([0, 3, 9]).expand(4, 3))
    assert (out.logprobs[:, 7:] == -INF).all()
    backend.close(out.logprobs[:, :7].exp().sum(1), torch.ones(4))


def test_a_row_without_mass_has_valid_ids_and_no_nan(backend: Backend) -> None:
    out = topk_logprobs(backend.tensor(torch.full((2, 6), -INF)), 3)
    assert torch.equal(out.ids, torch.arange(3).expand(2, 3))
    assert (out.logprobs == -INF).all()
    assert (out.logsumexp == -INF).all()


def test_a_row_with_a_nan_is_nan_and_leaves_its_neighbours_alone(backend: Backend, rng: torch.Generator) -> None:
    logits = backend.tensor(torch.randn(3, 17, generator=rng, dtype=torch.float64))
    clean = topk_logprobs(logits, 4)
    logits[1, 5] = float("nan")
    logits[1, 6] = -INF
    out = topk_logprobs(logits, 17)
    assert out.logprobs[1].isnan().all()
    assert out.logsumexp[1].isnan()
    assert torch.equal(out.ids[1].sort().values, torch.arange(17))
    for row in (0, 2):
        assert torch.equal(out.ids[row, :4], clean.ids[row])
        backend.close(out.logprobs[row, :4], clean.logprobs[row].double())


@pytest.mark.parametrize("layout", ["rows_apart", "every_second_column", "transposed", "reversed_storage"])
def test_strides_are_followed(backend: Backend, rng: torch.Generator, layout: str) -> None:
    base = backend.tensor(torch.randn(24, 60, generator=rng, dtype=torch.float64))
    logits = {
        "rows_apart": base[::3, 7:40],
        "every_second_column": base[:, 1::2],
        "transposed": base.t(),
        "reversed_storage": base.flatten()[5:].as_strided((6, 31), (97, 1)),
    }[layout]
    out, expected = topk_logprobs(logits, 8), topk_logprobs(logits.contiguous(), 8)
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.ids, stable_ids(logits, 8))
    backend.close(out.logprobs, expected.logprobs.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_summed_in_fp32(engine: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(6, 5003, generator=rng)).to(dtype)
    out = topk_logprobs(logits, 64)
    log_p = logits.double().log_softmax(1)
    assert out.logprobs.dtype == out.logsumexp.dtype == torch.float32
    assert out.ids.dtype == torch.int64
    assert torch.equal(out.ids, stable_ids(logits, 64))
    # fp32 rounding of log-probabilities up to 60 in size; a bf16 sum would be off by 1e-2.
    torch.testing.assert_close(out.logprobs.double(), log_p.gather(1, out.ids), rtol=0, atol=1e-5)


def test_huge_logits_do_not_overflow(backend: Backend) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4 - 2, -2e4]], dtype=torch.float64)
    out = topk_logprobs(backend.tensor(logits), 3)
    # One unit of an fp32 logit of 1e4 is 1e-3: LSE can be no better, log-probabilities no better than it.
    torch.testing.assert_close(out.logprobs.double(), logits.log_softmax(1), rtol=0, atol=1e-3)


def test_no_rows(backend: Backend) -> None:
    out = topk_logprobs(backend.tensor(torch.empty(0, 5)), 2)
    assert out.ids.shape == out.logprobs.shape == (0, 2)
    assert out.logsumexp.shape == (0,)


def test_the_result_carries_no_gradient(backend: Backend, rng: torch.Generator) -> None:
    out = topk_logprobs(backend.tensor(torch.randn(2, 5, generator=rng)).requires_grad_(), 2)
    assert not out.logprobs.requires_grad
    assert not out.logsumexp.requires_grad
