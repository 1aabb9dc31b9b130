"""Fixtures of the generation tests."""

import pytest
from support.recipe import RECIPE
from support.stand_ins import tiny_model

from dsmr_mlx.tokenizers.performance import FILL, PLAY


@pytest.fixture(scope="module")
def model():
    """A tiny model of random weights for the performance vocabulary."""
    return tiny_model()


@pytest.fixture(scope="module")
def recipe_model():
    """The same with all architecture settings that are off by default."""
    return tiny_model(**RECIPE)


@pytest.fixture(scope="module")
def knowing():
    """A tiny model of random weights that counts as trained with gaps."""
    return tiny_model(fill=0.5, never_predicted=[FILL, PLAY])
