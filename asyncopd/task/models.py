"""The teacher and the student: small Qwen3 models, built from a config, shipped with the package, never downloaded."""

from pathlib import Path

from transformers import PreTrainedModel, Qwen3Config

from asyncopd.checkpoints import load_model
from asyncopd.task.railway import DIRECTION_ID, EOS_ID, PAD_ID, VOCAB_SIZE

ASSETS = Path(__file__).parent / "assets"


def _config(layers: int, width: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=DIRECTION_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def teacher_config() -> Qwen3Config:
    """3 layers, 128 wide."""
    return _config(layers=3, width=128, heads=4)


def student_config() -> Qwen3Config:
    """2 layers, 96 wide."""
    return _config(layers=2, width=96, heads=3)


def load_teacher() -> PreTrainedModel:
    """The shipped teacher (bf16 weights) in fp32."""
    return load_model(ASSETS / "teacher")


def load_student() -> PreTrainedModel:
    """The shipped student, after its warm-up (bf16 weights), in fp32."""
    return load_model(ASSETS / "student")
