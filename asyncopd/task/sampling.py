"""A plain batched sampler, for training and for accuracy: every prompt has three tokens, so nothing is padded."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from asyncopd.task.routes import EOS_ID, FROM_ID, PAD_ID, RouteTask, Split, problem_cells


def prompts(split: Split, first: int, count: int) -> torch.Tensor:
    """Prompts [count, 3] of the problems first..first+count-1 of a split."""
    goal, start = problem_cells(split, np.arange(first, first + count, dtype=np.uint64))
    return torch.from_numpy(np.stack([goal, np.full_like(goal, FROM_ID), start], axis=1))


@torch.no_grad()
def sample_answers(
    model: Qwen3ForCausalLM, prompt_ids: torch.Tensor, seed: int, *, temperature: float = 1.0
) -> torch.Tensor:
    """Sampled answers [B, at most max_response_tokens] to prompts [B, 3], eos included, padded after it."""
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    out = torch.full((len(prompt_ids), RouteTask.max_response_tokens), PAD_ID)
    rows, tokens, past = torch.arange(len(prompt_ids)), prompt_ids, DynamicCache(config=model.config)
    for t in range(RouteTask.max_response_tokens):
        logits = model(tokens, past_key_values=past, logits_to_keep=1).logits[:, -1].float()
        token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        out[rows, t] = token[:, 0]
        going = (token[:, 0] != EOS_ID).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # drop the finished rows from the cache
            past.batch_select_indices(going)
        rows, tokens = rows[going], token[going]
    return out


def accuracy(model: Qwen3ForCausalLM, *, problems: int = 256, seed: int = 0, temperature: float = 1.0) -> float:
    """Share of the first ``problems`` held-out problems that one sampled answer each gets right."""
    task, prompt_ids = RouteTask(), prompts("heldout", 0, problems)
    answers = sample_answers(model, prompt_ids, seed, temperature=temperature)
    right = 0
    for prompt, answer in zip(prompt_ids.tolist(), answers.tolist(), strict=True):
        end = answer.index(EOS_ID) + 1 if EOS_ID in answer else len(answer)
        right += task.check(prompt, answer[:end])
    return right / problems
