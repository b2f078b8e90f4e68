"""From a measured case to JSON lines, tables and plots."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_cases import CPU, ENVIRONMENT, tiny

from asyncopd.config import ConfigError
from bench import plots, results
from bench.cases import cases_of
from bench.families import COMPILED, EAGER, FAMILIES, LIMIT, OURS, Provider, Unavailable
from bench.report import NOT_ON_A_GPU, main, markdown, newest_files, print_report
from bench.results import Result
from bench.run import measure

ROOT = Path(__file__).parents[2]


def impossible(inputs: object) -> None:
    raise Unavailable("no such thing here")


def measured() -> tuple[Result, ...]:
    """A tiny case with one provider that is wrong and one that cannot run."""
    family = FAMILIES["topk"]
    limit, eager, ours = (family.provider(name) for name in (LIMIT, EAGER, OURS))
    crash = Provider("crash", eager.prepare, lambda oracle, output: 1 / 0)
    shifted = replace(eager, name="shifted", prepare=lambda i: shift(eager, i))
    missing = Provider("missing", impossible, eager.check)
    providers = (limit, eager, crash, shifted, missing, ours)
    return measure(tiny("topk"), ENVIRONMENT, device=CPU, providers=providers, rounds=2).results


def shift(provider: Provider, inputs: object) -> object:
    call = provider.prepare(inputs)
    return lambda: call()._replace(logprobs=call().logprobs.roll(1, 1))


@pytest.fixture(scope="module")
def run() -> tuple[Result, ...]:
    return measured()


def test_wrong_and_missing_providers_are_reported_and_never_timed(run: tuple[Result, ...]) -> None:
    by_name = {r.provider: r for r in run}
    assert [r.status for r in run] == ["ok", "ok", "unavailable", "wrong", "unavailable", "ok"]
    assert by_name["shifted"].reason.startswith("log-probabilities off by")
    assert by_name["crash"].reason == "ZeroDivisionError: division by zero"
    assert by_name["missing"].reason == "Unavailable: no such thing here"
    for name in ("shifted", "missing", "crash"):
        assert by_name[name].min_s is by_name[name].peak_bytes is by_name[name].share_of_limit is None
        assert by_name[name].rounds == 0


def test_rates_and_shares(run: tuple[Result, ...]) -> None:
    by_name = {r.provider: r for r in run}
    ours, limit = by_name[OURS], by_name[LIMIT]
    assert ours.min_s is not None
    assert limit.min_s is not None
    assert ours.rounds == 2
    assert ours.gb_per_s == pytest.approx(21 * 403 * 4 / ours.min_s / 1e9)
    assert ours.gflop_per_s is None
    assert ours.share_of_limit == pytest.approx(limit.min_s / ours.min_s)
    assert limit.share_of_limit == 1.0
    assert ours.error is not None
    assert ours.error < 2e-6


def test_json_lines_round_trip_and_are_replaced_not_repeated(tmp_path: Path, run: tuple[Result, ...]) -> None:
    path = tmp_path / "new" / "m-2026-01-31.jsonl"
    results.store(path, run)
    assert results.load(path) == list(run)
    newer = replace(run[0], min_s=0.5)
    results.store(path, [newer])
    assert results.load(path) == [newer, *run[1:]]
    assert all(json.loads(line)["environment"]["commit"] == "abc" for line in path.read_text().splitlines())
    path.write_text(path.read_text() + '{"case": "x"}\n')
    with pytest.raises(ValueError, match=f"line {len(run) + 1}: not a result of this version"):
        results.load(path)


def test_newest_file_of_every_machine(tmp_path: Path) -> None:
    for name in ("cpu-2026-01-31", "cpu-2026-02-01", "gpu-2025-12-31"):
        (tmp_path / f"{name}.jsonl").touch()
    assert [path.stem for path in newest_files(tmp_path)] == ["cpu-2026-02-01", "gpu-2025-12-31"]


def test_environment_names_machine_versions_and_no_path() -> None:
    e = results.environment(CPU, "python -m pytest bench")
    assert e.machine
    assert "cores" in e.machine
    assert results.default_path(e).parent == ROOT / "bench" / "results"
    assert results.default_path(e).stem.endswith(e.date)
    assert str(ROOT) not in json.dumps([e.machine, e.command, e.commit])


def test_terminal_tables(run: tuple[Result, ...]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(run, console)
    text = console.export_text()
    assert "missing: unavailable: Unavailable: no such thing here" in text
    assert "shifted: wrong: log-probabilities off by" in text
    assert "tiny N=21 V=403 K=8 float32" in text
    assert "a machine, 1 threads, AVX2" in text
    assert "\n  a command" in text


def by_hand(run: tuple[Result, ...], **best: float) -> list[Result]:
    """The run with other times."""
    return [
        replace(r, min_s=best[r.provider], share_of_limit=1e-3 / best[r.provider]) for r in run if r.provider in best
    ]


def test_markdown_has_one_row_a_headline_case(run: tuple[Result, ...]) -> None:
    timed = by_hand(run, **{LIMIT: 0.001, EAGER: 0.03, OURS: 0.002})
    timed = [replace(r, peak_bytes=3 * 2**20) for r in timed]
    compiled = replace(timed[1], provider=COMPILED, min_s=0.01)
    text = markdown([[*timed, compiled]])
    title = "LSE + top-K log-probabilities from logits: tiny N=21 V=403 K=8 float32"
    assert f"| {title} | 2 ms | 50 % | 15x | 5x | 3.0 MiB (3.0 MiB) |" in text
    assert "a machine, 1 threads, AVX2; Python 3, torch 2, asyncopd 0 at abc; 2026-01-31\n" in text
    again = replace(timed[-1], environment=replace(ENVIRONMENT, command="another"))
    assert markdown([[*timed[:-1], again]]).count("a machine") == 1, "one line, however many commands it took"
    assert text.endswith(NOT_ON_A_GPU)
    assert "not measured: it broke" in markdown([[replace(timed[-1], status="wrong", reason="it broke")]])
    nothing = markdown([[replace(r, headline=False) for r in timed]])
    assert nothing == markdown([]) == f"No results yet: `make bench` makes them.\n\n{NOT_ON_A_GPU}"


def test_gpu_rows_are_medians_beside_what_the_device_does_at_most(run: tuple[Result, ...]) -> None:
    """asyncopd's own choice has the row, below the GPU's name; the CPU's row stays; the line on GPUs goes."""
    gpu = replace(
        ENVIRONMENT, machine="a GPU", device="cuda", copy_gb_per_s=100.0, gemm_gflop_per_s=50_000.0, command="gpu.sh"
    )
    by_name = {r.provider: r for r in run if r.provider in (LIMIT, EAGER, OURS)}
    times = {LIMIT: 0.001, EAGER: 0.03, OURS: 0.002}
    lines = [
        replace(r, environment=gpu, min_s=1e-6, median_s=times[name], gb_per_s=70.0, peak_bytes=2**20)
        for name, r in by_name.items()
    ]
    cuda = replace(lines[-1], provider=f"{OURS} on cuda", median_s=0.001, gb_per_s=140.0)
    cpu = by_hand(run, **{LIMIT: 0.001, EAGER: 0.03, OURS: 0.004})
    text = markdown([cpu, [*lines, cuda]])
    title = "LSE + top-K log-probabilities from logits: tiny N=21 V=403 K=8 float32"
    row = f"| {title} | 2 ms | 70 % | 15x |  | 1.0 MiB (1.0 MiB) |"
    assert f"| **a GPU** | | | | | |\n{row}\n" in text
    assert f"| {title} | 4 ms | 25 % | 7.5x |" in text
    assert text.count("|---|") == 1
    assert "a GPU, copy 0.10 TB/s, matrix product 50 TFLOP/s; Python 3" in text
    assert NOT_ON_A_GPU not in text
    flops = replace(lines[0], bound="flops", gflop_per_s=25_000.0)
    assert flops.share_of_machine == 0.5
    assert run[0].share_of_machine is None


