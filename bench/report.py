"""Tables of finished benchmarks; every figure comes from the JSON lines.

python -m bench.report                          the newest results of every machine, for the terminal
python -m bench.report FILE... --into README.md --plots bench/results
python -m bench.report --keep build/gpu/results.jsonl --into README.md     results of another machine, filed and shown
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.families import COMPILED, EAGER, FAMILIES, LIMIT, OURS
from bench.results import RESULTS, Environment, Result, default_path, load, store

MARKERS = "bench"  # <!-- bench: begin --> and <!-- bench: end -->


def newest_files(folder: Path = RESULTS) -> list[Path]:
    """The last file of every machine: their names end in a date."""
    last = {path.stem[: -len("-2026-01-31")]: path for path in sorted(folder.glob("*.jsonl"))}
    return list(last.values())


# ----------------------------------------------------------------------------------------------- one number each


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.2f} s"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}x" if value < 10 else f"{value:.0f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f} MiB" if value < 10 * 2**20 else f"{value / 2**20:,.0f} MiB"


def rate(result: Result) -> str:
    if result.bound == "flops":
        return "" if result.gflop_per_s is None else f"{result.gflop_per_s:,.0f} GFLOP/s"
    return "" if result.gb_per_s is None else f"{result.gb_per_s:.3g} GB/s"


def error(result: Result) -> str:
    return "" if result.error is None else f"{result.error:.1e}"


def speedup(result: Result | None, other: Result | None) -> float | None:
    """How many times as long the other took; None if one of them was not timed."""
    if result is None or other is None or result.time_s is None or other.time_s is None:
        return None
    return other.time_s / result.time_s


def by_case(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    cases: dict[str, dict[str, Result]] = {}
    for result in results:
        cases.setdefault(result.case, {})[result.provider] = result
    return cases


def what(result: Result) -> str:
    masked = f", {100 * result.masked:.0f} % masked" if result.masked else ""
    return f"{result.model} {result.shape} {result.dtype}{masked}"


def where(e: Environment) -> str:
    if e.device == "cuda":
        machine = e.machine
        if e.copy_gb_per_s and e.gemm_gflop_per_s:
            machine += f", copy {e.copy_gb_per_s / 1e3:.2f} TB/s, matrix product {e.gemm_gflop_per_s / 1e3:.0f} TFLOP/s"
    else:
        machine = f"{e.machine}, {e.threads} threads, {e.instruction_set}"
    versions = f"Python {e.python}, torch {e.torch}, asyncopd {e.asyncopd} at {e.commit}"
    return f"{machine}; {versions}; {e.date}"


def environments(results: Iterable[Result]) -> dict[str, list[str]]:
    """The commands of every machine and state of the code: a run taken up again has several."""
    commands: dict[str, list[str]] = {}
    for e in dict.fromkeys(result.environment for result in results):
        commands.setdefault(where(e), []).append(e.command)
    return commands


# -------------------------------------------------------------------------------------------------- the terminal


_COLUMNS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("best", lambda r: seconds(r.min_s)),
    ("median", lambda r: seconds(r.median_s)),
    ("rate", rate),
    ("of limit", lambda r: percent(r.share_of_limit)),
    ("of machine", lambda r: percent(r.share_of_machine)),
    ("extra memory", lambda r: mebibytes(r.peak_bytes)),
    ("clock", lambda r: "" if r.clock_mhz is None else f"{r.clock_mhz:.0f} MHz"),
    ("error", error),
)


def family_table(family: str, results: Sequence[Result]) -> Table:
    about = FAMILIES[family]
    caption = (
        f"limit: {about.limit}; machine: a copy or a matrix product; error against fp64: {about.error}; "
        "rates and ratios: of best times on a CPU, of medians on a GPU"
    )
    table = Table("", title=about.title, caption=caption, title_justify="left", caption_justify="left")
    columns = [column for column in _COLUMNS if any(column[1](r) for r in results)]
    for name in (*(name for name, _ in columns), f"{OURS} faster by"):
        table.add_column(name, justify="right")
    for providers in by_case(results).values():
        table.add_row(f"[bold]{escape(what(next(iter(providers.values()))))}[/bold]")
        ours = providers.get(OURS)
        for name, result in providers.items():
            if result.status != "ok":
                table.add_row(f"  {name}: {result.status}: {escape(result.reason)}")
                continue
            faster = "" if name in (OURS, LIMIT) else times(speedup(ours, result))
            table.add_row(f"  {name}", *(show(result) for _, show in columns), faster)
        table.add_section()
    return table


def print_report(results: Sequence[Result], console: Console | None = None) -> None:
    # A pipe has no width, and a log is no place to cut figures off.
    console = console or Console(width=None if sys.stdout.isatty() else 170)
    for family in dict.fromkeys(result.family for result in results):
        console.print(family_table(family, [r for r in results if r.family == family]))
    for environment, commands in environments(results).items():
        console.print("\n  ".join([environment, *commands]), highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------ Markdown


NOT_ON_A_GPU = "GPU: not yet measured on a GPU (`bench/gpu.sh` does it)."
_HEADER = (
    f"| {OURS} | time | of the limit | {EAGER} | {COMPILED} | extra memory ({EAGER}) |",
    "|---|---:|---:|---:|---:|---:|",
)


def markdown_row(providers: dict[str, Result]) -> str:
    first = next(iter(providers.values()))
    ours, eager = providers.get(OURS), providers.get(EAGER)
    title = f"{FAMILIES[first.family].title}: {what(first)}"
    if ours is None or ours.status != "ok":
        return f"| {title} | not measured: {ours.reason if ours else 'did not run'} | | | | |"
    memory = mebibytes(ours.peak_bytes) + (f" ({mebibytes(eager.peak_bytes)})" if eager and eager.peak_bytes else "")
    on_gpu = ours.environment.device == "cuda"
    cells = [
        title,
        seconds(ours.time_s),
        percent(ours.share_of_machine if on_gpu else ours.share_of_limit),
        times(speedup(ours, eager)),
        times(speedup(ours, providers.get(COMPILED))),
        memory,
    ]
    return "| " + " | ".join(cells) + " |"


def markdown_rows(results: Sequence[Result]) -> list[str]:
    """A run's rows; those of a GPU below its name."""
    rows = [markdown_row(providers) for providers in by_case(results).values()]
    devices = dict.fromkeys(r.environment.machine for r in results if r.environment.device == "cuda")
    return [f"| **{' / '.join(devices)}** | | | | | |", *rows] if devices else rows


