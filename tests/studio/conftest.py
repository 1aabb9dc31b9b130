"""Fixtures that several test files share."""

import pytest
from support.studio_models import tiny_models
from support.studio_server import Running


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, loaded once."""
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(tmp_path, models):
    """A server with an empty session."""
    running = Running(tmp_path, models)
    with running.http:
        yield running
    assert running.unexpected == []
