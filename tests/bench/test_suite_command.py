"""python -m bench.suite: resumable, budgeted, honest about what broke; and who is compared on a GPU."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from tiny_cases import CPU, ENVIRONMENT, tiny
from torch import nn
from torch.nn import functional as F

from asyncopd import backends
from bench import ceilings, results, suite
from bench.cases import CASES, Case
from bench.ceilings import Ceilings
from bench.families import COMPILED, EAGER, FAMILIES, LIMIT, OURS, Family, on_backend, providers_on
from bench.families.peers import PEERS
from bench.inputs import logits_inputs
from bench.measure import Timing
from bench.results import make_result
from bench.run import DeviceFailed, Prepared, prepare

TINY = replace(tiny("topk"), rows=5), replace(tiny("kl"), rows=5)


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of milliseconds; torch.compile is no part of what is tested here."""
    monkeypatch.setattr(suite, "cases_of", lambda size: TINY)
    monkeypatch.setattr(ceilings, "measure", lambda device: Ceilings(10.0, 100.0))
    for name in ("topk", "kl"):
        family = FAMILIES[name]
        few = tuple(p for p in family.providers if p.name != COMPILED)
        monkeypatch.setitem(FAMILIES, name, replace(family, providers=few))


def run(path: Path, **options: Any) -> int:
    try:
        suite.main(
            **{"size": "ci", "device": "cpu", "results": path, "budget_s": 60, "case_budget_s": 0, "only": ""} | options
        )
    except typer.Exit as status:
        return status.exit_code
    return 0


def test_a_run_ends_at_its_budget_and_goes_on_after_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    assert run(path, budget_s=-1) == suite.BUDGET_ENDED
    assert "run again to go on" in capsys.readouterr().out
    assert not path.exists()
    assert run(path, only="topk") == 0
    first = results.load(path)
    assert {r.case for r in first} == {TINY[0].name}
    assert all(r.environment.copy_gb_per_s == 10.0 for r in first)
    assert run(path) == 0
    printed = capsys.readouterr().out
    both = results.load(path)
    assert both[: len(first)] == first, "what is there is not measured again"
    assert {r.case for r in both} == {case.name for case in TINY}
    assert "of machine" in printed
    assert run(path, budget_s=-1) == 0, "with nothing left to do there is no budget to exceed"


