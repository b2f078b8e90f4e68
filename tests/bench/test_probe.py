"""The probe of the designs: its parts run without a GPU, its candidates are right, and its figures stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from bench import clocks, lines
from bench.measure import Timing
from bench.probe import __main__ as command
from bench.probe.setting import Setting

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=115)


@pytest.mark.slow
def test_every_part_runs_without_a_gpu() -> None:
    done = python("-m", "bench.probe", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in command.PARTS:
        assert f"## {part}: " in done.stdout
    assert "6 calls ran: limit: amax, three kernels," in done.stdout
    assert " ms (best" not in done.stdout, "a dry run has no times"


@pytest.mark.slow
def test_candidates_are_right_in_the_interpreter() -> None:
    script = str(Path(__file__).with_name("probe_candidates.py"))
    done = python(script, TRITON_INTERPRET="1", ASYNCOPD_BACKEND="triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("both are right\n")


def test_figures_are_appended_at_once_with_the_clock_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "probe.jsonl"
    setting = Setting.of(CPU, path=path)
    setting.part = "rows"
    setting.say("amax", Timing((2e-3, 1e-3, 4e-3)), "a note", 1755.0)
    assert capsys.readouterr().out == "  amax: 2 ms (best 1), a note, SM clock 1755 MHz (median)\n"
    (line,) = lines.read(path)
    assert (line["part"], line["call"], line["median_ms"], line["clock_mhz"]) == ("rows", "amax", 2.0, 1755.0)
    assert line["environment"]["torch"] == torch.__version__
    with path.open("a") as file:
        file.write('{"part": "cut o')
    assert lines.read(path) == [line]


def test_a_part_that_breaks_is_said_and_one_that_is_done_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ran = tmp_path / "probe.jsonl", []

    def part(name: str, setting: Setting) -> None:
        ran.append(name)
        if name == "sparse":
            raise RuntimeError("no such kernel")

    monkeypatch.setattr("asyncopd.backends.unavailable_reason", lambda name: None)
    monkeypatch.setattr(Setting, "of", lambda device, **options: Setting(CPU, **options))
    for name in command.PARTS:
        module = __import__(f"bench.probe.{name}", fromlist=["run"])
        monkeypatch.setattr(module, "run", lambda setting, name=name: part(name, setting))
    with pytest.raises(typer.Exit) as status:
        command.main(None, path, 60.0, False)
    assert status.value.exit_code == 1
    assert ran == list(command.PARTS)
    assert "sparse broke: RuntimeError: no such kernel" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        command.main(None, path, 60.0, False)
    assert ran[len(command.PARTS) :] == ["sparse"]
    with pytest.raises(typer.Exit) as status:
        command.main(["sparse"], path, -1.0, False)
    assert status.value.exit_code == 3
    with pytest.raises(typer.BadParameter, match="got 'row', expected one of host, rows, pack"):
        command.main(["row"], path, 60.0, False)


def test_without_a_gpu_there_is_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncopd.backends.unavailable_reason", lambda name: "torch finds no CUDA device")
    with pytest.raises(typer.BadParameter, match="cannot run here: torch finds no CUDA device"):
        command.main(None, None, 60.0, False)


# -------------------------------------------------------------------------------------------------------- clocks


CLOCKS = """timestamp, clocks.current.sm [MHz], power.draw [W]
2026/11/27 20:27:22.100, 1980 MHz, 120.10 W
2026/11/27 20:27:22.300, 1755 MHz, 690.00 W
2026/11/27 20:27:22.500, 1605 MHz, 699.00 W
2026/11/27 20:27:22.700, 16"""


def test_the_median_clock_of_a_span_comes_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clocks.csv"
    path.write_text(CLOCKS)
    monkeypatch.setenv("CLOCKS", str(path))
    begin = clocks.now().replace(2026, 11, 27, 20, 27, 22, 200_000)
    assert clocks.median_mhz(begin, begin.replace(microsecond=600_000)) == (1755 + 1605) / 2
    assert clocks.median_mhz(begin.replace(microsecond=0), begin.replace(microsecond=600_000)) == 1755
    assert clocks.median_mhz(begin.replace(year=2027)) is None
    assert clocks.beside(1755.0) == ", SM clock 1755 MHz (median)"
    monkeypatch.setenv("CLOCKS", str(tmp_path / "none.csv"))
    assert clocks.median_mhz(begin) is None
    monkeypatch.delenv("CLOCKS")
    assert clocks.median_mhz(begin) is None
    assert clocks.beside(None) == ""
