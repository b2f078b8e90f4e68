"""Top-K and LSE of a head in Triton: both forms, ties, infinities, NaN, edges of groups and tiles, chunks, epilogue."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from each_backend import DEVICES
from torch import Tensor

from asyncopd.kernels import epilogue as epilogues
from asyncopd.kernels import linear_topk
from asyncopd.kernels.epilogue import Epilogue
from asyncopd.kernels.head_summary import summarize_head
from asyncopd.kernels.launch import Scale
from asyncopd.kernels.linear_topk import Out, Problem, extract, fused_wins
from asyncopd.kernels.regroup import TILE, regroup
from asyncopd.kernels.summary import GROUP, summarize
from asyncopd.kernels.topk import launch_topk

DEVICE = DEVICES["triton"]
INF, NAN = float("inf"), float("nan")
FORMS = pytest.mark.parametrize("fused", [False, True], ids=["chunked", "fused"])


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    z = hidden.double() @ weight.double().t()
    z = (z if bias is None else z + bias.double()) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def run(
    fused: bool,
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Out:
    bias = None if bias is None else bias.to(DEVICE)
    problem = Problem(weight.to(DEVICE), Epilogue.of(bias, logit_scale, softcap), Scale.of(temperature), k)
    return Out(*(x.cpu() for x in extract(hidden.to(DEVICE), problem, fused=fused)))


def check(fused: bool, hidden: Tensor, weight: Tensor, k: int, atol: float = 4e-6, **head: Any) -> None:
    """Ids as a stable sort of the fp64 logits has them, values within fp32 sums of a few dozen products."""
    out = run(fused, hidden, weight, k, **head)
    temperature = head.pop("temperature", 1.0)
    z = logits_of(hidden, weight, head.get("bias"), head.get("logit_scale", 1.0), head.get("softcap"))
    expected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(out.ids, expected)
    lse = (z / temperature).logsumexp(1)
    log_p = (z / temperature).gather(1, expected) - lse[:, None]
    log_p = torch.where((z.gather(1, expected) == -INF) & ~lse.isnan()[:, None], -INF, log_p)
    torch.testing.assert_close(out.lse.double(), lse, rtol=1e-6, atol=atol, equal_nan=True)
    torch.testing.assert_close(out.logprobs.double(), log_p, rtol=1e-6, atol=atol, equal_nan=True)


def random_head(rng: torch.Generator, rows: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width, generator=rng).to(dtype), (torch.randn(vocab, width, generator=rng) / 4).to(dtype)


def whole_numbers(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=rng).bfloat16()


# ------------------------------------------------------------------------------------------------------ both forms


@FORMS
@pytest.mark.parametrize(
    ("dtype", "vocab", "k"),
    [(torch.float32, 7, 7), (torch.bfloat16, 65, 9), (torch.bfloat16, 700, 64), (torch.float16, 1100, 3)],
)
def test_ids_and_values(rng: torch.Generator, fused: bool, dtype: torch.dtype, vocab: int, k: int) -> None:
    # 72 terms: no block of the GEMM divides them. 700 columns: 11 groups in six parts, the last group not whole.
    hidden, weight = random_head(rng, 2, vocab, 72, dtype)
    check(fused, hidden, weight, k)


@FORMS
@pytest.mark.parametrize(
    "head",
    [
        {"bias": True},
        {"temperature": 0.3},
        {"logit_scale": -0.7},
        {"bias": True, "temperature": 1.7, "logit_scale": 2.5, "softcap": 20.0},
    ],
    ids=str,
)
def test_every_part_of_the_head(rng: torch.Generator, fused: bool, head: dict[str, Any]) -> None:
    hidden, weight = random_head(rng, 2, 300, 64, torch.bfloat16)
    bias = torch.randn(300, generator=rng) if head.get("bias") else None
    check(fused, hidden, weight, 20, **{**head, "bias": bias}, atol=1e-5)


@FORMS
@pytest.mark.parametrize("k", [1, 100])
def test_ties_go_to_the_smaller_id(rng: torch.Generator, fused: bool, k: int) -> None:
    # Whole numbers: exact in any order of summation. Every group holds the same logits, most of them more than once.
    hidden, weight = whole_numbers(rng, 4, 6), whole_numbers(rng, 25, 6).repeat(12, 1)
    hidden[1] = 0
    check(fused, hidden, weight, k)


@FORMS
def test_nan_and_infinities(rng: torch.Generator, fused: bool) -> None:
    hidden, weight = random_head(rng, 3, 300, 8, torch.float32)
    hidden[1, 3] = NAN
    out = run(fused, hidden, weight, 8)
    assert out.lse[1].isnan()
    assert out.logprobs[1].isnan().all()
    assert torch.equal(out.ids[1], torch.arange(8))
    # Its neighbours do not notice.
    for bias in (INF, -INF):
        infinite = torch.zeros(300)
        infinite[[64, 130]] = bias
        check(fused, hidden[::2], weight, 8, bias=infinite)
    nothing = torch.full((300,), -INF)
    check(fused, hidden[::2], weight, 8, bias=nothing)


@FORMS
def test_one_nan_comes_first_and_is_not_its_whole_group(rng: torch.Generator, fused: bool) -> None:
    hidden, weight = random_head(rng, 1, 300, 8, torch.float32)
    weight[200, 5] = NAN
    out = run(fused, hidden, weight, 4)
    assert out.lse.isnan()
    z = hidden.double() @ weight.double().t()
    z[0, 200] = INF
    assert torch.equal(out.ids, torch.sort(z, dim=1, descending=True, stable=True).indices[:, :4])


@FORMS
def test_chunks_do_not_matter(rng: torch.Generator, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers: BLAS may sum in another order where there are fewer rows.
    hidden, weight = whole_numbers(rng, 3, 16), whole_numbers(rng, 130, 16)
    whole = run(fused, hidden, weight, 5)
    monkeypatch.setattr(linear_topk, "CHUNK_BYTES", 2000)  # two rows and one; one and one and one
    for mine, theirs in zip(run(fused, hidden, weight, 5), whole, strict=True):
        assert torch.equal(mine, theirs)


@FORMS
def test_layouts(rng: torch.Generator, fused: bool) -> None:
    hidden, weight = random_head(rng, 6, 200, 40, torch.float32)
    expected = run(fused, hidden[::2, 3:20].contiguous(), weight[5:155, 3:20].contiguous(), 9)
    transposed = weight[5:155, 3:20].t().contiguous().t()
    for out in (
        run(fused, hidden[::2, 3:20], weight[5:155, 3:20], 9),
        run(fused, hidden[::2, 3:20], transposed, 9),
    ):
        assert torch.equal(out.ids, expected.ids)
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=2e-6)


@FORMS
def test_no_rows(fused: bool) -> None:
    out = run(fused, torch.zeros(0, 8), torch.zeros(100, 8), 4)
    assert [list(x.shape) for x in out] == [[0, 4], [0, 4], [0]]


def test_the_fused_form_is_for_many_rows_of_a_head_with_an_epilogue() -> None:
    weight, rows = torch.empty(6400, 8, dtype=torch.bfloat16), torch.empty(100, 8, dtype=torch.bfloat16)
    problem = Problem(weight, Epilogue.of(None, 0.5, None), Scale.of(1.0), 64)
    assert fused_wins(rows, problem)  # 100 rows, 64 groups each, of 100: 64 rows a group
    assert not fused_wins(rows[:99], problem)
    assert not fused_wins(rows.float(), problem)
    assert not fused_wins(rows, problem._replace(epilogue=Epilogue.of(None, 1.0, None)))
    assert fused_wins(rows, problem._replace(epilogue=Epilogue.of(None, 1.0, 30.0)))


# ---------------------------------------------------------------------------------------------------- parts of them


def test_pairs_of_a_group_fill_more_than_one_program(rng: torch.Generator) -> None:
    rows, vocab = 2 * TILE.BM + 5, 3 * GROUP + 10
    hidden, weight = whole_numbers(rng, rows, 6), whole_numbers(rng, vocab, 6)
    # Group 1 is in every row, group 2 in none.
    chosen = torch.stack([torch.zeros(rows), torch.ones(rows)], dim=1).int()
    chosen[::3] = torch.tensor([1, 3], dtype=torch.int32)
    out = regroup(hidden.to(DEVICE), weight.to(DEVICE), Epilogue.of(None, 1.0, None), chosen.to(DEVICE)).cpu()
    z = torch.full((rows, 4 * GROUP), -INF)
    z[:, :vocab] = hidden.float() @ weight.float().t()
    columns = (chosen.long()[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    assert torch.equal(out, z.gather(1, columns))


@pytest.mark.skipif(DEVICE == "cpu", reason="numpy's products depend on their shapes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_logit_is_the_same_number_in_both_products(rng: torch.Generator, dtype: torch.dtype) -> None:
    hidden, weight = random_head(rng, 300, 4096, 2000, dtype)
    hidden, weight, head = hidden.to(DEVICE), weight.to(DEVICE), Epilogue.of(None, 1.3, 20.0)
    groups = torch.arange(64, dtype=torch.int32, device=DEVICE).expand(300, 64)
    again = regroup(hidden, weight, head, groups).view(300, 64, GROUP)
    assert torch.equal(summarize_head(hidden, weight, head, Scale.of(1.0)).peaks, again.amax(2))


def test_the_summary_of_a_head_is_that_of_its_logits(rng: torch.Generator) -> None:
    hidden, weight = whole_numbers(rng, 133, 6), whole_numbers(rng, 330, 6)
    bias = torch.zeros(330)
    bias[100], bias[150:] = NAN, -400.0  # later groups underflow in no sum but a shared one
    scale = Scale.of(2.0)
    out = summarize_head(hidden.to(DEVICE), weight.to(DEVICE), Epilogue.of(bias.to(DEVICE), 1.0, None), scale)
    z = hidden.double() @ weight.double().t() + bias
    groups = torch.cat([z, torch.full((133, -330 % GROUP), -INF)], dim=1).view(133, -1, GROUP)
    torch.testing.assert_close(
        out.peaks[:, : groups.shape[1]].double().cpu(), groups.amax(2), rtol=0, atol=0, equal_nan=True
    )
    assert out.lse.isnan().all()
    assert out.row_sums.isnan().all()
    bias[100] = 0.0
    out = summarize_head(hidden.to(DEVICE), weight.to(DEVICE), Epilogue.of(bias.to(DEVICE), 1.0, None), scale)
    z = hidden.double() @ weight.double().t() + bias
    assert torch.equal(out.row_peaks.double().cpu(), z.amax(1))
    sums = ((z - z.amax(1, keepdim=True)) / 2.0).exp().sum(1)
    torch.testing.assert_close(out.row_sums.double().cpu(), sums, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 128, 1500])
def test_logsumexp(rng: torch.Generator, dtype: torch.dtype, vocab: int) -> None:
    hidden, weight = random_head(rng, 40, vocab, 32, dtype)
    bias = torch.randn(vocab, generator=rng)
    for temperature in (0.4, 3.0):
        epilogue = Epilogue.of(bias.to(DEVICE), 1.5, 25.0)
        out = summarize_head(hidden.to(DEVICE), weight.to(DEVICE), epilogue, Scale.of(temperature)).lse.cpu()
        exact = (logits_of(hidden, weight, bias, 1.5, 25.0) / temperature).logsumexp(1)
        torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=3e-6)


def test_logsumexp_of_infinities(rng: torch.Generator) -> None:
    hidden, weight = torch.zeros(3, 4, device=DEVICE), torch.zeros(200, 4, device=DEVICE)
    for value in (INF, -INF, 7.0):
        bias = torch.full((200,), value if value < 0 else 0.0, device=DEVICE)
        bias[150] = value
        expected = {INF: INF, -INF: -INF, 7.0: torch.logsumexp(bias, 0).item()}[value]
        out = summarize_head(hidden, weight, Epilogue.of(bias, 1.0, None), Scale.of(1.0)).lse
        torch.testing.assert_close(out.cpu(), torch.full((3,), expected), rtol=2e-7, atol=0)


def test_a_rows_sum_may_be_of_more_columns_than_are_chosen_among() -> None:
    # 2^20 equal logits, of which 64 are here: their sum in the fixed point of 64 columns would overflow.
    z = torch.zeros(1, 64, device=DEVICE)
    summary = summarize(z, Scale.of(1.0), peaks=True, sums=False)
    summary = summary._replace(tile_sums=torch.full((1, 1), 2.0**20, device=DEVICE))
    out = Out(
        torch.empty(1, 2, dtype=torch.int64, device=DEVICE),
        torch.empty(1, 2, device=DEVICE),
        torch.empty(1, device=DEVICE),
    )
    launch_topk(z, summary, 2, Scale.of(1.0), *out, columns=2**20)
    torch.testing.assert_close(out.lse.double().cpu(), torch.full((1,), 2.0**20).double().log(), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.logprobs.double().cpu(), -torch.full((1, 2), 2.0**20).double().log())


@triton.jit
def _tanh(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, epilogues.tanh(tl.load(x + at)))


def test_tanh_is_right_to_its_last_digits() -> None:
    magnitudes = torch.cat(
        [torch.logspace(-30, 1.6, 2000), torch.linspace(0.5, 0.6, 40), torch.tensor([0.0, INF, NAN])]
    )
    x = torch.cat([magnitudes, -magnitudes, torch.zeros(4096 - 2 * len(magnitudes))])
    out = torch.empty(4096, device=DEVICE)
    _tanh[(1,)](x.to(DEVICE), out, 4096)
    torch.testing.assert_close(out.double().cpu(), x.double().tanh(), rtol=2.5e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_the_epilogue_in_place(rng: torch.Generator, softcap: float | None) -> None:
    memory = 5 * torch.randn(3, 2200, generator=rng)
    memory[1, :4] = torch.tensor([INF, -INF, NAN, 3e38])
    bias = torch.randn(2100, generator=rng).double()
    z = memory.clone().to(DEVICE)[:, :2100]
    Epilogue.of(bias.to(DEVICE), -1.5, softcap).apply(z)
    exact = (memory[:, :2100] + bias.float()).double() * -1.5
    exact = exact.float().double()
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
    torch.testing.assert_close(z.double().cpu(), exact, rtol=3e-7, atol=1e-37, equal_nan=True)
