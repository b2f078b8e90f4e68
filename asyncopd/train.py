"""A training run: evaluate, run the pipeline, evaluate again, and leave a run directory behind.

config.yaml     the resolved configuration
metrics.jsonl   one line per optimizer step
student/        the student that the run started from, Hugging Face format
checkpoint/     the trained student, likewise
summary.json    the figures that `Summary` documents
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from asyncopd import backends
from asyncopd.checkpoints import load_model, save_model
from asyncopd.config import ConfigError, TrainConfig, dump_config
from asyncopd.engines.decode import Decoder
from asyncopd.engines.draw import check_draw
from asyncopd.engines.learn import LossOptions, OpdLearner, OptimizerOptions
from asyncopd.engines.score import TeacherScorer
from asyncopd.evaluate import Accuracy, evaluate
from asyncopd.pipeline import PipelineConfig, PipelineStatus, RunResult, run_pipeline
from asyncopd.task import RailwayTask, load_student, load_teacher

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. Accuracies are shares of held-out problems answered right, sampled at temperature 1.

    Times exclude start-up and evaluation. `overlap` is the sum of the stages' busy seconds over wall seconds, where
    waiting for a core counts as busy; `cpu_overlap` is the same of their CPU seconds. `stage_tokens_per_second` is per
    busy second; staleness is in optimizer steps.
    """

    mode: str
    steps: int
    accuracy_before: float
    accuracy_after: float
    accuracy_teacher: float
    accuracy_standard_error: float
    learner_tokens_per_second: float
    stage_tokens_per_second: dict[str, float]
    stage_busy_seconds: dict[str, float]
    stage_cpu_seconds: dict[str, float]
    overlap: float
    cpu_overlap: float
    staleness_mean: float
    staleness_max: int
    max_staleness: int
    refused: int
    cache_bytes_per_token: int
    consumed_tokens: int
    wall_seconds: float
    backends: dict[str, str]
    machine: str
    torch_version: str
    threads_per_worker: int


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    say: Say = print,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_tick: Callable[[PipelineStatus], None] | None = None,
) -> Summary:
    """Run `config`. Raises what `run_pipeline` raises; FileExistsError if the run directory holds a run already."""
    run_dir = config.run_dir
    check_run_dir(run_dir, overwrite=overwrite)
    teacher_path = config.teacher.path
    if teacher_path is not None and teacher_path.resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"teacher.path: {teacher_path} lies in run_dir, whose files the run replaces")
    task = RailwayTask()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.schedule.threads_per_worker)
    try:
        student, teacher = model_at(config.student.path, load_student), model_at(config.teacher.path, load_teacher)
        check_models(student, teacher, config, task)
        # Only now is anything replaced: the models may come from the very run that is overwritten.
        clear_run_dir(run_dir)
        (run_dir / "config.yaml").write_text(dump_config(config))
        score = partial(evaluate, task=task, answers=config.eval.answers, places=config.eval.places)
        accuracy_teacher, before = score(teacher), score(student)
        say(f"held-out accuracy: teacher {accuracy_teacher}, student {before}")
        ops = {op: backends.choose(op, torch.device("cpu"), torch.float32) for op in _OPS}
        say("kernels: " + ", ".join(f"{op} on {name}" for op, name in ops.items()))
        start = run_dir / "student"
        save_model(student, start)
        del teacher
        result = _run(config, task, start, run_dir, on_step, on_tick)
        after = score(load_model(run_dir / "checkpoint"))
        say(f"held-out accuracy: student {after} after {result.steps} steps")
    finally:
        torch.set_num_threads(threads)
    summary = _summary(config, result, before, after, accuracy_teacher, ops)
    _write_atomically(run_dir / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    return summary


_OPS = ("sample_support", "linear_gather_logprobs", "linear_gather_logits", "linear_logsumexp", "kl_rows", "linear_kl")


def _files_of_a_run(run_dir: Path) -> list[Path]:
    names = ("config.yaml", "metrics.jsonl", "summary.json", "checkpoint", ".checkpoint.partial", "student")
    return [path for name in names if (path := run_dir / name).exists()]


def check_run_dir(run_dir: Path, *, overwrite: bool) -> None:
    """A run that is there already is replaced only when asked to."""
    there = _files_of_a_run(run_dir)
    if there and not overwrite:
        raise FileExistsError(f"run_dir: {run_dir} already holds {there[0].name}; choose another or pass --overwrite")


def clear_run_dir(run_dir: Path) -> None:
    """Make the directory, without an earlier run's files; anything else in it stays."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in _files_of_a_run(run_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(
    config: TrainConfig,
    task: RailwayTask,
    start: Path,
    run_dir: Path,
    on_step: Callable[[dict[str, float]], None] | None,
    on_tick: Callable[[PipelineStatus], None] | None,
) -> RunResult:
    pipeline = PipelineConfig(
        **config.schedule.model_dump(),
        max_prompt_tokens=task.max_prompt_tokens,
        max_response_tokens=config.engine.max_response_tokens or task.max_response_tokens,
        num_scores=config.draw.num_scores,
    )
    with (run_dir / "metrics.jsonl").open("w") as metrics:

        def record(step: dict[str, float]) -> None:
            metrics.write(json.dumps(step) + "\n")
            metrics.flush()
            if on_step is not None:
                on_step(step)

        return run_pipeline(
            pipeline,
            rollout=partial(build_decoder, config, start),
            teacher=partial(build_scorer, config),
            learner=partial(build_learner, config, start),
            # A seed gives the same problems in the same order, whatever the mode.
            prompts=lambda uid: list(task.problem(config.seed * 1_000_003 + uid, "train").prompt_ids),
            on_step=record,
            on_tick=on_tick,
            checkpoint=run_dir / "checkpoint",
        )


# ------------------------------------------------------------------ engines, each built inside its worker


def build_decoder(config: TrainConfig, student: Path) -> Decoder:
    task = RailwayTask()
    return Decoder(
        load_model(student),
        places=config.engine.places,
        max_prompt_tokens=task.max_prompt_tokens,
        max_response_tokens=config.engine.max_response_tokens or task.max_response_tokens,
        eos_token_id=task.eos_token_id,
        draw=config.draw.name,
        num_scores=config.draw.num_scores,
        head=config.draw.head,
        temperature=config.draw.temperature,
        seed=config.seed,
        check=task.check,
    )


def build_scorer(config: TrainConfig) -> TeacherScorer:
    return TeacherScorer(
        model_at(config.teacher.path, load_teacher),
        draw=config.draw.name,
        num_scores=config.draw.num_scores,
        temperature=config.draw.temperature,
        seed=config.seed,
        max_packed_tokens=config.engine.max_packed_tokens,
    )


def build_learner(config: TrainConfig, student: Path) -> OpdLearner:
    loss, optimizer = config.loss, config.optimizer
    return OpdLearner(
        load_model(student),
        draw=config.draw.name,
        loss=LossOptions(
            kind=loss.kind,
            normalize=loss.normalize,
            tail=loss.tail,
            baseline=loss.baseline,
            correction=loss.correction(),
        ),
        optimizer=OptimizerOptions(**optimizer.model_dump(), total_steps=config.schedule.steps),
        temperature=config.draw.temperature,
        max_packed_tokens=config.engine.max_packed_tokens,
    )


def model_at(path: Path | None, embedded: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model in a local folder, in fp32, or the embedded one."""
    return embedded() if path is None else load_model(path)


def check_models(student: PreTrainedModel, teacher: PreTrainedModel, config: TrainConfig, task: RailwayTask) -> None:
    """Both must speak the task's vocabulary, or ids would mean different tokens."""
    check_vocabulary("student.path", student, task)
    check_vocabulary("teacher.path", teacher, task)
    check_draw(config.draw.name, config.draw.num_scores, config.draw.head, student.config.vocab_size)


def check_vocabulary(name: str, model: PreTrainedModel, task: RailwayTask) -> None:
    if model.config.vocab_size != task.vocab_size:
        raise ConfigError(f"{name}: got a vocabulary of {model.config.vocab_size}, the task has {task.vocab_size}")


def machine_name() -> str:
    """The processor and its cores, as figures of a run have to say."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    return f"{model}, {os.cpu_count()} cores"


def _summary(
    config: TrainConfig, result: RunResult, before: Accuracy, after: Accuracy, teacher: Accuracy, ops: dict[str, str]
) -> Summary:
    shared: dict[str, Any] = {
        field.name: getattr(result, field.name) for field in dataclasses.fields(Summary) if hasattr(result, field.name)
    }
    return Summary(
        **shared,
        mode=config.schedule.mode,
        accuracy_before=before.share,
        accuracy_after=after.share,
        accuracy_teacher=teacher.share,
        accuracy_standard_error=max(a.standard_error for a in (before, after, teacher)),
        max_staleness=config.schedule.max_staleness,
        backends=ops,
        machine=machine_name(),
        torch_version=torch.__version__,
        threads_per_worker=config.schedule.threads_per_worker,
    )


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
