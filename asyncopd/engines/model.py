"""What the engines need to know of a causal language model: its trunk and its head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Head:
    """The arguments that every `linear_*` op takes beside the hidden states."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        output: Any = model.get_output_embeddings()
        config = model.config
        return cls(
            output.weight,
            getattr(output, "bias", None),
            float(getattr(config, "logit_scale", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
        )

    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [C, H] -> [C, V] for a decoder, which samples from it; temperature not applied."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def trunk(model: PreTrainedModel) -> Any:
    """The model without its head; called it returns `last_hidden_state`."""
    return model.base_model
