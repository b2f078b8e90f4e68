"""Model folders in Hugging Face format: local, safetensors, never remote code, never a pickle, no progress bars."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging


def load_model(path: Path) -> PreTrainedModel:
    """The causal language model in a local folder, in fp32; FileNotFoundError if there is none."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there, expected a Hugging Face model folder")
    _silence()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def save_model(model: PreTrainedModel, path: Path) -> None:
    _silence()
    model.save_pretrained(path)


def _silence() -> None:
    # Bars for files of a few megabytes; and their locks are semaphores that a killed worker would leave behind.
    logging.disable_progress_bar()
