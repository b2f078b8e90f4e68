"""Rollouts: batched decoding in which a finished sequence's place is filled at once, never waiting for the longest."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.engines.draw import TEACHER_DRAWS, DrawName, Step, decode_draw, empty_support, token_streams
from asyncopd.engines.kv_cache import PlacesCache
from asyncopd.engines.model import Head, trunk
from asyncopd.pipeline.protocols import Rollout, RolloutRequest

Checker = Callable[[Sequence[int], Sequence[int]], bool]


class _Records:
    """What every active sequence has written, one record each; a record stays where it is when places move."""

    def __init__(self, records: int, length: int, num_scores: int) -> None:
        self.tokens = torch.zeros(records, length, dtype=torch.int32)
        self.versions = torch.zeros(records, length, dtype=torch.int32)
        self.ids, self.log_weights = empty_support(records * length, num_scores)
        self.ids = self.ids.view(records, length, num_scores)
        self.log_weights = self.log_weights.view(records, length, num_scores)
        self.free = list(range(records))

    def write(self, records: Tensor, at: Tensor, step: Step, version: int) -> None:
        """One decode step: entry i belongs to record records[i], response position at[i]."""
        self.tokens[records, at] = step.tokens.int()
        self.versions[records, at] = version
        if step.ids is not None and step.log_weights is not None:
            self.ids[records, at] = step.ids.int()
            self.log_weights[records, at] = step.log_weights


class Decoder:
    """The pipeline's `RolloutEngine` on a causal language model, at temperature T, in the model's dtype.

    Args:
        model: a transformers model with rotary or other position ids and a standard cache interface.
        places: sequences decoded at once.
        max_prompt_tokens, max_response_tokens: a response that is not over by then is cut.
        draw, num_scores, head: the support of each token; see `asyncopd.engines.draw`.
        check: says whether an answer is right, if the task can.
    Raises: ValueError for a prompt that does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        places: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        eos_token_id: int,
        draw: DrawName,
        num_scores: int,
        head: int,
        temperature: float,
        seed: int,
        check: Checker | None = None,
    ) -> None:
        self.model = model.eval()
        self.head = Head.of(model)
        self.places = places
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.eos_token_id = eos_token_id
        self.draw, self.num_scores, self.num_head = draw, num_scores, head
        self.temperature = temperature
        self.seed = seed
        self.check = check
        self.version = 0
        self._cache = PlacesCache(model.config, places, max_prompt_tokens + max_response_tokens, model.dtype)
        self._waiting: deque[RolloutRequest] = deque()
        self._records = _Records(places, max_response_tokens, num_scores)
        # The first len(self._requests) places are active; entry i of each of these belongs to place i.
        self._requests: list[RolloutRequest] = []
        self._record = torch.zeros(places, dtype=torch.int64)
        self._last_token = torch.zeros(places, dtype=torch.int64)
        self._position = torch.zeros(places, dtype=torch.int64)  # of the last token, which is not in the cache yet
        self._written = torch.zeros(places, dtype=torch.int64)  # response tokens so far
        self._uid = torch.zeros(places, dtype=torch.int64)
        self._arange = torch.arange(max_prompt_tokens + max_response_tokens)

    def active(self) -> int:
        return len(self._requests) + len(self._waiting)

    def submit(self, requests: list[RolloutRequest]) -> None:
        for request in requests:
            if not 1 <= len(request.prompt_ids) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompt of sequence {request.uid}: got {len(request.prompt_ids)} tokens, "
                    f"expected 1..{self.max_prompt_tokens} (max_prompt_tokens)"
                )
        self._waiting.extend(requests)

    def load_weights(self, named: dict[str, Tensor], version: int) -> None:
        """In flight: sequences under way go on with the new weights over the keys that the old ones wrote."""
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, value in named.items():
                parameters[name].copy_(value)
        self.version = version

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        self._fill_places()
        n = len(self._requests)
        if n == 0:
            return []
        uids, written = self._uid[:n], self._written[:n]
        streams = tuple(token_streams(self.seed, uids, written, purpose) for purpose in (0, 1))
        step = decode_draw(self._forward(n), self.draw, self.num_scores, self.num_head, self.temperature, streams)
        self._records.write(self._record[:n], written, step, self.version)
        self._last_token[:n] = step.tokens
        self._position[:n] += 1
        self._written[:n] += 1
        return self._collect(n)

    def _fill_places(self) -> None:
        """Start waiting prompts, an eighth of the places at a time: a forward costs much the same for one as for eight.

        Fewer are started once a quarter of the places is empty, so none waits for company that may not come.
        """
        free = self.places - len(self._requests)
        if free == 0 or not self._waiting:
            return
        if len(self._waiting) < self.places // 8 and free < self.places // 4:
            return
        first = len(self._requests)
        requests = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        lengths = [len(r.prompt_ids) for r in requests]
        rows = slice(first, first + len(requests))
        self._last_token[rows] = torch.tensor([r.prompt_ids[-1] for r in requests])
        self._position[rows] = torch.tensor(lengths) - 1
        self._written[rows] = 0
        self._uid[rows] = torch.tensor([r.uid for r in requests])
        self._record[rows] = torch.tensor([self._records.free.pop() for _ in requests])
        self._requests.extend(requests)
        # The last prompt token is the first decode step's input, like any other last token.
        longest = max(lengths) - 1
        if longest:
            input_ids = torch.zeros(len(requests), longest, dtype=torch.int64)
            for row, request in enumerate(requests):
                input_ids[row, : lengths[row] - 1] = torch.tensor(request.prompt_ids[:-1])
            self._cache.prefill(first)
            # Right padding: a causal mask keeps it from every real token, and decoding overwrites its keys.
            positions = self._arange[:longest]
            self._trunk(input_ids, positions.expand_as(input_ids), (positions[:, None] >= positions)[None, None])

    def _forward(self, n: int) -> Tensor:
        """Logits [n, V] after each active sequence's last token."""
        position = self._position[:n]
        length = self._cache.decode(position)
        mask = self._arange[:length] <= position[:, None]
        hidden = self._trunk(self._last_token[:n, None], position[:, None], mask[:, None, None])
        return self.head.logits(hidden[:, 0])

    def _trunk(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask.expand(input_ids.shape[0], 1, -1, -1)
        return trunk(self.model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _collect(self, n: int) -> list[Rollout]:
        """Take out the sequences that ended, and move the last ones into their places."""
        over = (self._last_token[:n] == self.eos_token_id) | (self._written[:n] == self.max_response_tokens)
        finished = []
        for place in reversed(over.nonzero().flatten().tolist()):
            finished.append(self._finish(place))
            last = len(self._requests) - 1
            if place != last:
                self._cache.move(last, place)
                for state in (self._last_token, self._position, self._written, self._uid, self._record):
                    state[place] = state[last]
                self._requests[place] = self._requests[last]
            self._requests.pop()
        return finished

    def _finish(self, place: int) -> Rollout:
        request, record, length = self._requests[place], int(self._record[place]), int(self._written[place])
        # Copies: the record is written again as soon as it is free.
        response = self._records.tokens[record, :length].clone()
        teacher_draws = self.draw in TEACHER_DRAWS
        self._records.free.append(record)
        return Rollout(
            uid=request.uid,
            prompt_ids=request.prompt_ids,
            response_ids=response,
            versions=self._records.versions[record, :length].clone(),
            ids=None if teacher_draws else self._records.ids[record, :length].clone(),
            log_weights=None if teacher_draws else self._records.log_weights[record, :length].clone(),
            correct=None if self.check is None else self.check(request.prompt_ids, response.tolist()),
        )
