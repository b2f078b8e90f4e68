"""What a person sees while a run is under way: a live panel on a terminal, a line now and then elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from asyncopd.config import TrainConfig
from asyncopd.pipeline import PipelineStatus

_LINES_PER_RUN = 10


class TrainingDisplay:
    """Takes the callbacks of `asyncopd.train.train`."""

    def __init__(self, console: Console, config: TrainConfig, live: Live | None) -> None:
        self.console, self.live = console, live
        self.mode, self.steps = config.schedule.mode, config.schedule.steps
        self.max_staleness = config.schedule.max_staleness
        self.progress = Progress(
            TextColumn(f"{self.mode:5s}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self.progress.add_task(self.mode, total=self.steps)
        self._smooth: dict[str, float] = {}
        self._status: PipelineStatus | None = None

    def say(self, message: str) -> None:
        self.console.print(f"[{self.mode}] {message}", markup=False, highlight=False, soft_wrap=True)

    def on_step(self, metrics: dict[str, float]) -> None:
        for name in ("loss", "rollout/accuracy", "sample/staleness_mean"):
            if name in metrics:
                last = self._smooth.get(name, metrics[name])
                self._smooth[name] = 0.9 * last + 0.1 * metrics[name]
        step = int(metrics["step"])
        self.progress.update(self._task, completed=step)
        if self.live is None and (step % max(1, self.steps // _LINES_PER_RUN) == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps} after {metrics['elapsed_s']:.0f} s: {self._line()}")

    def on_tick(self, status: PipelineStatus) -> None:
        self._status = status
        if self.live is not None:
            self.live.update(Group(self.progress, self._table(status), self._figures(status)))

    def _line(self) -> str:
        parts = [
            f"loss {self._smooth.get('loss', 0.0):.4f}",
            f"rollout accuracy {100 * self._smooth.get('rollout/accuracy', 0.0):.0f} %",
            f"staleness {self._smooth.get('sample/staleness_mean', 0.0):.1f} (bound {self.max_staleness})",
        ]
        if self._status is not None:
            rates = (f"{stage} {rate:,.0f}" for stage, rate in tokens_per_second(self._status).items())
            parts.append("tokens/s: " + ", ".join(rates))
        return "  ".join(parts)

    def _table(self, status: PipelineStatus) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("stage", "tokens/s", "busy", "tokens"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        rates = tokens_per_second(status)
        for stage, tokens in status.stage_tokens.items():
            busy = status.stage_busy_s[stage] / max(status.elapsed_s, 1e-9)
            table.add_row(stage, f"{rates[stage]:,.0f}", f"{100 * busy:.0f} %", f"{tokens:,}")
        return table

    def _figures(self, status: PipelineStatus) -> Text:
        loss, right = self._smooth.get("loss", 0.0), 100 * self._smooth.get("rollout/accuracy", 0.0)
        mean = self._smooth.get("sample/staleness_mean", 0.0)
        return Text(
            f"loss {loss:.4f} · rollout accuracy {right:.0f} % · staleness mean {mean:.1f}, "
            f"max {status.staleness_max} of {self.max_staleness} · refused {status.refused}"
        )


def tokens_per_second(status: PipelineStatus) -> dict[str, float]:
    """Response tokens that each stage has finished, over the run so far."""
    return {stage: tokens / max(status.elapsed_s, 1e-9) for stage, tokens in status.stage_tokens.items()}


@contextmanager
def training_display(console: Console, config: TrainConfig) -> Iterator[TrainingDisplay]:
    if not console.is_terminal:
        yield TrainingDisplay(console, config, None)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield TrainingDisplay(console, config, live)
