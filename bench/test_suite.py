"""Every case that a CPU can afford, every provider: `make bench`.

A case is measured once, all its providers in the same rounds, when the first of its tests runs. A provider that cannot
run or is wrong is said so in the results; for asyncopd either is a failure.
"""

import shlex
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from bench import results
from bench.cases import Case, cases_of
from bench.conftest import RESULTS_FILE
from bench.families import FAMILIES, OURS
from bench.measure import Timing
from bench.run import Measured, measure

DEVICE = torch.device("cpu")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Measured]:
    command = shlex.join(["python", "-m", "pytest", *map(str, request.config.invocation_params.args)])
    environment = results.environment(DEVICE, command)
    path = request.config.getoption("--results") or results.default_path(environment)
    request.config.stash[RESULTS_FILE] = path

    @cache
    def of(case: Case) -> Measured:
        out = measure(case, environment, device=DEVICE)
        results.store(path, out.results)
        return out

    return of


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, provider.name, id=f"{case.name}: {provider.name}")
        for case in cases_of("full")
        for provider in FAMILIES[case.family].providers
    ],
)
def test_case(
    case: Case,
    provider: str,
    measured: Callable[[Case], Measured],
    benchmark: Any,
    report_timing: Callable[[Timing], None],
) -> None:
    out = measured(case)
    result = next(r for r in out.results if r.provider == provider)
    if result.status != "ok":
        message = f"{provider}: {result.status}: {result.reason}"
        assert not provider.startswith(OURS), message
        pytest.skip(message)
    benchmark.group = case.name
    benchmark.extra_info.update(share_of_limit=result.share_of_limit, peak_bytes=result.peak_bytes, error=result.error)
    report_timing(out.timings[provider])
