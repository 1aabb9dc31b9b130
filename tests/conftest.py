"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def asap_dir() -> Path:
    """The ASAP performances (DSMR_ASAP, or ../shared/data/asap). Without them a test is skipped, on CI it fails."""
    default = Path(__file__).parents[2] / "shared" / "data" / "asap"
    folder = Path(os.environ.get("DSMR_ASAP", default))
    if (folder / "metadata.csv").is_file():
        return folder
    reason = f"no ASAP data set at {folder} (set DSMR_ASAP)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
