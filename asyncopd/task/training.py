"""Training from scratch: the teacher on broken prefixes, the student's short supervised warm-up on few examples."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncopd.checkpoints import save_model
from asyncopd.task.batches import PROMPT, broken_walks, right_answers
from asyncopd.task.models import student_config, teacher_config
from asyncopd.task.railway import PAD_ID, RailwayTask, problems

TEACHER_STEPS = 1500
STUDENT_STEPS = 300
STUDENT_EXAMPLES = 400  # problems; a third of all there are


def train_teacher(
    output: str | os.PathLike[str], *, steps: int = TEACHER_STEPS, seed: int = 0, progress: bool = True
) -> list[float]:
    """Train the teacher from scratch and save it (bf16 safetensors, Hugging Face format) in the folder `output`.

    Returns the loss of every step: the KL from the rule in nats. A few minutes on one thread; the same seed, steps and
    torch build give the same weights.
    """
    random = np.random.default_rng(seed)
    train = problems("train")

    def loss(model: Qwen3ForCausalLM) -> Tensor:
        batch = broken_walks(random, train[random.integers(0, len(train), 32)], length=48, jump_rate=0.15)
        logprobs = model(batch.tokens).logits[:, PROMPT - 1 :].log_softmax(-1).gather(-1, batch.target_ids)
        q = batch.target_probs
        return (torch.xlogy(q, q) - q * logprobs).sum() / q.sum()

    return _fit(teacher_config(), loss, output, steps, seed, "teacher", progress, decay=True)


def warm_up_student(
    output: str | os.PathLike[str], *, steps: int = STUDENT_STEPS, seed: int = 0, progress: bool = True
) -> list[float]:
    """Give the student a short supervised warm-up on right answers to few problems, and save it in `output`.

    Returns the cross-entropy of every step in nats. Seconds on one thread.
    """
    random = np.random.default_rng(seed)
    few = random.permutation(problems("train"))[:STUDENT_EXAMPLES]

    def loss(model: Qwen3ForCausalLM) -> Tensor:
        tokens = right_answers(random, few[random.integers(0, len(few), 32)], RailwayTask.max_response_tokens)
        logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, PROMPT:].flatten(), ignore_index=PAD_ID)

    return _fit(student_config(), loss, output, steps, seed, "student", progress, decay=False)


def _fit(
    config: Qwen3Config,
    loss_of: Callable[[Qwen3ForCausalLM], Tensor],
    output: str | os.PathLike[str],
    steps: int,
    seed: int,
    name: str,
    progress: bool,
    decay: bool,
) -> list[float]:
    """AdamW at 3e-3 with 50 steps of warm-up, then constant or linearly down to zero; saves bf16 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 50) * (1.0 - i / steps if decay else 1.0)
    )
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, disable=not progress) as bar:
        shown = bar.add_task(name, total=steps, loss=float("nan"))
        for _ in range(steps):
            loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.item())
            bar.update(shown, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
    save_model(model.to(torch.bfloat16), Path(output))
    return losses
