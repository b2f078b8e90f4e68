"""The benchmark of host times: its lines, its table, and that the gates compare with the suite's own torch code."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from bench import host_time, test_host_gates
from bench.families import EAGER, FAMILIES, OURS
from bench.host_time import Calls

needs_compiler = pytest.mark.skipif(
    knobs.runtime.interpret or torch.cuda.is_available(), reason="compiled kernels, on a machine without a GPU"
)


def test_gated_calls_are_measured_and_torch_is_that_of_the_suite() -> None:
    calls = host_time.compared(torch.device("cpu"))
    assert {name for name, _ in calls} >= set(test_host_gates.AT_MOST)
    assert {provider for _, provider in calls} == {EAGER, OURS}
    assert [name for name, _ in list(calls)[::2]] == [name for name, _ in list(calls)[1::2]], "side by side"
    for family, name in (("topk", "topk_logprobs"), ("gather", "gather_logprobs, forward + backward")):
        for provider in (EAGER, OURS):
            prepared = (
                FAMILIES[family]
                .provider(provider)
                .prepare(
                    FAMILIES[family].inputs(host_time.case(family), torch.device("cpu"))  # type: ignore[arg-type]
                )
            )
            torch.testing.assert_close(calls[name, provider](), prepared())


@needs_compiler
def test_lines_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    everything = host_time.compared

    def only_the_loss(device: torch.device) -> Calls:
        return {key: call for key, call in everything(device).items() if key[0] == "reverse_kl"}

    monkeypatch.setattr(host_time, "compared", only_the_loss)
    path = tmp_path / "host.jsonl"
    threads = torch.get_num_threads()
    try:
        host_time.main(device="cpu", results=path, rounds=3)
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_call = {(line["call"], line["provider"]): line for line in lines}
    assert {("reverse_kl", EAGER), ("reverse_kl", OURS), ("launch by kernel[grid]", "piece")} <= set(by_call)
    assert by_call["reverse_kl", EAGER]["launches"] == 0
    assert by_call["reverse_kl", OURS]["launches"] >= 1
    for line in lines:
        assert 0 < line["us"] <= line["median_us"]
        assert line["environment"]["device"] == "cpu"
        assert line["triton"]
        assert line["host"]
    assert "launch by kernel[grid]" in capsys.readouterr().out


def test_rounds_go_round_all_calls_after_a_warm_up() -> None:
    order: list[str] = []
    calls: Calls = {("a", OURS): lambda: order.append("a"), ("b", OURS): lambda: order.append("b")}
    times = host_time.measure(calls, 3, torch.device("cpu"))
    warm, burst = host_time.WARM_UP, host_time.BURST
    assert "".join(order) == "a" * warm + "b" * warm + ("a" * burst + "b" * burst) * 3
    assert [len(values) for values in times.values()] == [3, 3]
