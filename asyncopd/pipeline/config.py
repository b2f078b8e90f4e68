"""Configuration of a pipeline run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from asyncopd.pipeline.slots import SlotSpec


class ScheduleConfig(BaseModel):
    """How the stages are scheduled: what a user chooses.

    Raises:
        pydantic.ValidationError: an unknown key, a value out of range, a batch_size that is not a
            multiple of sequences_per_slot, or fewer num_slots than a batch needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["sync", "async"] = Field(
        "async",
        description="sync: rollout, score, train, sync weights in turn; "
        "async: the stages run freely under max_staleness",
    )
    steps: int = Field(ge=1, description="optimizer steps; they end the run")
    batch_size: int = Field(ge=1, description="sequences per optimizer step")
    sequences_per_slot: int = Field(
        ge=1, description="sequences in one slot: the teacher's batch and the learner's micro-batch"
    )
    max_staleness: int = Field(
        4,
        ge=0,
        description="most optimizer steps between the weights that wrote any token of a sequence "
        "and the weights that train on it; a hard bound",
    )
    late: Literal["wait", "refuse"] = Field(
        "wait",
        description="what the learner does before a step that would make a sequence on its way "
        "exceed max_staleness: wait for it, or go on, refuse it when it comes and roll its prompt "
        "out again (faster, but long answers are then trained on less often than they are written)",
    )
    rollout_workers: int = Field(1, ge=1, description="rollout processes")
    threads_per_worker: int = Field(1, ge=1, description="torch threads of each worker")
    num_slots: int | None = Field(
        None,
        ge=1,
        description="slots of shared memory; left out: enough that pacing, not slots, is the limit",
    )
    stall_timeout_s: float = Field(
        300.0,
        gt=0,
        description="seconds of silence from a worker that owes work until the run is ended; a rollout "
        "worker must also finish a sequence within them, or within as many decode steps as one has tokens",
    )
    startup_timeout_s: float = Field(
        600.0,
        gt=0,
        description="seconds that a worker may take to build its engine, and the learner to save at the end",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.sequences_per_slot:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of sequences_per_slot ({self.sequences_per_slot})"
            )
        # In sync mode a whole batch lies in slots before the first is scored, and each rollout
        # worker may leave one slot partly filled; one more keeps async mode moving.
        least = self.batch_size // self.sequences_per_slot + self.rollout_workers + 1
        if self.num_slots is not None and self.num_slots < least:
            raise ValueError(
                f"num_slots ({self.num_slots}) must be at least {least}: batch_size / "
                "sequences_per_slot + rollout_workers + 1"
            )
        return self


class PipelineConfig(ScheduleConfig):
    """A schedule, and the sizes of the shared memory, which follow from the task and the draw."""

    max_prompt_tokens: int = Field(ge=1, description="longest prompt, in tokens")
    max_response_tokens: int = Field(ge=1, description="longest response, in tokens")
    num_scores: int = Field(ge=1, description="entries in the support of a response token (K)")

    def slot_count(self) -> int:
        """num_slots, or a number at which pacing limits the run and slots do not."""
        if self.num_slots is not None:
            return self.num_slots
        batches = 1 if self.mode == "sync" else self.max_staleness + 1
        # Full slots of every batch on its way, and per batch one partly filled slot of each worker.
        per_batch = self.batch_size // self.sequences_per_slot + self.rollout_workers
        return batches * per_batch + self.rollout_workers + 1

    def slot_spec(self) -> SlotSpec:
        """The slot arena: every slot can hold its sequences at their longest."""
        sequence = self.max_prompt_tokens + self.max_response_tokens
        return SlotSpec(
            num_slots=self.slot_count(),
            max_sequences=self.sequences_per_slot,
            max_tokens=self.sequences_per_slot * sequence,
            max_response_tokens=self.sequences_per_slot * self.max_response_tokens,
            num_scores=self.num_scores,
        )
