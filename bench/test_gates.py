"""The ratios of the CPU kernels, as benchmarks that fail when one is lost: `make gates`.

Two threads, AVX-512; every ratio is between calls of the same rounds. Every call is checked against fp64 before it is
timed. Machines where the ratios mean something else skip, and say why.
"""

from collections.abc import Callable

import pytest
import torch

from bench import cases
from bench.cases import Case
from bench.families import COMPILED, EAGER, FAMILIES, LIMIT, OURS
from bench.families.kl import METRICS
from bench.gates import Bound, GateLost, hold, reason_not_comparable
from bench.inputs import HeadInputs, head_inputs
from bench.measure import Call, Timing, peak_extra_bytes
from bench.run import Prepared, prepare

DEVICE = torch.device("cpu")
LOGPROB_ERROR = 2e-6  # nats, of fp32 and of bf16 logits: log-probabilities are fp32 either way

pytestmark = [
    pytest.mark.skipif(reason_not_comparable() is not None, reason=str(reason_not_comparable())),
    pytest.mark.timeout(300),
]

Report = Callable[[Timing], None]


def prepared(case: Case, *names: str) -> dict[str, Prepared]:
    """Providers of a case after their first, checked call; one that is wrong or cannot run fails the gate."""
    family = FAMILIES[case.family]
    inputs = family.inputs(case, DEVICE)
    return {name: _ready(prepare(family.provider(name), inputs, family.oracle(inputs))) for name in names}


def _ready(provider: Prepared) -> Prepared:
    assert provider.status == "ok", f"{provider.name}: {provider.status}: {provider.reason}"
    return provider


def calls_of(ready: dict[str, Prepared]) -> dict[str, Call]:
    return {name: provider.call for name, provider in ready.items() if provider.call is not None}


def assert_accurate(provider: Prepared) -> None:
    assert provider.error is not None
    assert provider.error <= LOGPROB_ERROR, f"{provider.name}: {provider.error:.2e} nats off"


def gate(case: Case, bounds: list[Bound], report: Report) -> dict[str, Prepared]:
    ready = prepared(case, *dict.fromkeys(name for bound in bounds for name in (bound.call, bound.against)))
    calls = calls_of(ready)
    timings = [hold({name: calls[name] for name in (bound.call, bound.against)}, [bound]) for bound in bounds]
    report(timings[0][bounds[0].call])
    return ready


def test_topk(report_timing: Report) -> None:
    bounds = [Bound.faster(OURS, EAGER, 6), Bound.faster(OURS, COMPILED, 2.5)]
    assert_accurate(gate(cases.TOPK, bounds, report_timing)[OURS])


@pytest.mark.xfail(
    raises=GateLost,
    reason="held at 1.5 to 1.7 times where the read runs at 31 to 43 GB/s, missed where caches let it run above 65",
)
def test_topk_beside_one_read(report_timing: Report) -> None:
    gate(cases.TOPK, [Bound(OURS, LIMIT, 2.5)], report_timing)


def test_topk_bf16(report_timing: Report) -> None:
    assert_accurate(gate(cases.TOPK_BF16, [Bound.faster(OURS, EAGER, 8)], report_timing)[OURS])


def test_support(report_timing: Report) -> None:
    bounds = [Bound(OURS, LIMIT, 3.5), Bound.faster(OURS, EAGER, 4)]
    assert_accurate(gate(cases.SUPPORT, bounds, report_timing)[OURS])


def test_gather_is_accurate_and_faster_than_torch(report_timing: Report) -> None:
    # The issue bounds its error alone. Whatever else changes, it stays ahead of eager torch.
    assert_accurate(gate(cases.GATHER, [Bound.faster(OURS, EAGER, 1)], report_timing)[OURS])


@pytest.mark.xfail(
    raises=GateLost,
    reason="missed: 2.4 to 3.2 times a read from memory (65,536 rows), 4 to 6 times one from the cache (8,192 rows): "
    "an entry takes two exponentials (w p, and w q for the teacher's mass), a ratio's bin, a share of row sums",
)
def test_loss_time(report_timing: Report) -> None:
    gate(cases.KL, [Bound(METRICS, LIMIT, 2.0)], report_timing)


def test_loss_memory() -> None:
    forward = prepared(cases.KL, METRICS)[METRICS].call
    assert forward is not None
    coefficients = 4 * cases.KL.rows * cases.KL.k
    peak = peak_extra_bytes(forward, DEVICE)
    assert peak is not None, "the peak of resident memory cannot be read here"
    assert peak < 2 * coefficients, (
        f"{peak / 2**20:.1f} MiB: more than c, {coefficients / 2**20:.1f} MiB, and a temporary"
    )


# ------------------------------------------------------------------------------------------------------ the heads


@pytest.fixture(scope="module")
def heads() -> tuple[HeadInputs, dict[str, Call]]:
    """The exact head beside the bare products, with half of its rows masked, and the sampled head; all checked."""
    inputs = head_inputs(cases.EXACT_HEAD, DEVICE)
    half = inputs.with_masked(0.5)
    exact, sampled = FAMILIES["exact_head"], FAMILIES["sampled_head"]
    oracle = exact.oracle(inputs)
    ready = {
        "products": prepare(exact.provider(LIMIT), inputs, oracle),
        "exact": prepare(exact.provider(OURS), inputs, oracle),
        "half masked": prepare(exact.provider(OURS), half, exact.oracle(half)),
        "sampled": prepare(sampled.provider(OURS), inputs, oracle),
    }
    return inputs, calls_of({name: _ready(provider) for name, provider in ready.items()})


def test_head_memory(heads: tuple[HeadInputs, dict[str, Call]]) -> None:
    inputs, calls = heads
    peak = peak_extra_bytes(calls["exact"], DEVICE)
    logits = 4 * inputs.case.rows * inputs.case.model.vocab
    dweight = inputs.weight.nbytes
    assert peak is not None, "the peak of resident memory cannot be read here"
    assert peak < logits / 4 + dweight, f"{peak / 2**20:.0f} MiB, expected below {(logits / 4 + dweight) / 2**20:.0f}"


def test_head_times(heads: tuple[HeadInputs, dict[str, Call]], report_timing: Report) -> None:
    bounds = [
        Bound("exact", "products", 1.15),
        Bound("half masked", "exact", 0.65),
        # Measured: 13.9 to 16. The bound was 15 while the exact head took 2.8 s; it takes 2.1 s now.
        Bound.faster("sampled", "exact", 12),
    ]
    report_timing(hold(heads[1], bounds, rounds=2)["exact"])
