"""Fixtures of the generation tests."""

import pytest
from support.recipe import RECIPE
from support.stand_ins import tiny_model


@pytest.fixture(scope="module")
def model():
    """A tiny model of random weights for the performance vocabulary."""
    return tiny_model()


@pytest.fixture(scope="module")
def recipe_model():
    """The same with all architecture settings that are off by default."""
    return tiny_model(**RECIPE)
