"""Training from scratch: the teacher on broken prefixes, the student's short supervised warm-up on right answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncopd.task.batches import Batch, make_batch, soft_cross_entropy
from asyncopd.task.models import student_config, teacher_config
from asyncopd.task.routes import RouteTask
from asyncopd.task.sampling import accuracy


def _fresh(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """Random weights by seed, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _fit(
    model: Qwen3ForCausalLM,
    next_batch: Callable[[], Batch],
    *,
    steps: int,
    learning_rate: float,
    name: str,
    progress: bool,
) -> list[float]:
    """AdamW with 100 steps of warm-up and linear decay to zero; the losses, one a step (KL to the rule, nats)."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 100) * (1.0 - i / steps)
    )
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("KL {task.fields[kl]:.4f}"),
    )
    with Progress(*columns, disable=not progress) as bar:
        shown = bar.add_task(name, total=steps, kl=float("nan"))
        for _ in range(steps):
            batch = next_batch()
            loss = soft_cross_entropy(model(batch.tokens).logits, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.item())
            bar.update(shown, advance=1, kl=sum(losses[-50:]) / len(losses[-50:]))
    return losses


def train_teacher(
    output_dir: str | os.PathLike[str],
    *,
    steps: int = 3000,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> list[float]:
    """Train the teacher from scratch and save it (bf16, Hugging Face format) in ``output_dir``.

    Returns the loss of every step: the KL from the rule in nats.
    """
    rng = np.random.default_rng(seed)
    model = _fresh(teacher_config(), seed)
    losses = _fit(
        model,
        lambda: make_batch(
            rng, batch_size, RouteTask.max_response_tokens, jump_rate=0.08, noise_rate=0.02
        ),
        steps=steps,
        learning_rate=learning_rate,
        name="teacher",
        progress=progress,
    )
    model.to(torch.bfloat16).save_pretrained(Path(output_dir))
    if progress:  # accuracy of what was saved, rounding included
        share = accuracy(model.float().eval(), problems=512)
        Console().print(f"held-out accuracy at temperature 1: {share:.1%}")
    return losses
