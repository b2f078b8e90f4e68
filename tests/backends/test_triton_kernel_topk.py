"""The row summary and exact top-K in Triton: blocks' edges, ties, infinities, NaN, layouts, precision."""

import pytest
import torch
import triton
import triton.language as tl
from each_backend import DEVICES
from torch import Tensor

from asyncopd.kernels import topk_logprobs
from asyncopd.kernels.launch import Scale
from asyncopd.kernels.summary import GROUP, MAX_VOCAB, summarize
from asyncopd.kernels.topk import store_best

DEVICE = DEVICES["triton"]
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(logits: Tensor, k: int, temperature: float = 1.0, atol: float = 2e-6) -> None:
    """Ids as a stable sort has them, values within 2e-6 of fp64 (and a unit of fp32 where that is more)."""
    ids, logprobs, lse = (x.cpu() for x in topk_logprobs(logits.to(DEVICE), k, temperature))
    expected = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids, expected)
    z = logits.double() / temperature
    exact = z.logsumexp(1)
    log_p = z.gather(1, ids) - exact[:, None]
    log_p = torch.where((z.gather(1, ids) == -INF) & ~exact.isnan()[:, None], -INF, log_p)
    torch.testing.assert_close(lse.double(), exact, rtol=2**-23, atol=atol, equal_nan=True)
    torch.testing.assert_close(logprobs.double(), log_p, rtol=2**-23, atol=atol, equal_nan=True)


@triton.jit
def _best(keys, out, lowest, count, BLOCK: tl.constexpr):
    least = store_best(out, tl.load(keys + tl.arange(0, BLOCK)), tl.load(lowest), count, BLOCK)
    tl.store(out + BLOCK, least)


@pytest.mark.parametrize("values", [3, 40, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 5, 127, 128])
def test_a_choice_is_the_first_of_the_largest_in_their_order(rng: torch.Generator, values: int, count: int) -> None:
    keys = torch.randint(-values, values, (128,), generator=rng, dtype=torch.int32)
    largest = torch.sort(keys, descending=True, stable=True).indices[:count].sort().values.int()
    # From any bound that is low enough, nothing past the count is written.
    for lowest in (-(2**31), int(keys[largest.long()].min())):
        out = torch.full((129,), -7, dtype=torch.int32, device=DEVICE)
        _best[(1,)](keys.to(DEVICE), out, torch.tensor([lowest], dtype=torch.int32, device=DEVICE), count, 128)
        assert torch.equal(out[:count].cpu(), largest)
        assert (out[count:128] == -7).all()
        # A bound of the next choice: no larger than a chosen key, no smaller than the bound of this one.
        assert lowest <= out[128].item() <= keys[largest.long()].min()
        # Keys far apart: the search ends long before it has found the smallest one chosen.
        if values > 2**30 and lowest == -(2**31):
            assert out[128].item() < keys[largest.long()].min()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 9, 63, 65, 500, 4095, 4097])
def test_vocabularies_that_no_block_divides(rng: torch.Generator, dtype: torch.dtype, vocab: int) -> None:
    logits = (3 * torch.randn(2, vocab, generator=rng)).to(dtype)
    for k in sorted({1, min(vocab, 64), min(vocab, 256)}):
        check(logits, k)


@pytest.mark.parametrize("k", [1, 16, 17, 64, 65, 1024])
def test_every_size_of_block(rng: torch.Generator, k: int) -> None:
    check((4 * torch.randn(1, 2100, generator=rng)).bfloat16(), k)


@pytest.mark.parametrize("k", [1, 64, 256])
@pytest.mark.parametrize("value", [0.0, -3.5, -INF])
def test_rows_of_equal_logits_give_the_first_ids(k: int, value: float) -> None:
    check(torch.full((2, 2500), value), k)


def test_zeros_of_either_sign_are_equal() -> None:
    logits = torch.full((1, 300), -0.0)
    logits[0, ::3] = 0.0
    check(logits, 200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_across_groups(rng: torch.Generator, dtype: torch.dtype) -> None:
    check(torch.randint(0, 4, (2, 1000), generator=rng).to(dtype), 256)


@pytest.mark.parametrize("descending", [False, True])
def test_all_of_the_best_in_a_few_groups(descending: bool) -> None:
    row = torch.arange(3000).float().sort(descending=descending).values
    check(torch.stack([row, -row]), 256, atol=3e-4)  # logits of 3000 have units of 2.4e-4


def test_more_than_a_row_has_that_is_finite(rng: torch.Generator) -> None:
    logits = torch.full((3, 700), -INF)
    logits[0, 5], logits[1, [699, 64, 63]] = 1.0, torch.tensor([1.0, 2.0, 2.0])
    for k in (1, 3, 64):
        check(logits, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 4, 64])
