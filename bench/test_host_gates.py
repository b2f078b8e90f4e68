"""The host time of small calls is at most that of the torch code which they replace: `make gates`.

Kernels compile for sm_90, and a stand-in driver launches them into nothing; torch computes on the same CPU tensors
(bench/host_time.py).
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from bench.families import EAGER, OURS
from bench.gates import Bound, hold
from bench.measure import Timing

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU: python -m bench.host_time --device cuda", allow_module_level=True)

from bench import host_time
from bench.launch_check.driver import stand_in

ROUNDS = 400
GATED = (
    "topk_logprobs",
    "sample_support, 16 + 48",
    "gather_logprobs",
    "gather_logprobs, forward + backward",
    "reverse_kl",
    "reverse_kl, forward + backward",
)


@pytest.fixture(scope="module")
def calls() -> Iterator[host_time.Calls]:
    made = host_time.compared(torch.device("cpu"))
    with stand_in():
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", GATED)
def test_host_time_is_at_most_that_of_torch(
    name: str, calls: host_time.Calls, report_timing: Callable[[Timing], None]
) -> None:
    both = {provider: calls[name, provider] for provider in (EAGER, OURS)}
    for call in both.values():
        for _ in range(host_time.WARM_UP):
            call()
    report_timing(hold(both, [Bound(OURS, EAGER, 1.0)], rounds=ROUNDS)[OURS])
