"""A whole run, small: both modes, every draw, what is left in the run directory, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncopd.config import ConfigError, TrainConfig, load_config
from asyncopd.pipeline import WorkerError
from asyncopd.task import load_student
from asyncopd.train import check_run_dir, clear_run_dir, train

SMALL = [
    "schedule.steps=3",
    "schedule.batch_size=8",
    "schedule.sequences_per_slot=4",
    "engine.places=8",
    "engine.max_response_tokens=12",
    "draw.num_scores=12",
    "draw.head=4",
    "eval.answers=16",
]
REQUIRED_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "accuracy_teacher",
    "learner_tokens_per_second",
    "stage_tokens_per_second",
    "overlap",
    "staleness_mean",
    "staleness_max",
    "max_staleness",
    "cache_bytes_per_token",
    "wall_seconds",
}


def small(run_dir: Path, *settings: str) -> TrainConfig:
    return load_config(None, [*SMALL, *settings], run_dir=run_dir)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_run_leaves_configuration_metrics_checkpoint_and_summary(tmp_path: Path, mode: str) -> None:
    said: list[str] = []
    config = small(tmp_path / "run", f"schedule.mode={mode}", "schedule.max_staleness=2")
    summary = train(config, say=said.append)
    run = tmp_path / "run"
    assert load_config(run / "config.yaml") == config
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "loss/student_mass", "grad_norm", "lr", "sample/staleness_mean", "perf/rollout_wait_s"} <= lines[
        0
    ].keys()
    written = json.loads((run / "summary.json").read_text())
    assert written.keys() >= REQUIRED_KEYS
    assert written["staleness_max"] <= (0 if mode == "sync" else 2)
    assert written["cache_bytes_per_token"] == 8 + 12 * 12
    assert summary.consumed_tokens == sum(line["learner/tokens"] for line in lines)
    trained = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    start = AutoModelForCausalLM.from_pretrained(run / "student")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert any("teacher" in line for line in said)
    assert any("kernels: " in line for line in said)  # the log says which backend runs what


@pytest.mark.parametrize(
    "settings",
    [
        ["draw.name=samples", "loss.clip_eps=0.2", "loss.baseline=loo"],
        ["draw.name=teacher_top_k", "loss.kind=forward_kl", "loss.tail=renormalize", "loss.baseline=none"],
        ["draw.name=head_tail", "loss.normalize=sampled", "draw.temperature=0.8"],
    ],
)
def test_draws_losses_and_corrections_reach_the_workers(tmp_path: Path, settings: list[str]) -> None:
    config = small(tmp_path / "run", "schedule.steps=2", *settings)
    train(config, say=lambda _: None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(loss == loss and abs(loss) < 100 for loss in losses)


def test_run_directory_with_a_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds summary\.json"):
        check_run_dir(tmp_path, overwrite=False)
    check_run_dir(tmp_path, overwrite=True)
    clear_run_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # what is not ours stays


def test_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, head_dim=32
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"teacher\.path: got a vocabulary of 50"):
        train(small(tmp_path / "run", f"teacher.path={tmp_path / 'model'}"), say=lambda _: None)


def test_overwriting_may_start_from_the_old_checkpoint_and_a_failed_start_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    load_student().save_pretrained(run / "checkpoint")
    (run / "config.yaml").write_text("of the first run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(small(run, f"teacher.path={tmp_path / 'nowhere'}"), overwrite=True, say=lambda _: None)
    assert (run / "config.yaml").read_text() == "of the first run"
    again = small(run, f"student.path={run / 'checkpoint'}", "schedule.steps=1")
    train(again, overwrite=True, say=lambda _: None)
    assert load_config(run / "config.yaml") == again


def test_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no config\.json there"):
        train(small(tmp_path / "run", f"student.path={tmp_path / 'nowhere'}"), say=lambda _: None)


def test_failing_worker_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "triton")  # cannot run on a CPU: the first op in a worker says so
    with pytest.raises(Exception, match="ASYNCOPD_BACKEND=triton cannot run") as error:
        train(small(tmp_path / "run"), say=lambda _: None)
    assert isinstance(error.value, WorkerError | RuntimeError)
