"""The host time of small calls beside that of the torch code which they replace: `make gates`.

The target is 1 for every call, and holds for extraction. For the others the gate is the ratio that does hold on two
cores, with a margin for noise, so that it fails when a call becomes slower. What is missing to the target is Python
between the public function and the launch: checks, an autograd.Function, two or three empty tensors, two launches.

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
# The most that a call may take of torch's host time. Measured ratios of the last four: 3.6, 2.1, 1.6 and 1.06.
AT_MOST = {
    "topk_logprobs": 1.0,
    "sample_support, 16 + 48": 1.0,
    "gather_logprobs": 4.5,
    "gather_logprobs, forward + backward": 2.8,
    "reverse_kl": 2.1,
    "reverse_kl, forward + backward": 1.5,
}


@pytest.fixture(scope="module")
def calls() -> Iterator[host_time.Calls]:
    made = host_time.compared(torch.device("cpu"))
    with stand_in():
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", AT_MOST)
def test_host_time(name: str, calls: host_time.Calls, report_timing: Callable[[Timing], None]) -> None:
    both = {provider: calls[name, provider] for provider in (EAGER, OURS)}
    for call in both.values():
        for _ in range(host_time.WARM_UP):
            call()
    report_timing(hold(both, [Bound(OURS, EAGER, AT_MOST[name])], rounds=ROUNDS)[OURS])
