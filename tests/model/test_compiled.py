"""Compiled functions, and what happens if they cannot be compiled."""

import mlx.core as mx
import pytest

from dsmr_mlx.model.compiled import Compiled


def failing(function, **options):
    """In place of `mx.compile`: a function whose first call fails, as with a broken Metal compiler."""

    def call(*arguments):
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    return call


def test_without_a_compiler_a_cpu_computes_eagerly(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "compile", failing)
    function = Compiled(lambda x: x + 1, compiled=True)
    assert [function(mx.array(i)).item() for i in range(2)] == [1, 2]


def test_a_gpu_does_not_hide_that_compiling_failed(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "compile", failing)
    function = Compiled(lambda x: x + 1, compiled=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Unable to build metal library"):
            function(mx.array(1))
