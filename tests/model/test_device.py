"""The environment variable that chooses the device."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

COMMAND = "import sys; from dsmr_mlx.cli import main; sys.exit(main(['models']))"


@pytest.mark.parametrize(
    ("name", "code", "shown"),
    [
        ("cpu", 0, ""),
        ("", 0, ""),
        ("tpu", 2, "DSMR_DEVICE tpu: expected cpu or gpu"),
        pytest.param(
            "gpu",
            2,
            "DSMR_DEVICE gpu: MLX has no GPU here",
            marks=pytest.mark.skipif(mx.default_device().type == mx.DeviceType.gpu, reason="there is a GPU"),
        ),
    ],
)
def test_the_environment_chooses_the_device(name, code, shown):
    environment = os.environ | {"DSMR_DEVICE": name}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert shown in done.stderr
    assert "Traceback" not in done.stderr
