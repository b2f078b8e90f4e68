"""The student and the teacher of the engine tests."""

import pytest
from tiny_models import make_model
from transformers import PreTrainedModel


@pytest.fixture
def student() -> PreTrainedModel:
    return make_model(0)


@pytest.fixture
def teacher() -> PreTrainedModel:
    return make_model(1)
