"""The profile: what a call is made of, appended to a file, and not taken twice."""

from pathlib import Path

import pytest
import torch
import typer
from tiny_cases import CPU, tiny

from bench import lines, profile_kernels
from bench.profile_kernels import Kernel, Profile, in_words, main, profiled


def test_operators_of_a_call_are_counted_and_timed() -> None:
    a = torch.randn(300, 300)
    p = profiled(lambda: (a @ a) @ a, CPU)
    (products,) = (kernel for kernel in p.kernels if kernel.name == "aten::mm")
    assert products.count == 2
    assert products is p.kernels[0], "the longest first"
    assert 0 < products.ms <= p.in_kernels_ms
    assert p.ms > 0
    assert p.host_ms > 0


def test_what_kernels_do_not_add_up_to_are_gaps() -> None:
    p = Profile(2.0, 0.5, (Kernel("_summary_kernel", 3, 1.25), Kernel("fill", 1, 0.25)))
    assert in_words("topk", p) == (
        "topk: 2.000 ms, host 0.500, in kernels 1.500, gaps 0.500; _summary_kernel x3 1.250; fill x1 0.250"
    )


def test_every_headline_case_is_profiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cases = tmp_path / "profile.jsonl", (tiny("topk"), tiny("kl"))
    monkeypatch.setattr(profile_kernels, "cases_of", lambda size: cases)
    with pytest.raises(typer.Exit) as status:
        main("ci", "cpu", path, "", -1.0)
    assert status.value.exit_code == 3
    main("ci", "cpu", path, "topk", 60.0)
    main("ci", "cpu", path, "", 60.0)
    assert [line["case"] for line in lines.read(path)] == [case.name for case in cases]
    assert all(line["kernels"] and line["environment"]["device"] == "cpu" for line in lines.read(path))
    assert f"{cases[1].name}: " in capsys.readouterr().out

    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(profile_kernels, "warm_call", broken)
    path.unlink()
    with pytest.raises(typer.Exit) as status:
        main("ci", "cpu", path, "", 60.0)
    assert status.value.exit_code == 1
    assert f"{cases[0].name}: RuntimeError: no such kernel" in capsys.readouterr().out