def keep(path: Path) -> Path:
    """Results that were measured elsewhere, filed under their machine and day among those that make the page."""
    results = load(path)
    if not results:
        raise SystemExit(f"{path}: no results in it")
    target = default_path(results[-1].environment)
    store(target, results)
    return target


def markdown(runs: Sequence[Sequence[Result]]) -> str:
    """One table: a GPU's name and its rows, the CPUs' rows; then the machines. It says so while none is a GPU."""
    results = [result for run in runs for result in run if result.headline]
    rows = [row for run in runs for row in markdown_rows([r for r in run if r.headline])]
    lines = [*_HEADER, *rows, ""] if rows else ["No results yet: `make bench` makes them.", ""]
    lines += environments(results)
    if not any(result.environment.device == "cuda" for result in results):
        lines.append(NOT_ON_A_GPU)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and plots of benchmarks.")
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines; left out: the newest of every machine")
    parser.add_argument("--into", type=Path, help="put the Markdown tables between this file's bench markers")
    parser.add_argument("--plots", type=Path, help="a folder for one plot (SVG) a file")
    parser.add_argument("--keep", type=Path, help="first file these results of another machine in bench/results")
    options = parser.parse_args(arguments)
    if options.keep:
        print(f"kept as {keep(options.keep).name}")
    runs = {path: load(path) for path in options.files or newest_files()}
    if options.plots:
        from bench.plots import save_plot

        for path, results in runs.items():
            save_plot(results, options.plots / f"{path.stem}.svg")
    if options.into:
        # Here, since the command line's packages (pydantic, transformers) need not be on a machine that only measures.
        from asyncopd.cli.report import insert_between_markers

        insert_between_markers(options.into, MARKERS, markdown(list(runs.values())))
    if not options.into and not options.plots:
        for results in runs.values():
            print_report(results)


if __name__ == "__main__":
    main()
