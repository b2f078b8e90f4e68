"""A tiny random model, and slots filled by decoding with it."""

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from asyncopd.engines.decode import Decoder
from asyncopd.pipeline.protocols import Rollout, RolloutRequest
from asyncopd.pipeline.slots import SlotArena, SlotSpec, SlotView

VOCAB, EOS = 61, 1


def make_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=2,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # the library's initial weights give almost uniform distributions
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def make_decoder(model: PreTrainedModel, **options: object) -> Decoder:
    defaults: dict[str, object] = {
        "places": 4,
        "max_prompt_tokens": 5,
        "max_response_tokens": 12,
        "eos_token_id": EOS,
        "draw": "head_tail",
        "num_scores": 8,
        "head": 3,
        "temperature": 1.0,
        "seed": 3,
    }
    return Decoder(model, **{**defaults, **options})  # type: ignore[arg-type]


def requests(count: int) -> list[RolloutRequest]:
    """Prompts of 1 to 5 tokens."""
    return [
        RolloutRequest(uid, [(7 * uid + 3 * i) % (VOCAB - 3) + 3 for i in range(1 + uid % 5)]) for uid in range(count)
    ]


def drain(decoder: Decoder, todo: list[RolloutRequest]) -> dict[int, Rollout]:
    decoder.submit(todo)
    finished: dict[int, Rollout] = {}
    while decoder.active():
        finished.update({rollout.uid: rollout for rollout in decoder.step()})
    return finished


def fill_slot(rollouts: list[Rollout], num_scores: int) -> SlotView:
    slot = SlotArena(SlotSpec(1, len(rollouts), 1000, 1000, num_scores)).slot(0)
    for rollout in rollouts:
        assert slot.append(rollout)
    return slot


def reference_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """log softmax [L, V] of the distributions that wrote each response token, one plain forward over the sequence."""
    sequence = torch.tensor([rollout.prompt_ids + rollout.response_ids.tolist()])
    logits = model(sequence).logits[0, len(rollout.prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(dim=-1)
