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
    settings = config(max_staleness=4, rollout_workers=2)
    assert settings.slot_count() >= 5 * 8 // 4 + 2
    assert config(mode="sync", max_staleness=4).slot_count() < settings.slot_count()
    spec = settings.slot_spec()
    assert (spec.max_tokens, spec.max_response_tokens) == (4 * 13, 4 * 9)


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
