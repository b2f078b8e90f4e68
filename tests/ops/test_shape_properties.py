"""Properties of the ops over shapes, pads and layouts that nobody picked by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncopd import gather_logprobs, linear_gather_logprobs, linear_topk_logprobs, sample_support, topk_logprobs

FEW = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def rows_of_logits(draw: st.DrawFn) -> Tensor:
    """[N, V] fp64, some logits -inf, at least one finite in a row."""
    n, v = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = draw(st.sampled_from([0.1, 3.0, 50.0])) * torch.randn(n, v, generator=rng, dtype=torch.float64)
    if draw(st.booleans()):
        banned = torch.rand(n, v, generator=rng) < 0.4
        banned[:, int(torch.randint(0, v, (1,), generator=rng))] = False
        logits[banned] = -torch.inf
    return logits


@st.composite
def ids_for(draw: st.DrawFn, rows: int, vocab: int) -> Tensor:
    k = draw(st.integers(0, 7))
    values = draw(st.lists(st.integers(-1, vocab - 1), min_size=rows * k, max_size=rows * k))
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).reshape(rows, k)


@FEW
@given(st.data())
def test_topk_is_the_stable_sort(data: st.DataObject) -> None:
    logits = data.draw(rows_of_logits())
    k = data.draw(st.integers(1, logits.shape[1]))
    out = topk_logprobs(logits, k)
    assert torch.equal(out.ids, torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k])
    torch.testing.assert_close(out.logprobs, logits.log_softmax(1).gather(1, out.ids))
    assert (out.logprobs <= 1e-12).all()
    assert (out.logprobs[:, 1:] <= out.logprobs[:, :-1]).all()


@FEW
@given(st.data())
def test_gather_is_log_softmax_at_the_ids(data: st.DataObject) -> None:
    logits = data.draw(rows_of_logits()).requires_grad_()
    ids = data.draw(ids_for(*logits.shape))
    out = gather_logprobs(logits, ids)
    expected = logits.detach().log_softmax(1).gather(1, ids.long().clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    torch.testing.assert_close(out, expected)
    out.masked_fill(out.isinf(), 0.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # A softmax does not notice a constant.
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(len(logits)).double(), rtol=0, atol=1e-10)


@FEW
@given(st.data())
def test_linear_ops_are_the_ops_on_their_logits(data: st.DataObject) -> None:
    n, v, h = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    hidden = torch.randn(n, h, generator=rng, dtype=torch.float64)
    weight = torch.randn(v, h, generator=rng, dtype=torch.float64)
    ids, k = data.draw(ids_for(n, v)), data.draw(st.integers(1, v))
    logits = hidden @ weight.t()
    torch.testing.assert_close(linear_gather_logprobs(hidden, weight, ids), gather_logprobs(logits, ids))
    for mine, theirs in zip(linear_topk_logprobs(hidden, weight, k), topk_logprobs(logits, k), strict=True):
        torch.testing.assert_close(mine, theirs)


@FEW
@given(st.data())
def test_a_draw_is_a_support(data: st.DataObject) -> None:
    logits = data.draw(rows_of_logits())
    head = data.draw(st.integers(0, logits.shape[1]))
    m = data.draw(st.integers(0 if head else 1, 9))
    draw = sample_support(logits, num_samples=m, head=head, seed=data.draw(st.integers(-(2**63), 2**63 - 1)))
    assert draw.ids.shape == draw.log_weights.shape == draw.logprobs.shape == (len(logits), head + m)
    pads = draw.ids == -1
    assert not pads[:, :head].any()
    assert ((draw.ids >= -1) & (draw.ids < logits.shape[1])).all()
    assert (draw.log_weights[pads] == -torch.inf).all()
    assert (draw.logprobs[pads] == -torch.inf).all()
    tail = ~pads[:, head:]
    assert logits.gather(1, draw.ids.clamp(min=0))[:, head:][tail].isfinite().all()  # nothing impossible is drawn
    in_head = (draw.ids[:, head:, None] == draw.ids[:, None, :head]).any(2)
    assert not (in_head & tail).any()
    assert not draw.log_weights.isnan().any()
