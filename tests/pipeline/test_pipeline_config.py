"""The configuration refuses what could not run."""

from __future__ import annotations

import pytest
from pipeline_fakes import config
from pydantic import ValidationError

from asyncopd.pipeline import PipelineConfig, run_pipeline


def test_batch_must_be_a_multiple_of_the_slot() -> None:
    with pytest.raises(ValidationError, match="must be a multiple of sequences_per_slot"):
        config(batch_size=6)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_stalenes\n"):
        config(max_stalenes=1)


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValidationError, match="must be at least 5"):
        config(num_slots=4, rollout_workers=2)
    assert config(num_slots=5, rollout_workers=2).slot_count() == 5


def test_every_field_is_described() -> None:
    assert all(field.description for field in PipelineConfig.model_fields.values())


def test_derived_slots_hold_everything_that_pacing_admits() -> None:
    """Sequences that nobody consumes yet, with a slot left to fill for each worker and one to spare.

    Each of the eta + 1 batches may have come in full slots and one partly filled one of each worker.
    """
    for eta in range(5):
        for workers in (1, 2, 3):
            settings = config(max_staleness=eta, rollout_workers=workers)
            taken = (eta + 1) * (8 // 4 + workers)
            assert settings.slot_count() == taken + workers + 1
            in_turn = config(mode="sync", max_staleness=eta, rollout_workers=workers)
            assert in_turn.slot_count() == 8 // 4 + workers + workers + 1  # one batch, whatever eta


def test_slot_holds_its_sequences_at_their_longest() -> None:
    spec = config().slot_spec()
    assert (spec.max_sequences, spec.max_tokens, spec.max_response_tokens) == (4, 4 * 13, 4 * 9)


def test_factory_that_does_not_pickle_is_named() -> None:
    from asyncopd.pipeline import WorkerError

    def unpicklable() -> None: ...

    with pytest.raises(WorkerError, match="'rollout-0' cannot start, its factory does not pickle"):
        run_pipeline(
            config(),
            rollout=unpicklable,  # type: ignore[arg-type]
            teacher=unpicklable,  # type: ignore[arg-type]
            learner=unpicklable,  # type: ignore[arg-type]
            prompts=[],
        )
