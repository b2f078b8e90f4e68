"""A key-value cache of fixed places, the active ones always in front, so that decoding works on views."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig


class PlacesCache(Cache):
    """Keys and values [places, kv_heads, max_tokens, head_dim] of every layer.

    The decoder says before each forward where new keys go: `prefill(first, count)` for prompts from position 0, or
    `decode(positions)` for one token in each of the first places. Attention sees what `update` returns.
    """

    def __init__(self, config: PreTrainedConfig, places: int, max_tokens: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, places, heads, max_tokens, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self._first = 0
        self._positions: Tensor | None = None
        self._length = 0
        self._places = torch.arange(places)

    def prefill(self, first: int) -> None:
        """The next forward fills places from `first` on with the prompts' keys, from position 0."""
        self._first, self._positions = first, None

    def decode(self, positions: Tensor) -> int:
        """The next forward adds a key at `positions` [n] of the first n places. Returns the length attended over."""
        self._positions, self._length = positions, int(positions.max()) + 1
        return self._length

    def move(self, source: int, target: int) -> None:
        """Place `source`'s sequence takes the place `target`."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """key, value [n, kv_heads, T, head_dim] of this forward -> all that it may attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        n, length = key_states.shape[0], key_states.shape[2]
        if self._positions is None:
            keys[self._first : self._first + n, :, :length] = key_states
            values[self._first : self._first + n, :, :length] = value_states
            return key_states, value_states
        keys[self._places[:n], :, self._positions] = key_states[:, :, 0]
        values[self._places[:n], :, self._positions] = value_states[:, :, 0]
        return keys[:n, :, : self._length], values[:n, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._positions is None else self._length - 1