def test_nan_comes_first_and_then_infinity(rng: torch.Generator, dtype: torch.dtype, k: int) -> None:
    logits = torch.randn(5, 600, generator=rng)
    logits[0, [599, 70, 3]] = NAN
    logits[1, [200, 100]] = INF
    logits[2, 64], logits[2, 66], logits[2, 300], logits[2, 301] = NAN, INF, INF, NAN
    logits[3] = NAN
    # Row 4 must not notice its neighbours.
    check(logits.to(dtype), k)


@pytest.mark.parametrize("layout", ["rows_apart", "unaligned", "the_same_row", "every_second_column"])
def test_layouts(rng: torch.Generator, layout: str) -> None:
    base = torch.randn(6, 1500, generator=rng).to(DEVICE)
    logits = {
        "rows_apart": base[::2, 100:800],
        "unaligned": base.flatten()[1:].as_strided((3, 701), (1499, 1)),
        "the_same_row": base[:1].expand(3, 1500),
        "every_second_column": base[:, ::2],
    }[layout]
    ids, logprobs, lse = topk_logprobs(logits, 20, 1.0)
    plain = topk_logprobs(logits.contiguous(), 20, 1.0)
    assert torch.equal(ids, plain[0])
    # Whether the row stride is a multiple of 16 decides how threads share a row: sums differ in their order.
    torch.testing.assert_close((logprobs, lse), plain[1:], rtol=0, atol=1e-6)
    check(logits.cpu(), 20)


def test_a_row_stride_beyond_32_bits(rng: torch.Generator) -> None:
    logits = torch.randn(1, 300, generator=rng).to(DEVICE)
    far = logits.as_strided((1, 300), (2**40, 1))
    assert torch.equal(topk_logprobs(far, 5, 1.0)[0], topk_logprobs(logits, 5, 1.0)[0])


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, -90.0])
def test_log_probabilities_are_right_to_2e_6(rng: torch.Generator, temperature: float, offset: float) -> None:
    check(10 * torch.randn(2, 4500, generator=rng) + offset, 64, temperature)


def test_a_row_depends_on_nothing_beside_it(rng: torch.Generator) -> None:
    logits = torch.randn(4, 5000, generator=rng).to(DEVICE)
    whole = topk_logprobs(logits, 8, 0.9)
    for n in range(4):
        for mine, theirs in zip(topk_logprobs(logits[n : n + 1], 8, 0.9), whole, strict=True):
            assert torch.equal(mine[0], theirs[n])


def test_the_summary_is_each_groups_own(rng: torch.Generator) -> None:
    # A group 200 below the next one underflows in no sum but a shared one.
    logits = torch.randn(2, 4500, generator=rng)
    logits[:, GROUP : 2 * GROUP] -= 200
    logits[1, 4400] = -INF
    summary = summarize(logits.to(DEVICE), Scale.of(0.8), peaks=True, sums=True)
    padded = torch.cat([logits, torch.full((2, -4500 % GROUP), -INF)], 1).view(2, -1, GROUP)
    groups = padded.shape[1]
    peaks = padded.amax(2)
    sums = ((padded - peaks[..., None]).double() / 0.8).exp().sum(2)
    assert torch.equal(summary.peaks[:, :groups].cpu(), peaks)
    torch.testing.assert_close(summary.sums[:, :groups].double().cpu(), sums, rtol=4e-7, atol=0)
    tiles = torch.stack([padded[:, :64].flatten(1).amax(1), padded[:, 64:].flatten(1).amax(1)], 1)
    assert torch.equal(summary.tile_peaks.cpu(), tiles)
    first = ((padded[:, :64].flatten(1) - tiles[:, :1]).double() / 0.8).exp().sum(1)
    torch.testing.assert_close(summary.tile_sums[:, 0].double().cpu(), first, rtol=4e-7, atol=0)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    logits = torch.zeros(1, 2000, device=DEVICE)
    with pytest.raises(ValueError, match=r"k: got 1025, expected 0\.\.1024"):
        topk_logprobs(logits, 1025, 1.0)
    with pytest.raises(ValueError, match="logits: got V = "):
        topk_logprobs(torch.zeros(1, MAX_VOCAB + 1, dtype=torch.float16, device=DEVICE), 1, 1.0)
    with pytest.raises(TypeError, match=r"logits: got torch\.float64"):
        topk_logprobs(logits.double(), 1, 1.0)
    with pytest.raises(ValueError, match="logits: got device meta"):
        topk_logprobs(logits.to("meta"), 1, 1.0)
