"""The teacher and the student: small Qwen3 models, built from a config, never downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncopd.task.routes import EOS_ID, FROM_ID, PAD_ID, VOCAB_SIZE

ASSETS = Path(__file__).parent / "assets"


def _config(layers: int, width: int, mlp: int, heads: int, kv_heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=FROM_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
    )


def teacher_config() -> Qwen3Config:
    """3 layers, 128 wide."""
    return _config(3, 128, 384, 4, 2)


def student_config() -> Qwen3Config:
    """2 layers, 64 wide."""
    return _config(2, 64, 192, 2, 2)
