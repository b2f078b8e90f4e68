"""No CPU case of the suite is slower than eager torch, small ones included: `make gates` runs this and test_gates.py.

The time of a small call is that of its overhead: Python, the dispatcher, threads that wake up, passes over a few
kilobytes. None of that shows in the ratios of test_gates.py, whose calls take milliseconds.
"""

import pytest

from bench import cases
from bench.cases import Case, cases_of
from bench.families import EAGER, FAMILIES, OURS
from bench.gates import Bound, hold, reason_not_comparable
from bench.inputs import head_inputs
from bench.run import prepare
from bench.test_gates import DEVICE, Report, calls_of, prepared

# test_gates.py holds these to more than eager torch.
GATED_ELSEWHERE = (cases.TOPK, cases.TOPK_BF16, cases.SUPPORT, cases.GATHER)
# Seconds a call: measured in few rounds, and on the same inputs.
LARGE_HEADS = (cases.EXACT_HEAD, cases.SAMPLED_HEAD)
SHORT = tuple(case for case in cases_of("ci") if case not in GATED_ELSEWHERE + LARGE_HEADS)

FASTER = [Bound.faster(OURS, EAGER, 1.0)]
# An attempt at a short call is over in milliseconds, a disturbance of the machine is not.
ATTEMPTS = 40

pytestmark = [
    pytest.mark.skipif(reason_not_comparable() is not None, reason=str(reason_not_comparable())),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("case", SHORT, ids=lambda case: f"{case.family}-{case.rows}-{case.model.name}")
def test_short_calls(case: Case, report_timing: Report) -> None:
    calls = calls_of(prepared(case, OURS, EAGER))
    report_timing(hold(calls, FASTER, attempts=ATTEMPTS)[OURS])


def test_heads_of_a_language_model(report_timing: Report) -> None:
    exact, sampled = (FAMILIES[case.family] for case in LARGE_HEADS)
    assert cases.EXACT_HEAD.rows == cases.SAMPLED_HEAD.rows
    inputs = head_inputs(cases.EXACT_HEAD, DEVICE)
    oracle = exact.oracle(inputs)
    for family in (sampled, exact):
        ready = {name: prepare(family.provider(name), inputs, oracle) for name in (OURS, EAGER)}
        for provider in ready.values():
            assert provider.status == "ok", f"{provider.name}: {provider.status}: {provider.reason}"
        timings = hold(calls_of(ready), FASTER, rounds=1)
        del ready
    report_timing(timings[OURS])
