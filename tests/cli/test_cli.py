"""The command: its output, its errors, and that a user error is one line and no traceback."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from asyncopd.cli import display
from asyncopd.cli.app import app
from asyncopd.cli.report import insert_markdown, load_summary, markdown, summary_table
from asyncopd.config import ConfigError, load_config
from asyncopd.pipeline import PipelineStatus
from asyncopd.train import Summary

SMALL = [
    *("--set", "schedule.steps=2"),
    *("--set", "schedule.batch_size=4"),
    *("--set", "schedule.sequences_per_slot=2"),
    *("--set", "engine.max_response_tokens=8"),
    *("--set", "eval.answers=8"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "asyncopd", *arguments], capture_output=True, text=True, timeout=110)


def make_summary(mode: str, throughput: float) -> Summary:
    stages = {"rollout": 3.0, "teacher": 2.0, "learner": 1.0}
    return Summary(
        mode=mode,
        steps=9,
        accuracy_before=0.25,
        accuracy_after=0.9,
        accuracy_teacher=0.97,
        accuracy_standard_error=0.01,
        learner_tokens_per_second=throughput,
        stage_tokens_per_second=stages,
        stage_busy_seconds=stages,
        stage_cpu_seconds=stages,
        overlap=1.5,
        cpu_overlap=1.4,
        staleness_mean=0.5,
        staleness_max=2,
        max_staleness=4,
        refused=0,
        cache_bytes_per_token=776,
        consumed_tokens=1000,
        wall_seconds=60.0,
        backends={"kl_rows": "reference"},
        machine="a machine",
        torch_version="2",
        threads_per_worker=1,
    )


def test_demo_runs_both_modes_and_prints_them_side_by_side(tmp_path: Path) -> None:
    done = run("demo", "--root", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "learner throughput against sync" in done.stdout
    for mode in ("sync", "async"):
        assert json.loads((tmp_path / f"demo-{mode}" / "summary.json").read_text())["mode"] == mode
        assert f"[{mode}] step 2/2" in done.stdout
    again = run("report", str(tmp_path / "demo-sync"), str(tmp_path / "demo-async"))
    assert "held-out accuracy after" in again.stdout


def test_train_refuses_to_overwrite_and_bad_settings_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    taken = run("train", "--set", f"run_dir={tmp_path}")
    assert taken.returncode == 2
    assert taken.stderr.splitlines() == [
        f"error: run_dir: {tmp_path} already holds summary.json; choose another or pass --overwrite"
    ]
    wrong = run("train", "--set", "optimizer.learning_rate=1")
    assert wrong.returncode == 2
    assert "unknown key; did you mean 'optimizer." in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_doctor_says_what_works_and_why_not() -> None:
    # The width of a console that was made when the module was imported depends on the process.
    with mock.patch.object(sys.modules["asyncopd.cli.app"], "console", Console(width=200)):
        result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("reference", "triton", "cuda", "gather_logprobs", "memory available", "transformers"):
        assert word in result.output
    assert "no: " in result.output
    if importlib.util.find_spec("triton") is None:
        assert "asyncopd[triton]" in result.output  # square brackets are not taken for markup


def doctor() -> str:
    # The width of a console that was made when the module was imported depends on the process.
    with mock.patch.object(sys.modules["asyncopd.cli.app"], "console", Console(width=200)):
        result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_doctor_says_what_cpu_and_cuda_tensors_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCOPD_BACKEND", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    output = doctor()
    assert "CPU tensors (fp32) run on" in output
    assert "CUDA tensors run on │ triton, on a machine with a GPU" in output
    assert "CUDA tensors (bf16)" not in output


def test_doctor_of_a_gpu_without_triton_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = "triton is not installed (pip install 'asyncopd[triton]')"
    assert f"CUDA tensors run on │ reference, slowly: {reason}" in doctor()


def test_doctor_of_a_gpu_has_a_column_for_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
        asked.append((device.type, dtype))
        warnings.warn("of a backend that cannot run", stacklevel=1)
        return "cpu" if device.type == "cpu" else "triton"

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "a GPU")
    monkeypatch.setattr("asyncopd.backends.choose", choose)
    monkeypatch.setattr("asyncopd.backends.unavailable_reason", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = doctor()
    assert "CUDA tensors run on │ see the ops below │" in output
    assert "CUDA tensors (bf16) run on" in output
    assert "│ topk_logprobs │ cpu │ triton │" in output
    assert set(asked) == {("cpu", torch.float32), ("cuda", torch.bfloat16)}
    monkeypatch.setattr("asyncopd.backends.unavailable_reason", lambda name: "the driver is too old")
    assert "CUDA tensors run on │ reference, slowly: the driver is too old" in doctor()


def test_eval_prints_accuracy_with_its_error() -> None:
    result = CliRunner().invoke(app, ["eval", "student", "--answers", "20"])
    assert result.exit_code == 0, result.output
    assert "of 20 answers to 20 held-out problems right" in result.output.replace("\n", " ")


def test_version() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip() == "0.1.0"


def test_teacher_and_student_can_be_made(tmp_path: Path) -> None:
    for command in ("train-teacher", "warm-up-student"):
        result = CliRunner().invoke(app, [command, str(tmp_path / command), "--steps", "2"])
        assert result.exit_code == 0, result.output
        assert (tmp_path / command / "model.safetensors").is_file()


def test_report_is_written_between_its_markers(tmp_path: Path) -> None:
    summaries = [make_summary("sync", 1000.0), make_summary("async", 1600.0)]
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- report: begin -->\nold\n<!-- report: end -->\nafter\n")
    insert_markdown(page, summaries)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| learner throughput against sync | 1 | 1.60x |" in text
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines"):
        insert_markdown(page, summaries)
    assert "against sync" not in markdown(summaries[:1])
    console = Console(record=True, width=120)
    console.print(summary_table(summaries))
    assert "1.60x" in console.export_text()


def test_summary_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has the run finished"):
        load_summary(tmp_path)
    values = dataclasses.asdict(make_summary("sync", 1.0))
    (tmp_path / "summary.json").write_text(json.dumps(values))
    assert load_summary(tmp_path) == make_summary("sync", 1.0)
    (tmp_path / "summary.json").write_text(json.dumps({**values, "more": 1}))
    with pytest.raises(ConfigError, match="more"):
        load_summary(tmp_path)


def test_live_display_shows_stages_staleness_and_loss() -> None:
    console = Console(force_terminal=True, width=120, record=True)
    with display.training_display(console, load_config()) as shown:
        shown.say("hello")
        shown.on_step(
            {"step": 3, "elapsed_s": 2.0, "loss": 0.5, "rollout/accuracy": 0.25, "sample/staleness_mean": 1.0}
        )
        stages = {"rollout": 300, "teacher": 200, "learner": 100}
        busy = {"rollout": 2.0, "teacher": 1.0, "learner": 1.5}
        shown.on_tick(PipelineStatus(3, 9, 2.0, stages, busy, {}, 4, 2, 0))
        assert shown.live is not None
        console.print(shown.live.renderable)
    text = console.export_text()
    assert "hello" in text
    for word in ("rollout", "teacher", "learner", "150", "loss 0.5000", "max 2 of 4", "25 %"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["eval", "MODEL"], {}, "got a vocabulary of 50"),
        (["train", "--set", "run_dir=RUN", "--set", "schedule.num_slots=100000000"], {}, "lower num_slots"),
        (["eval", "student", "--seed", "20000"], {}, "less than or equal to 16383"),
        (["train", "--set", "run_dir=RUN"], {"ASYNCOPD_BACKEND": "cuda"}, "ASYNCOPD_BACKEND=cuda cannot run"),
        (["nonsense"], {}, "No such command"),
    ],
)
def test_user_errors_are_plain(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 32,
    }
    Qwen3ForCausalLM(Qwen3Config(vocab_size=50, **tiny)).save_pretrained(tmp_path / "model")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    places = {"MODEL": str(tmp_path / "model"), "run_dir=RUN": f"run_dir={tmp_path / 'run'}"}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupt_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "asyncopd", "train", "--set", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: every worker has been stopped" in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10  # multiprocessing's own tracker goes a moment after the rest
    while group_exists(process.pid):
        assert time.monotonic() < deadline, "a process of the run is left"
        time.sleep(0.1)
