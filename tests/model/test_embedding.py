"""The gradient of an embedding: that of a look-up, in any number of pieces."""

import mlx.core as mx
import numpy as np
import pytest

from dsmr_mlx.model import embedding
from dsmr_mlx.model.embedding import Embedding


@pytest.mark.parametrize("entries", [1 << 26, 70, 1], ids=["at once", "in pieces", "row by row"])
def test_the_gradient_is_that_of_a_look_up(entries, monkeypatch):
    """Each id's rows are added, also if it comes several times; the reference adds them in float64."""
    monkeypatch.setattr(embedding, "MAX_ONE_HOT", entries)
    rng = np.random.default_rng(0)
    ids, weight, wanted = rng.integers(0, 7, (3, 11)), rng.normal(size=(7, 5)), rng.normal(size=(3, 11, 5))
    layer = Embedding(7, 5)
    layer.weight = mx.array(weight, mx.float32)

    def loss(weight):
        layer.weight = weight
        return (layer(mx.array(ids)) * mx.array(wanted, mx.float32)).sum()

    gradient = mx.grad(loss)(layer.weight)
    expected = np.zeros((7, 5))
    np.add.at(expected, ids.ravel(), wanted.reshape(-1, 5))
    assert np.abs(np.array(gradient) - expected).max() < 1e-5


def test_no_gradient_depends_on_the_order_of_additions():
    """The compiled or eager gradient has no scatter, the only operation of a training step whose order is not fixed."""
    import io

    layer = Embedding(7, 4)
    ids = mx.array([[1, 2, 1]])
    graph = io.StringIO()
    mx.export_to_dot(graph, mx.grad(lambda weight: embedding.look_up(weight, ids).sum())(layer.weight))
    assert "Matmul" in graph.getvalue()
    assert "Scatter" not in graph.getvalue()
