"""linear_topk_logprobs is topk_logprobs of logits that are never held whole."""

from typing import Any

import pytest
import torch
from each_backend import Backend

from asyncopd import linear_topk_logprobs, topk_logprobs
from asyncopd.backends.reference import rows

pytestmark = pytest.mark.ops("linear_topk_logprobs")
HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"temperature": 0.6},
    {"logit_scale": 0.3},
    {"logit_scale": -1.7},
    {"softcap": 2.0},
    {"bias": True, "temperature": 1.7, "logit_scale": 2.5, "softcap": 3.0},
]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_equals_topk_of_the_materialised_logits(
    backend: Backend, rng: torch.Generator, options: dict[str, Any]
) -> None:
    # Small enough that the cap does not flatten the best logits into ties of fp32.
    hidden = 0.3 * torch.randn(13, 8, generator=rng, dtype=torch.float64)
    weight = torch.randn(101, 8, generator=rng, dtype=torch.float64)
    bias = backend.tensor(0.3 * torch.randn(101, generator=rng, dtype=torch.float64)) if options.get("bias") else None
    hidden, weight = backend.tensor(hidden), backend.tensor(weight)
    scalars = {name: value for name, value in options.items() if name != "bias"}
    out = linear_topk_logprobs(hidden, weight, 9, bias=bias, **scalars)

    # Order is that of the capped, scaled logits; the temperature divides last.
    z = hidden.double() @ weight.double().t()
    z = (z if bias is None else z + bias.double()) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    expected = topk_logprobs(z, 9, temperature=options.get("temperature", 1.0))
    assert torch.equal(out.ids, expected.ids)
    backend.close(out.logprobs, expected.logprobs)
    backend.close(out.logsumexp, expected.logsumexp)


def test_ties_go_to_the_smaller_id(backend: Backend, rng: torch.Generator) -> None:
    # Integer products are exact in fp32, so equal rows of the head give equal logits in any order of summation.
    hidden = torch.randint(-3, 4, (7, 4), generator=rng).double()
    weight = torch.randint(-2, 3, (5, 4), generator=rng).double().repeat(20, 1)
    out = linear_topk_logprobs(backend.tensor(hidden), backend.tensor(weight), 30)
    expected = torch.sort(hidden @ weight.t(), dim=1, descending=True, stable=True).indices[:, :30]
    assert torch.equal(out.ids, expected)


@pytest.mark.parametrize("tile", [1, 90, 1000])
def test_chunk_size_does_not_matter(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    hidden = torch.randn(11, 6, generator=rng, dtype=torch.float64)
    weight = torch.randn(37, 6, generator=rng, dtype=torch.float64)
    whole = linear_topk_logprobs(hidden, weight, 5)
    monkeypatch.setattr(rows, "TILE_ELEMENTS", tile)
    out = linear_topk_logprobs(hidden, weight, 5)
    assert torch.equal(out.ids, whole.ids)
    torch.testing.assert_close(out.logprobs, whole.logprobs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_are_summed_in_fp32(engine: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 512, generator=rng).to(dtype)
    weight = (torch.randn(203, 512, generator=rng) / 8).to(dtype)
    out = linear_topk_logprobs(hidden, weight, 203)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(1)
    # fp32 sums of 512 products of size 1; logits rounded to bf16 would be off by 3e-2.
    torch.testing.assert_close(out.logprobs.double(), log_p.gather(1, out.ids), rtol=0, atol=2e-5)


def test_a_nan_row_leaves_its_neighbours_alone(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight = torch.randn(3, 4, generator=rng), torch.randn(9, 4, generator=rng)
    hidden[1, 0] = float("nan")
    out = linear_topk_logprobs(backend.tensor(hidden), backend.tensor(weight), 4)
    assert out.logprobs[1].isnan().all()
    assert out.logprobs[[0, 2]].isfinite().all()
    assert ((out.ids >= 0) & (out.ids < 9)).all()
