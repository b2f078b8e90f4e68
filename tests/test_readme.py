"""The README's example runs as it stands, and the page tells the truth about itself."""

import re
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text()


def tiny_model(width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def test_example_of_the_loss_runs_and_trains() -> None:
    (example,) = re.findall(r"```python\n(import asyncopd.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 8
    torch.manual_seed(0)
    student, teacher = tiny_model(32), tiny_model(48)
    input_ids = torch.randint(0, 128, (2, 9))
    labels = input_ids.clone()
    labels[:, :4] = -100
    scope = {"student": student, "teacher": teacher, "input_ids": input_ids, "labels": labels}
    exec(example, scope)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.lm_head.parameters())


def test_page_is_short_and_names_what_exists() -> None:
    assert len(README.splitlines()) < 130
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:asyncopd|csrc|kernels|tests)/[a-z/_]*)`", README):
        assert (root / name).exists(), name
