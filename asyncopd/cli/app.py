"""Commands and their arguments; each does its work elsewhere."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

import asyncopd

if TYPE_CHECKING:  # imported where they are used: --help must not wait for torch's models
    from asyncopd.config import TrainConfig
    from asyncopd.train import Summary

app = typer.Typer(
    help="On-policy distillation: a student learns from a teacher's scores of its own answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. optimizer.lr=1e-3.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the run directory already.")]
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Left out: the embedded task.")]


def main() -> None:
    """Entry point: user errors are one clear message and exit code 2, an interrupt is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from asyncopd.backends import BackendUnavailable
    from asyncopd.config import ConfigError
    from asyncopd.pipeline import PipelineError

    try:
        app()
    except (ConfigError, FileExistsError, FileNotFoundError, BackendUnavailable, MemoryError) as error:
        _fail(f"error: {error}", 2)
    except PipelineError as error:
        _fail(f"run failed: {error}", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _train(config: "TrainConfig", *, overwrite: bool) -> "Summary":
    """A run under a display; Ctrl-C ends it with one line."""
    from asyncopd.cli.display import training_display
    from asyncopd.train import train as run

    try:
        with training_display(console, config) as display:
            return run(config, overwrite=overwrite, say=display.say, on_step=display.on_step, on_tick=display.on_tick)
    except KeyboardInterrupt:
        _fail("interrupted: every worker has been stopped", 130)


@app.command()
def train(config: ConfigFile = None, set_: Settings = None, overwrite: Overwrite = False) -> None:
    """Distil a teacher into a student through the pipeline."""
    from asyncopd.cli.report import summary_table
    from asyncopd.config import load_config

    resolved = load_config(config, set_ or [])
    summary = _train(resolved, overwrite=overwrite)
    console.print(summary_table([summary]))
    console.print(f"run directory: {resolved.run_dir}", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, or 'teacher' or 'student' for the embedded ones.")],
    answers: Annotated[int, typer.Option(min=2, help="How many, going round the held-out problems.")] = 604,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=16383, help="Of the draws.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Small models decode fastest on one.")] = 1,
) -> None:
    """Accuracy of a model on held-out problems of the embedded task, sampled."""
    import torch

    from asyncopd.evaluate import evaluate as score
    from asyncopd.task import RailwayTask, load_student, load_teacher
    from asyncopd.train import check_vocabulary, model_at

    torch.set_num_threads(threads)
    embedded = {"teacher": load_teacher, "student": load_student}
    loaded = embedded[model]() if model in embedded else model_at(Path(model), load_student)
    task = RailwayTask()
    check_vocabulary(model, loaded, task)
    accuracy = score(loaded, task, answers=answers, temperature=temperature, seed=seed)
    console.print(
        f"{model}: {accuracy} of {answers} answers to {accuracy.problems} held-out problems right "
        f"at temperature {temperature:g}",
        soft_wrap=True,
    )


@app.command()
def doctor() -> None:
    """Say which backends and extras work here, and why not."""
    from asyncopd.cli.doctor import report

    console.print(report())


@app.command()
def demo(
    set_: Settings = None,
    root: Annotated[Path, typer.Option(help="Where demo-sync/ and demo-async/ go.")] = Path("runs"),
) -> None:
    """The embedded task in sync and in async mode at equal settings, side by side."""
    from asyncopd.cli.report import summary_table
    from asyncopd.config import load_config

    summaries = []
    for mode in ("sync", "async"):
        resolved = load_config(None, set_ or [], **{"schedule.mode": mode, "run_dir": root / f"demo-{mode}"})
        summaries.append(_train(resolved, overwrite=True))
    console.print(summary_table(summaries))


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories with a summary.json.")],
    into: Annotated[
        Path | None, typer.Option(help="Put the table, as Markdown, between the file's report markers.")
    ] = None,
) -> None:
    """Finished runs side by side."""
    from asyncopd.cli.report import insert_markdown, load_summary, summary_table

    summaries = [load_summary(path) for path in run_dirs]
    if into is None:
        console.print(summary_table(summaries))
    else:
        insert_markdown(into, summaries)


Output = Annotated[Path, typer.Argument(help="A folder for the weights (bf16 safetensors).")]
Steps = Annotated[int | None, typer.Option(min=1, help="Left out: the recipe of the shipped weights.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the weights and the lessons.")]


@app.command(name="train-teacher")
def train_teacher(output: Output, steps: Steps = None, seed: Seed = 0) -> None:
    """Train the embedded task's teacher from scratch, as the shipped one was."""
    from asyncopd.task import training

    training.train_teacher(output, steps=steps or training.TEACHER_STEPS, seed=seed)
    evaluate(str(output))


@app.command(name="warm-up-student")
def warm_up_student(output: Output, steps: Steps = None, seed: Seed = 0) -> None:
    """Make the embedded task's student: a short supervised warm-up on few examples, as the shipped one had."""
    from asyncopd.task import training

    training.warm_up_student(output, steps=steps or training.STUDENT_STEPS, seed=seed)
    evaluate(str(output))


@app.command()
def version() -> None:
    """Print the version."""
    console.print(asyncopd.__version__)
