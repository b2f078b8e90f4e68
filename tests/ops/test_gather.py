"""gather_logprobs: values and gradient of log softmax(logits / T) at a few ids of each row."""

import pytest
import torch
from each_backend import Backend

from asyncopd import gather_logprobs
from asyncopd.backends.reference import rows

pytestmark = pytest.mark.ops("gather_logprobs", "gather_logprobs_backward")
INF = float("inf")


def inputs(rng: torch.Generator, n: int = 7, v: int = 23, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 2 * torch.randn(n, v, generator=rng, dtype=torch.float64)
    return logits, torch.randint(0, v, (n, k), generator=rng)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.3])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_values_and_gradient(backend: Backend, rng: torch.Generator, temperature: float, id_dtype: torch.dtype) -> None:
    logits, ids = inputs(rng)
    logits = backend.tensor(logits).requires_grad_()
    ids = backend.tensor(ids.to(id_dtype))
    upstream = backend.tensor(torch.randn(ids.shape, generator=rng, dtype=torch.float64))
    out = gather_logprobs(logits, ids, temperature=temperature)
    out.backward(upstream)

    z = logits.detach().double().requires_grad_()
    expected = (z / temperature).log_softmax(1).gather(1, ids.long())
    expected.backward(upstream.double())
    backend.close(out, expected)
    assert logits.grad is not None
    assert z.grad is not None
    backend.close(logits.grad, z.grad)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(rng: torch.Generator, temperature: float) -> None:
    logits, ids = inputs(rng, 4, 6, 3)
    ids[1, 2] = ids[1, 0]  # an id twice
    assert torch.autograd.gradcheck(lambda z: gather_logprobs(z, ids, temperature=temperature), logits.requires_grad_())


def test_duplicated_ids_add_their_gradients(backend: Backend, rng: torch.Generator) -> None:
    logits = backend.tensor(torch.randn(1, 5, generator=rng, dtype=torch.float64))
    twice, once = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    gather_logprobs(twice, torch.tensor([[2, 2, 4]])).sum().backward()
    (gather_logprobs(once, torch.tensor([[2, 4]])) * backend.tensor(torch.tensor([[2.0, 1.0]]))).sum().backward()
    assert twice.grad is not None
    assert once.grad is not None
    backend.close(twice.grad, once.grad.double())


def test_pads_are_minus_inf_and_receive_no_gradient(backend: Backend, rng: torch.Generator) -> None:
    logits, ids = inputs(rng, 3, 9, 4)
    ids[0, 1], ids[2] = -1, -1
    logits = backend.tensor(logits).requires_grad_()
    out = gather_logprobs(logits, ids)
    assert torch.equal(out == -INF, ids == -1)
    # An upstream gradient of any size at a pad is dropped.
    upstream = torch.where(ids == -1, torch.tensor(7.0), torch.tensor(1.0)).to(backend.dtype)
    out.backward(upstream)
    z = logits.detach().double().requires_grad_()
    expected = z.log_softmax(1).gather(1, ids.clamp(min=0))
    expected.backward((ids >= 0).double())
    assert logits.grad is not None
    assert z.grad is not None
    backend.close(logits.grad, z.grad)
    assert (logits.grad[2] == 0).all()


def test_minus_inf_logits_have_no_probability_and_no_gradient(backend: Backend, rng: torch.Generator) -> None:
    logits, _ = inputs(rng, 2, 6)
    logits[:, 4] = -INF
    logits = backend.tensor(logits).requires_grad_()
    out = gather_logprobs(logits, torch.tensor([[4, 0], [1, 4]]))
    assert out[0, 0] == -INF
    assert out[1, 1] == -INF
    out.backward(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=backend.dtype))
    assert logits.grad is not None
    assert (logits.grad[:, 4] == 0).all()
    expected = -logits.detach().double().softmax(1) * torch.tensor([[1.0], [2.0]])
    expected[0, 0] += 1
    expected[1, 1] += 2
    backend.close(logits.grad, expected)


def test_a_row_without_mass_is_minus_inf_and_not_nan(backend: Backend) -> None:
    logits = backend.tensor(torch.full((1, 4), -INF)).requires_grad_()
    out = gather_logprobs(logits, torch.tensor([[0, 3]]))
    assert (out == -INF).all()
    out.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_nan_row_is_nan_and_its_neighbours_are_not(backend: Backend, rng: torch.Generator) -> None:
    logits, ids = inputs(rng, 3, 8, 3)
    logits[1, 0] = float("nan")
    ids[1] = torch.tensor([0, 5, -1])
    logits = backend.tensor(logits).requires_grad_()
    out = gather_logprobs(logits, ids)
    assert out[1, :2].isnan().all()
    assert out[1, 2] == -INF
    assert out[[0, 2]].isfinite().all()
    out[[0, 2]].sum().backward()  # the row is dropped: its upstream gradient is zero
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


@pytest.mark.host_only
@pytest.mark.parametrize("bad", [-2, 23, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_refused_by_name(engine: str, rng: torch.Generator, bad: int) -> None:
    logits, ids = inputs(rng)
    ids[3, 2] = bad
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=r"ids"):
            gather_logprobs(logits.float(), ids.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(engine: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(6, 3001, generator=rng)).to(dtype).requires_grad_()
    ids = torch.randint(0, 3001, (6, 9), generator=rng)
    out = gather_logprobs(logits, ids)
    out.sum().backward()
    z = logits.detach().double().requires_grad_()
    expected = z.log_softmax(1).gather(1, ids)
    expected.sum().backward()
    assert out.dtype == torch.float32
    # fp32 rounding; sums in bf16 would be off by 1e-2.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    # Computed in fp32 and rounded once: half a unit of the logits' dtype (and its smallest subnormal).
    tiny = torch.finfo(dtype)
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=tiny.eps * 0.51, atol=tiny.smallest_normal * tiny.eps)


@pytest.mark.parametrize("layout", ["rows_apart", "every_second_column", "transposed"])
def test_strides_are_followed(backend: Backend, rng: torch.Generator, layout: str) -> None:
    base = backend.tensor(torch.randn(24, 60, generator=rng, dtype=torch.float64))
    logits = {"rows_apart": base[::3, 7:40], "every_second_column": base[:, 1::2], "transposed": base.t()}[layout]
    ids = torch.randint(0, logits.shape[1], (2 * logits.shape[0], 8), generator=rng)[::2, ::2]
    leaf = logits.detach().requires_grad_()
    out = gather_logprobs(leaf, ids)
    backend.close(out, logits.double().log_softmax(1).gather(1, ids))
    out.sum().backward()
    assert leaf.grad is not None
    expected = -ids.shape[1] * logits.double().softmax(1)
    backend.close(leaf.grad, expected.scatter_add(1, ids, torch.ones(ids.shape, dtype=torch.float64)))


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_chunk_size_does_not_matter(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    logits, ids = inputs(rng, 11)
    whole = logits.clone().requires_grad_()
    gather_logprobs(whole, ids).sum().backward()
    monkeypatch.setattr(rows, "TILE_ELEMENTS", tile)
    parts = logits.clone().requires_grad_()
    gather_logprobs(parts, ids).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-13, atol=1e-13)


def test_empty_rows_and_empty_supports(backend: Backend) -> None:
    assert gather_logprobs(backend.tensor(torch.empty(0, 5)), torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)
    logits = backend.tensor(torch.zeros(2, 5)).requires_grad_()
    out = gather_logprobs(logits, torch.empty(2, 0, dtype=torch.int64))
    assert out.shape == (2, 0)
    out.sum().backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()