def test_peers_are_added_later_beside_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been measured keeps its lines, those of the limit too; the limit is timed again, in the same rounds."""
    path, timed = tmp_path / "r.jsonl", []
    measure = suite.measure

    def watched(case: Any, *args: Any, providers: Any, **options: Any) -> Any:
        timed.append([p.name for p in providers])
        return measure(case, *args, providers=providers, **options)

    monkeypatch.setattr(suite, "measure", watched)
    assert run(path, only="topk", peers=False) == 0
    first = results.load(path)
    assert timed == [[LIMIT, OURS]]
    assert run(path, only="topk") == 0
    assert timed[1:] == [[LIMIT, EAGER]]
    both = results.load(path)
    assert both[:2] == first
    assert [r.provider for r in both] == [LIMIT, OURS, EAGER]
    assert both[2].share_of_limit is not None
    assert run(path, only="topk") == 0
    assert len(timed) == 2


def test_wrong_arguments_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"size": "big"}, "got 'big', expected one of ci, full, gpu"),
        ({"device": "tpu"}, "got 'tpu', expected cuda or cpu"),
        ({"only": "nothing"}, "no case of size 'ci' has 'nothing' in its name"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            run(tmp_path / "r.jsonl", **options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="torch finds no CUDA device"):
        run(tmp_path / "r.jsonl", device="cuda")


def with_ours(family: Family, call: Any) -> Family:
    ours = replace(family.provider(OURS), prepare=lambda inputs: call)
    return replace(family, providers=tuple(ours if p.name == OURS else p for p in family.providers))


def test_asyncopd_that_broke_is_the_exit_status_also_of_a_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(FAMILIES, "topk", with_ours(FAMILIES["topk"], broken))
    for _ in range(2):
        assert run(tmp_path / "r.jsonl") == 1
        assert f"{TINY[0].name}: asyncopd: unavailable: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_case_that_takes_the_device_with_it_ends_the_process_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an illegal address on a GPU does: whatever is asked of the device raises from then on."""
    path, measure = tmp_path / "r.jsonl", suite.measure

    def breaking(case: Any, *args: Any, **options: Any) -> Any:
        if case.family == "topk":
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return measure(case, *args, **options)

    def ended(status: int) -> None:
        raise typer.Exit(status)

    monkeypatch.setattr(suite, "measure", breaking)
    monkeypatch.setattr("os._exit", ended)
    assert run(path) == suite.DEVICE_FAILED
    stored = results.load(path)
    assert {r.case for r in stored} == {TINY[0].name}
    assert {r.status for r in stored} == {"unavailable"}
    assert stored[0].reason == "the case broke: RuntimeError: CUDA error: an illegal memory access"
    assert run(path) == 1, "the other case is measured; the first, lost one is the failure"
    assert {r.case for r in results.load(path) if r.status == "ok"} == {TINY[1].name}
    # Memory that the inputs do not fit is no broken device.
    monkeypatch.setattr(suite, "measure", lambda *a, **k: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    lines, trusted = suite.measured(TINY[0], providers_on("cpu", "topk"), CPU, ENVIRONMENT, 0.0)
    assert trusted
    assert lines[0].reason == "the case broke: OutOfMemoryError: full"


def test_the_provider_that_broke_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    ours = replace(FAMILIES["topk"].provider(OURS), prepare=lambda inputs: broken)
    assert prepare(ours, None, None).status == "unavailable"
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert prepare(ours, None, None).status == "unavailable"
    monkeypatch.setattr("torch.cuda.synchronize", broken)
    with pytest.raises(DeviceFailed, match="asyncopd: RuntimeError: CUDA error: an illegal memory access"):
        prepare(ours, None, None)


def test_a_backend_may_lack_an_op_and_may_not_break() -> None:
    def line(provider: str, status: Any, reason: str = "") -> Any:
        return make_result(tiny("topk"), provider, ENVIRONMENT, status=status, reason=reason)

    lacks = "BackendUnavailable: ASYNCOPD_BACKEND=cuda cannot run: it has no 'x' in this version"
    assert not suite.is_failure(line("asyncopd on cuda", "unavailable", lacks))
    assert suite.is_failure(line("asyncopd on cuda", "unavailable", "CompilationError: at 3:4"))
    assert suite.is_failure(line("asyncopd on triton", "wrong", "ids"))
    assert suite.is_failure(line(OURS, "unavailable", lacks))
    assert not suite.is_failure(line(OURS, "ok"))
    assert not suite.is_failure(line(EAGER, "wrong", "ids"))


# ------------------------------------------------------------------------------------------ figures and machines


def test_a_gpu_is_compared_by_medians_and_a_cpu_by_bests() -> None:
    slow, fast = Timing((4e-3, 1e-3, 5e-3)), Timing((2e-3, 1e-3, 3e-3))
    case = tiny("topk")
    cpu = make_result(case, OURS, ENVIRONMENT, timing=slow, limit=fast)
    gpu = make_result(case, OURS, replace(ENVIRONMENT, device="cuda", copy_gb_per_s=0.1), timing=slow, limit=fast)
    assert (cpu.time_s, cpu.share_of_limit) == (1e-3, 1.0)
    assert (gpu.time_s, gpu.share_of_limit) == (4e-3, 0.5)
    assert cpu.gb_per_s == pytest.approx(case.work.bytes / 1e-3 / 1e9)
    assert gpu.gb_per_s == pytest.approx(case.work.bytes / 4e-3 / 1e9)
    assert gpu.share_of_machine == pytest.approx(case.work.bytes / 4e-3 / 1e8)


def test_ceilings_count_a_copys_reads_and_writes_and_a_products_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(ceilings.SIZES, "cpu", ceilings.Sizes(1000, 10, torch.float32))
    monkeypatch.setattr(ceilings, "interleave", lambda calls, **options: {n: Timing((1e-6,)) for n in calls})
    assert ceilings.measure(CPU) == Ceilings(pytest.approx(2.0), pytest.approx(2.0))


def test_gpu_inputs_have_the_law_of_the_others_and_are_the_same_every_time() -> None:
    case = replace(tiny("topk"), size="gpu", rows=64)
    a, b = logits_inputs(case, CPU), logits_inputs(case, CPU)
    assert torch.equal(a.logits, b.logits)
    assert a.logits.softmax(1).amax(1).median() > 0.1


@pytest.mark.parametrize("case", [c for c in CASES if c.size == "gpu"], ids=lambda case: case.name)
def test_every_gpu_case_runs_where_it_is_made_small(case: Case) -> None:
    """The same code on a CPU: inputs that are made on the device, the oracle, the limit, and asyncopd's line."""
    small = replace(case, model=TINY[0].model, rows=12, head=3, samples=5)
    family = FAMILIES[case.family]
    inputs = family.inputs(small, CPU)
    oracle = family.oracle(inputs)
    for name in (LIMIT, OURS):
        done = prepare(family.provider(name), inputs, oracle)
        assert done.status == "ok", done.reason


# --------------------------------------------------------------------------------------------- who is compared


def test_on_a_gpu_there_are_the_backends_and_the_peers() -> None:
    assert providers_on("cpu", "topk") == FAMILIES["topk"].providers
    names = [p.name for p in providers_on("cuda", "topk")]
    assert names[-2:] == ["asyncopd on cuda", "flashinfer top_k + torch"]
    forwards = [p.name for p in providers_on("cuda", "kl") if "forward" in p.name and " on " in p.name]
    assert len(forwards) == 2  # without and with metrics
    few = [p.name for p in providers_on("cuda", "exact_head", peers=False)]
    assert few == [p.name for p in providers_on("cpu", "exact_head", peers=False)] == [LIMIT, COMPILED, OURS]
    assert len(providers_on("cuda", "kl", peers=False)) == 4  # the limit and three of asyncopd (no torch.compile here)
    assert {c.family for c in CASES if c.size == "gpu"} >= set(PEERS)


def test_a_forced_backend_is_forced_for_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = logits_inputs(TINY[0], CPU)
    oracle = FAMILIES["topk"].oracle(inputs)
    chosen: list[str] = []
    choose = backends.choose

    def watched(*args: Any) -> str:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(backends, "choose", watched)
    monkeypatch.setenv("ASYNCOPD_BACKEND", "cpu")
    ours = FAMILIES["topk"].provider(OURS)
    assert prepare(on_backend(ours, "reference"), inputs, oracle).status == "ok"
    assert set(chosen) == {"reference"}
    assert prepare(ours, inputs, oracle).status == "ok"
    assert chosen[-1] == "cpu"
    missing = prepare(on_backend(ours, "cuda"), inputs, oracle)
    assert missing.name == "asyncopd on cuda"
    assert missing.reason.startswith("BackendUnavailable: ASYNCOPD_BACKEND=cuda cannot run: ")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A package in place of one that runs on GPUs alone, with the interface that its documentation gives."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        if i == len(parts) - 1:
            vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    def forward(self, lin_weight: Any, _input: Any, target: Any, bias: Any = None) -> Any:
        return F.cross_entropy(_input @ lin_weight.t(), target)


def cross_entropy(hidden: Any, weight: Any, targets: Any) -> Any:
    return F.cross_entropy(hidden @ weight.t(), targets)


def top_k(input: Any, k: int, sorted: bool = False) -> Any:
    values, indices = input.topk(k, dim=1)
    return (values, indices) if sorted else (values.flip(1), indices.flip(1))


def peer(family: str, name: str, masked: float = 0.0) -> Prepared:
    inputs = FAMILIES[family].inputs(tiny(family, masked=masked), CPU)
    provider = next(p for p in PEERS[family] if p.name == name)
    return prepare(provider, inputs, FAMILIES[family].oracle(inputs))


@pytest.mark.parametrize("masked", [0.0, 1 / 3])
def test_peers_are_called_as_they_document_and_are_checked(monkeypatch: pytest.MonkeyPatch, masked: float) -> None:
    stand_in(
        monkeypatch,
        "liger_kernel.transformers",
        LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss,
    )
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cross_entropy)
    stand_in(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=cross_entropy)
    stand_in(monkeypatch, "flashinfer", top_k=top_k)
    for name in ("Liger cross entropy", "cut-cross-entropy", "quack cross entropy"):
        done = peer("exact_head", name, masked)
        assert done.status == "ok", done.reason
        assert done.error is not None
        assert done.error < 2e-5
    assert peer("topk", "flashinfer top_k + torch").status == "ok"
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=lambda h, w, t: 1.1 * cross_entropy(h, w, t))
    assert peer("exact_head", "cut-cross-entropy").status == "wrong"


def test_a_peer_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    done = peer("exact_head", "cut-cross-entropy")
    assert done.status == "unavailable"
    assert "cut_cross_entropy" in done.reason
    assert {EAGER, LIMIT} <= {p.name for p in providers_on("cuda", "exact_head")}
