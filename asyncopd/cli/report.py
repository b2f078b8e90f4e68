"""Finished runs side by side, for a terminal and for a Markdown file; every figure comes from summary.json."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from asyncopd.config import ConfigError
from asyncopd.train import Summary

MARKERS = "report"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _stages(values: dict[str, float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in values.values())


_ROWS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("optimizer steps", lambda s: str(s.steps)),
    ("held-out accuracy before", lambda s: _percent(s.accuracy_before)),
    ("held-out accuracy after", lambda s: _percent(s.accuracy_after)),
    ("teacher's accuracy", lambda s: _percent(s.accuracy_teacher)),
    ("learner tokens / s", lambda s: f"{s.learner_tokens_per_second:,.0f}"),
    ("tokens / busy s: rollout / teacher / learner", lambda s: _stages(s.stage_tokens_per_second)),
    ("busy s: rollout / teacher / learner", lambda s: _stages(s.stage_busy_seconds)),
    ("CPU s: rollout / teacher / learner", lambda s: _stages(s.stage_cpu_seconds)),
    ("stage overlap: busy (of 3) / CPU", lambda s: f"{s.overlap:.2f} / {s.cpu_overlap:.2f}"),
    ("staleness mean / max / bound", lambda s: f"{s.staleness_mean:.2f} / {s.staleness_max} / {s.max_staleness}"),
    ("sequences refused as too stale", lambda s: str(s.refused)),
    ("cache bytes per token", lambda s: str(s.cache_bytes_per_token)),
    ("wall seconds", lambda s: f"{s.wall_seconds:.1f}"),
)


def _cells(summaries: Sequence[Summary]) -> list[list[str]]:
    rows = [[name, *(show(s) for s in summaries)] for name, show in _ROWS]
    by_mode = {s.mode: s for s in summaries}
    if len(summaries) == 2 and {"sync", "async"} <= by_mode.keys():
        ratio = by_mode["async"].learner_tokens_per_second / by_mode["sync"].learner_tokens_per_second
        cells = [f"{ratio:.2f}x" if s.mode == "async" else "1" for s in summaries]
        rows.insert(5, ["learner throughput against sync", *cells])
    return rows


def summary_table(summaries: Sequence[Summary]) -> Table:
    table = Table("", *(s.mode for s in summaries), title="AsyncOPD")
    for row in _cells(summaries):
        table.add_row(*row)
    return table


def markdown(summaries: Sequence[Summary]) -> str:
    lines = ["| | " + " | ".join(s.mode for s in summaries) + " |", "|---|" + "---:|" * len(summaries)]
    lines += ["| " + " | ".join(row) + " |" for row in _cells(summaries)]
    s = summaries[0]
    lines.append(
        f"\n{s.machine}, {s.threads_per_worker} thread a role, torch {s.torch_version}; "
        f"accuracies ± {100 * s.accuracy_standard_error:.1f} points."
    )
    return "\n".join(lines)


def insert_between_markers(path: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`; ConfigError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise ConfigError(f"{path}: has no lines {begin} and {end} to put the table between")
    head, rest = text.split(begin, 1)
    path.write_text(f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}")


def insert_markdown(path: Path, summaries: Sequence[Summary]) -> None:
    """The table into a file, between its report markers."""
    insert_between_markers(path, MARKERS, markdown(summaries))


def load_summary(run_dir: Path) -> Summary:
    """The summary of a finished run; FileNotFoundError, ConfigError if there is none or it is another version's."""
    path = run_dir / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; has the run finished?")
    values = json.loads(path.read_text())
    known = {field.name for field in dataclasses.fields(Summary)}
    if values.keys() != known:
        raise ConfigError(f"{path}: keys differ from this version's: {sorted(values.keys() ^ known)}")
    return Summary(**values)