def test_report_goes_between_the_markers_and_plots_into_a_folder(tmp_path: Path, run: tuple[Result, ...]) -> None:
    page, path = tmp_path / "README.md", tmp_path / "m-2026-01-31.jsonl"
    page.write_text("a\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nz\n")
    results.store(path, run)
    main([str(path), "--into", str(page), "--plots", str(tmp_path)])
    assert page.read_text().startswith("a\n<!-- bench: begin -->\n| asyncopd |")
    assert "old" not in page.read_text()
    assert page.read_text().endswith("<!-- bench: end -->\nz\n")
    first = (tmp_path / "m-2026-01-31.svg").read_bytes()
    assert b"<svg" in first
    plots.save_plot(run, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="bench: begin"):
        main([str(path), "--into", str(page)])


def test_results_of_another_machine_are_filed_under_its_name_and_become_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[Result, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """As after bench/gpu.sh: make bench-report ARGS="--keep build/gpu/results.jsonl"."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("bench.report.newest_files", lambda: newest_files(tmp_path / "results"))
    gpu = replace(ENVIRONMENT, machine="NVIDIA H100 80GB HBM3", device="cuda")
    path, page = tmp_path / "results.jsonl", tmp_path / "README.md"
    results.store(path, [replace(r, environment=gpu, clock_mhz=1755.0) for r in run])
    results.store(tmp_path / "results" / "cpu-2026-01-31.jsonl", run)
    page.write_text(f"a\n<!-- bench: begin -->\n{NOT_ON_A_GPU}\n<!-- bench: end -->\nz\n")
    main(["--keep", str(path), "--into", str(page)])
    assert capsys.readouterr().out == "kept as nvidia-h100-80gb-hbm3-2026-01-31.jsonl\n"
    kept = results.load(tmp_path / "results" / "nvidia-h100-80gb-hbm3-2026-01-31.jsonl")
    assert kept == results.load(path)
    text = page.read_text()
    assert NOT_ON_A_GPU not in text
    assert text.count("| **NVIDIA H100 80GB HBM3** |") == 1
    assert text.count("| LSE + top-K log-probabilities from logits: tiny") == 2
    path.write_text("")
    with pytest.raises(SystemExit, match="no results in it"):
        main(["--keep", str(path)])


def test_a_line_without_a_clock_is_of_this_version_too(tmp_path: Path, run: tuple[Result, ...]) -> None:
    """CPUs' results from before clocks were written down."""
    path = tmp_path / "r.jsonl"
    results.store(path, run[:1])
    line = json.loads(path.read_text())
    del line["clock_mhz"]
    path.write_text(json.dumps(line))
    assert results.load(path) == [replace(run[0], clock_mhz=None)]


def test_readme_has_room_for_the_table() -> None:
    """Before it is filled in: header, a headline case of a CPU and of a GPU each, a GPU's name, a blank, machines."""
    page = (ROOT / "README.md").read_text()
    now = page.split("<!-- bench: begin -->\n")[1].split("<!-- bench: end -->")[0]
    rows = sum(case.headline for case in (*cases_of("full"), *cases_of("gpu")))
    assert len(page.splitlines()) - len(now.splitlines()) + 2 + rows + 4 < 130


def test_readme_says_that_no_gpu_has_been_measured_until_one_has() -> None:
    """The page is generated: what it says of GPUs is what the results are of."""
    page = (ROOT / "README.md").read_text()
    measured = any(r.environment.device == "cuda" for path in newest_files() for r in results.load(path))
    assert (NOT_ON_A_GPU in page) == (not measured)


@pytest.mark.slow
def test_the_suite_writes_results_that_are_the_statistics_of_pytest_benchmark(tmp_path: Path) -> None:
    path, statistics = tmp_path / "out.jsonl", tmp_path / "statistics.json"
    arguments = ["-q", "-k", "kl and 8192", "-p", "no:cacheprovider", "--benchmark-quiet"]
    files = ["--results", str(path), "--benchmark-json", str(statistics)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/test_suite.py", *arguments, *files],
        cwd=ROOT,
        # In a process of pytest-xdist, pytest-benchmark measures nothing.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Reverse KL over [N, K] supports" in done.stdout
    stored = {r.provider: r for r in results.load(path)}
    assert set(stored) == {p.name for p in FAMILIES["kl"].providers}
    assert stored[OURS].environment.threads == 2
    benchmarks = json.loads(statistics.read_text())["benchmarks"]
    assert len(benchmarks) == len(stored)
    for benchmark in benchmarks:
        assert benchmark["stats"]["min"] == stored[benchmark["params"]["provider"]].min_s
