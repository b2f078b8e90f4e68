"""The smoke check: it calls every op, sees a wrong value, and ends with the name of an op that breaks."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from asyncopd import backends
from asyncopd.backends import reference
from bench import smoke
from bench.smoke import Share

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "VOCABULARIES", (300,))


def status(**options: Any) -> int:
    with pytest.raises(typer.Exit) as done:
        smoke.main(**{"device": "cpu", "names": "cpu", "jobs": 1, "share": "0/1", **options})
    return done.value.exit_code


def test_every_op_of_the_backends_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op of the reference, which has them all, is one that some call of the check runs."""
    called: set[str] = set()
    select = backends.choose

    def watched(op: str, *args: Any) -> str:
        called.add(op)
        return select(op, *args)

    monkeypatch.setattr(backends, "choose", watched)
    assert smoke.check("reference", CPU, Share()) == (len(smoke.OPS) * 2, [])
    missing = set(reference.__all__) - called
    assert not missing, f"no call of bench/smoke.py runs {missing}"


def test_the_kernels_of_this_machine_are_right_and_shares_have_all_the_calls(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status() == 0
    assert f"cpu: {2 * len(smoke.OPS)} calls, right, " in capsys.readouterr().out
    assert sum(smoke.check("cpu", CPU, Share(i, 3))[0] for i in range(3)) == 2 * len(smoke.OPS)


@pytest.mark.parametrize(
    ("op", "fault", "message"),
    [
        ("topk_logprobs", lambda ids, scores, lse: (ids.flip(1), scores, lse), r"ids: 0\.0 % the same, expected 100 %"),
        ("topk_logprobs", lambda ids, scores, lse: (ids, scores, lse + 1e-2), "logsumexp: off by"),
        ("kl_loss", lambda loss, coef, metrics: (loss, coef * torch.nan, metrics), "gradient: not finite where"),
        ("linear_kl", lambda loss, m, dh, dw, db: (loss, m, dh.roll(1, 0), dw, db), "dhidden: off by"),
        ("sample_support", lambda ids, *rest: (ids.roll(1, 0), *rest), "drawn ids: "),
    ],
)
def test_a_wrong_value_is_said(
    monkeypatch: pytest.MonkeyPatch, op: str, fault: Callable[..., Any], message: str
) -> None:
    right = getattr(backends.module("cpu"), op)
    monkeypatch.setattr(backends.module("cpu"), op, lambda *args: fault(*right(*args)))
    monkeypatch.setattr(backends, "choose", lambda name, *_: "cpu" if name == op and forced() else "reference")
    lines = smoke.check("cpu", CPU, Share())[1]
    assert lines
    assert any(re.search(message, line) for line in lines), lines
    assert all(" on cpu, V=300, " in line for line in lines)
    assert status() == 1


def forced() -> bool:
    return os.environ.get("ASYNCOPD_BACKEND") == "cpu"


def test_an_op_that_breaks_ends_the_process_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(BaseException):
        pass

    def ended(status: int) -> None:
        raise Ended(status)

    def broken(*args: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(backends.module("cpu"), "kl_loss", broken)
    monkeypatch.setattr("os._exit", ended)
    with pytest.raises(Ended, match=str(smoke.BROKE)):
        smoke.check("cpu", CPU, Share())
    assert "reverse_kl on cpu, V=300, bfloat16: BROKE: RuntimeError: no such kernel" in capsys.readouterr().out


def test_the_worst_share_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: dict[str, int] = {"0/3": 0, "1/3": 1, "2/3": 0}
    asked = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, statuses[command[-1]])

    monkeypatch.setattr(subprocess, "run", run)
    assert status(jobs=3) == 1
    assert sorted(asked) == [["--device", "cpu", "--backends", "cpu", "--share", f"{i}/3"] for i in range(3)]
    statuses["2/3"] = -11  # a signal
    assert status(jobs=3) == smoke.BROKE


def test_a_backend_that_cannot_run_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: "it was not built")
    assert status() == 1
    assert capsys.readouterr().out == "cpu: cannot run here: it was not built\n"
