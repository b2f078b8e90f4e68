"""The shipped models are what the demo claims, and can be made again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from asyncopd.evaluate import evaluate
from asyncopd.task import RailwayTask, load_student, load_teacher, train_teacher, warm_up_student
from asyncopd.task.batches import broken_walks, right_answers
from asyncopd.task.models import ASSETS
from asyncopd.task.railway import DIRECTION_ID, EOS_ID, LINE_ID, NUM_STATIONS, PAD_ID, problems

TASK = RailwayTask()


def test_teacher_is_right_on_held_out_problems_and_the_student_clearly_worse() -> None:
    teacher, student = load_teacher(), load_student()
    right, wrong = (evaluate(model, TASK, answers=302, places=151) for model in (teacher, student))
    assert right.share >= 0.95
    assert wrong.share < 0.6
    assert student.num_parameters() < 0.6 * teacher.num_parameters()


def test_weights_are_small_bf16_safetensors() -> None:
    for name, limit in (("teacher", 2_000_000), ("student", 1_000_000)):
        files = {path.name: path.stat().st_size for path in (ASSETS / name).iterdir()}
        assert files["model.safetensors"] < limit
        assert set(files) == {"config.json", "generation_config.json", "model.safetensors"}


def test_teacher_is_reliable_after_broken_prefixes() -> None:
    """The mass that it puts on what the rule allows, after jumps to random stations."""
    batch = broken_walks(np.random.default_rng(5), problems("heldout"), length=30, jump_rate=0.3)
    with torch.no_grad():
        probs = load_teacher()(batch.tokens).logits[:, 2:].softmax(-1)
    allowed = (probs.gather(-1, batch.target_ids) * (batch.target_probs > 0)).sum(-1)
    assert allowed.mean() > 0.99
    assert (allowed > 0.9).float().mean() > 0.99


@pytest.mark.parametrize("train", [train_teacher, warm_up_student])
def test_training_lowers_the_loss_is_reproducible_and_can_be_loaded(train: object, tmp_path: Path) -> None:
    losses = train(tmp_path / "a", steps=30, progress=False)  # type: ignore[operator]
    assert losses[-1] < 0.9 * losses[0]
    again = train(tmp_path / "b", steps=30, progress=False)  # type: ignore[operator]
    assert again == losses
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_lessons_carry_the_rule_after_every_token() -> None:
    batch = broken_walks(np.random.default_rng(0), problems("train")[:40], length=20, jump_rate=0.3)
    for row in range(40):
        tokens = batch.tokens[row].tolist()
        for place in range(21):
            want = TASK.next_token_probs(tokens[:3], tokens[3 : 3 + place])
            got = np.zeros_like(want)
            np.add.at(got, batch.target_ids[row, place].numpy(), batch.target_probs[row, place].numpy())
            np.testing.assert_allclose(got, want)
    assert ((batch.tokens[:, 3:] >= 0) & (batch.tokens[:, 3:] < NUM_STATIONS)).all()


def test_examples_are_right_answers() -> None:
    tokens = right_answers(np.random.default_rng(0), problems("train")[:50], TASK.max_response_tokens)
    assert (tokens[:, 0] >= LINE_ID).all()
    assert ((tokens[:, 1] == DIRECTION_ID) | (tokens[:, 1] == DIRECTION_ID + 1)).all()
    for row in tokens.tolist():
        answer = [t for t in row[3:] if t != PAD_ID]
        assert TASK.check(row[:3], answer)
        assert answer[-1] == EOS_ID
