import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.dense_reference import dense_logits
from support.memory import active_memory
from support.music import random_notes
from support.recipe import RECIPE, randomized
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.gaps import with_gaps
from dsmr_mlx.evaluation import piece_losses
from dsmr_mlx.model.dropout import dropout
from dsmr_mlx.training.trainer import Compiled, NotFinite, Trainer, under


def flat(tree) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def assert_same(a, b) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def steps(trainer: Trainer, n: int) -> list[float]:
    losses = []
    while len(losses) < n:
        if record := trainer.train_segment():
            losses.append(record.loss)
    return losses


def randomly_initialized(trainer: Trainer) -> Trainer:
    """Give a new trainer weights with which each setting matters from the start."""
    trainer.start_from(dict(tree_flatten(randomized(trainer.model).parameters())))
    return trainer


@pytest.mark.parametrize("options", [{}, RECIPE, {"fill": 1.0, "seed": 8}])
def test_gradients_of_a_piece_equal_the_dense_reference(tmp_path, options):
    """Summed over the segments of a piece, with the keys and values before each segment held constant.

    What a gap shows weighs nothing, even where a whole segment is shown.
    """
    corpus = write_corpus(tmp_path / "corpus", train=1, notes=60 if "fill" in options else 10)
    S = 8
    config = tiny_config(batch_size=1, accumulate=10**6, segment_length=S, **options)
    trainer = randomly_initialized(Trainer(config, corpus))
    ids = with_gaps(TOKENIZER, corpus.tokens(trainer.pieces[0]), config.fill, config.seed, 0, 0).astype(np.int32)
    shown = TOKENIZER.shown_mask(ids)
    assert any(shown[i : i + S].all() for i in range(1, len(ids), S)) == ("fill" in options)
    n_segments = -(-(len(ids) - 1) // S)
    for _ in range(n_segments):
        trainer.train_segment()
    model = trainer.evaluation_model()

    def segment_loss(model, start):
        end = min(start + S, len(ids) - 1)
        logits = dense_logits(model, ids[None, :end], constant_before=start)[:, start:]
        nats = nn.losses.cross_entropy(logits, mx.array(ids[None, start + 1 : end + 1]))
        return (nats * mx.array(~shown[start + 1 : end + 1])).sum()

    total, expected = 0.0, None
    for start in range(0, len(ids) - 1, S):
        loss, grads = nn.value_and_grad(model, segment_loss)(model, start)
        grads = flat(grads)
        expected = grads if expected is None else {k: expected[k] + g for k, g in grads.items()}
        total += loss.item()
    assert trainer.progress.pending_loss == pytest.approx(total, rel=1e-5)
    assert trainer.progress.pending_tokens == len(ids) - 1 - shown.sum()
    for name, gradient in flat(trainer.gradients).items():
        np.testing.assert_allclose(gradient, expected[name], atol=2e-4, rtol=1e-3, err_msg=name)


def test_accumulated_segments_equal_the_sum_of_their_gradients(tmp_path):
    """Loss and norm of two segments are those of the summed gradients divided by all tokens."""
    corpus = write_corpus(tmp_path / "corpus")
    accumulated = Trainer(tiny_config(accumulate=2), corpus)
    reference = Trainer(tiny_config(accumulate=10**6), corpus)
    assert accumulated.train_segment() is None
    record = accumulated.train_segment()
    reference.train_segment()
    reference.train_segment()
    assert record.loss == reference.progress.pending_loss / reference.progress.pending_tokens
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in flat(reference.gradients).values()))
    assert record.gradient_norm == pytest.approx(norm / reference.progress.pending_tokens, rel=1e-5)
    assert record.tokens == reference.progress.pending_tokens
    assert accumulated.gradients is None


@pytest.mark.slow
def test_a_tiny_model_overfits_one_piece(tmp_path):
    with CorpusWriter(tmp_path / "corpus", TOKENIZER) as writer:
        notes = random_notes(0, 40)
        writer.add(TOKENIZER.encode_notes(notes), source="a.mid", split="train", duration=notes.duration, notes=40)
        writer.commit({})
    config = tiny_config(
        d_model=64, head_dim=32, d_ff=128, segment_length=64, batch_size=1, learning_rate=1e-2, max_steps=120
    )
    trainer = Trainer(config, Corpus.load(tmp_path / "corpus"))
    steps(trainer, 120)
    (piece,) = trainer.pieces
    (losses,) = piece_losses(trainer.evaluation_model(), [trainer.corpus.tokens(piece)])
    assert np.exp(losses.mean()) < 1.5


def test_the_seed_determines_the_run(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    runs = [Trainer(tiny_config(seed=seed, dropout=0.1), corpus) for seed in (1, 1, 2)]
    losses = [steps(run, 4) for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert_same(runs[0].parameters, runs[1].parameters)


def test_dropout_applies_in_training_only(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    trainer = Trainer(tiny_config(dropout=0.5), corpus)
    first = trainer.validate()
    assert first == trainer.validate()
    without = Trainer(tiny_config(), corpus)
    assert first == without.validate()
    assert trainer._add_gradients(next(trainer.lanes)) != without._add_gradients(next(without.lanes))


def test_dropout_drops_the_given_fraction_and_keeps_the_mean():
    x = mx.ones((3, 200, 50))
    keys = mx.array([[0, 1], [0, 2], [0, 1]], mx.uint32)
    y = np.array(dropout(x, 0.3, keys))
    assert (y[0] == y[2]).all()
    assert (y[0] != y[1]).any()
    assert set(np.unique(y)) == {0, np.float32(1 / 0.7)}
    # 20,000 independent draws: the share's standard deviation is 0.0023
    assert abs((y[:2] == 0).mean() - 0.3) < 6 * 0.0023
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, keys) is x


@pytest.mark.parametrize("options", [{}, {"batch_size": 1, "n_heads": 1}, RECIPE])
def test_the_memory_is_updated_in_place(tmp_path, options):
    """The arrays of all layers keep their addresses, because nothing else references them."""
    corpus = write_corpus(tmp_path / "corpus", notes=200)
    trainer = Trainer(tiny_config(horizons="custom:40,4", **options), corpus)

    def addresses() -> list[int]:
        mx.synchronize()
        return [np.array(array, copy=False).__array_interface__["data"][0] for array in trainer.state.arrays]

    trainer.train_segment()
    first = addresses()
    for _ in range(8):
        trainer.train_segment()
        assert addresses() == first


def test_a_referenced_memory_does_not_change(tmp_path):
    """Also while pieces end and start."""
    trainer = Trainer(tiny_config(), write_corpus(tmp_path / "corpus"))
    trainer.train_segment()
    held = trainer.state
    position, keys = held.position.copy(), np.array(held.layers[0]["keys"])
    for _ in range(20):
        trainer.train_segment()
    np.testing.assert_array_equal(held.position, position)
    np.testing.assert_array_equal(np.array(held.layers[0]["keys"]), keys)


def test_a_trainer_continues_after_an_interrupted_segment(tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(), write_corpus(tmp_path / "corpus"))
    trainer.train_segment()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_accumulate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.train_segment()
    assert not trainer.state.position.any()
    assert np.isfinite(trainer.train_segment().loss)


def test_loading_a_state_drops_accumulated_gradients(tmp_path):
    corpus, config = write_corpus(tmp_path / "corpus"), tiny_config(accumulate=2)
    saved = Trainer(config, corpus)
    weights = {name: mx.array(array) for name, array in tree_flatten(saved.parameters)}
    state = saved.state_dict()
    other = Trainer(config, corpus)
    other.train_segment()
    other.load_state_dict(weights, *state)
    losses = [[t.train_segment() or t.train_segment() for _ in range(3)] for t in (saved, other)]
    assert [r.loss for r in losses[0]] == [r.loss for r in losses[1]]


def test_both_attention_implementations_give_the_same_losses(tmp_path, monkeypatch):
    """The one of this package and MLX's fused one, which is used where it has a kernel for the gradient."""
    corpus = write_corpus(tmp_path / "corpus", notes=60)
    losses = []
    for fused in (False, True):
        monkeypatch.setattr("dsmr_mlx.training.trainer.is_fused", lambda *_, fused=fused: fused)
        losses.append(steps(Trainer(tiny_config(n_heads=4, n_kv_heads=2), corpus), 12))
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_clipping_bounds_the_update(tmp_path):
    """After a clipped gradient the first moment is m = (1 − β1)·g, of norm (1 − β1)·clip."""
    corpus = write_corpus(tmp_path / "corpus")
    trainer = Trainer(tiny_config(clip_norm=1e-3), corpus)
    (_,) = steps(trainer, 1)
    moments = [v for k, v in flat(trainer.optimizer_state).items() if k.endswith(".m")]
    norm = np.sqrt(sum((m.astype(np.float64) ** 2).sum() for m in moments))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_does_not_change_the_weights(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    trainer = Trainer(tiny_config(), corpus)
    steps(trainer, 2)
    trainer.parameters["norm"]["weight"] = trainer.parameters["norm"]["weight"] * mx.nan
    before = flat(trainer.parameters)
    with pytest.raises(NotFinite, match="step 3: loss nan"):
        steps(trainer, 1)
    after = flat(trainer.parameters)
    assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)
    assert trainer.progress.step == 2


@pytest.mark.parametrize("options", [{}, RECIPE])
def test_bfloat16_training_keeps_float32_weights(tmp_path, options):
    corpus = write_corpus(tmp_path / "corpus")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(tiny_config(dtype=dtype, **options), corpus)
        losses[dtype] = steps(trainer, 8)
        assert trainer.state.dtype == getattr(mx, dtype)
        assert all(a.dtype == np.float32 for a in flat(trainer.parameters).values())
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)


@pytest.mark.slow
@pytest.mark.usefixtures("compilation")
def test_compiled_equals_eager(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    losses = []
    for compiled in (True, False):
        trainer = Trainer(tiny_config(compile=compiled, ema_decay=0.5, accumulate=2, dropout=0.2, **RECIPE), corpus)
        losses.append(steps(trainer, 6))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"accumulate": 1}, {"accumulate": 3}, RECIPE | {"accumulate": 3}], ids=str)
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_a_restored_trainer_is_bitwise(tmp_path, options, stop):
    """The state is saved after `stop` segments, within a piece or an accumulation, and loaded by another trainer."""
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_config(dropout=0.1, **options)
    straight = Trainer(config, corpus)
    for _ in range(stop):
        straight.train_segment()
    path = str(tmp_path / "state.safetensors")
    arrays, memory, values = straight.state_dict()
    parts = {"weights": dict(tree_flatten(straight.parameters)), "arrays": arrays, "memory": memory}
    mx.save_safetensors(path, {f"{part}.{k}": v for part, named in parts.items() for k, v in named.items()})
    expected = steps(straight, 6)

    restored = Trainer(config, corpus)
    loaded = mx.load(path)
    restored.load_state_dict(*(under(f"{part}.", loaded) for part in parts), values)
    assert steps(restored, 6) == expected
    assert_same(restored.parameters, straight.parameters)
    assert_same(restored.optimizer_state, straight.optimizer_state)
    assert_same(restored.state.to_arrays(), straight.state.to_arrays())


@pytest.mark.parametrize("options", [{}, RECIPE])
def test_gradient_checkpointing_does_not_change_gradients(tmp_path, options):
    corpus = write_corpus(tmp_path / "corpus")
    gradients = []
    for recompute in (False, True):
        config = tiny_config(gradient_checkpointing=recompute, accumulate=10**6, dropout=0.3, **options)
        trainer = randomly_initialized(Trainer(config, corpus))
        for _ in range(3):
            trainer.train_segment()
        gradients.append(flat(trainer.gradients))
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", notes=200)
    peaks = []
    for recompute in (False, True):
        config = tiny_config(
            n_layers=8, d_ff=256, segment_length=128, horizons="none", gradient_checkpointing=recompute
        )
        trainer = Trainer(config, corpus)
        trainer.train_segment()
        mx.synchronize()
        before = active_memory()
        mx.reset_peak_memory()
        trainer.train_segment()
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.7 * peaks[0]


def test_the_average_of_the_weights_is_evaluated(tmp_path):
    """Equal to the average written out, with its warm-up: d = min(decay, (1 + t) / (10 + t))."""
    corpus = write_corpus(tmp_path / "corpus")
    trainer = Trainer(tiny_config(ema_decay=0.5), corpus)
    expected = {k: v.astype(np.float64) for k, v in flat(trainer.parameters).items()}
    for t in range(8):
        steps(trainer, 1)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in flat(trainer.parameters).items()}
    for name, value in flat(trainer.evaluation_model().parameters()).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=1e-4, err_msg=name)
    assert not np.array_equal(flat(trainer.parameters)["embed.weight"], np.array(trainer.model.embed.weight))


def test_augmentation_differs_by_epoch(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", train=1)
    trainer = Trainer(tiny_config(augment_transpose=6, augment_velocity=20), corpus)
    (piece,) = trainer.pieces
    epochs = [trainer._load(epoch, 0) for epoch in range(8)]
    assert len({ids.tobytes() for ids in epochs}) > 4
    assert (trainer._load(3, 0) == epochs[3]).all()
    assert (Trainer(tiny_config(), corpus)._load(3, 0) == corpus.tokens(piece)).all()


@pytest.mark.parametrize("reason", ["Failed to compile function", "Could not load C++ shared library", "filesystem"])
def test_a_failing_compiler_falls_back_to_eager(tmp_path, monkeypatch, reason):
    corpus = write_corpus(tmp_path / "corpus")
    expected = steps(Trainer(tiny_config(compile=False), corpus), 4)

    def broken(function):
        def call(*inputs):
            raise RuntimeError(reason)

        return call

    monkeypatch.setattr(mx, "compile", broken)
    assert steps(Trainer(tiny_config(compile=True), corpus), 4) == expected


@pytest.mark.parametrize("compile", [False, True])
def test_weights_that_were_evaluated_are_released_by_the_next_segment(tmp_path, compile):
    """In a compiled run, too, the model does not keep them alive beside the newer ones."""
    trainer = Trainer(tiny_config(compile=compile), write_corpus(tmp_path / "corpus"))
    steps(trainer, 1)
    weights = dict(tree_flatten(trainer.evaluation_model().parameters()))
    trainer.train_segment()
    left = dict(tree_flatten(trainer.model.parameters()))
    assert not any(left[name] is array for name, array in weights.items())


def test_other_failures_of_a_compiled_function_are_raised(tmp_path):
    trainer = Trainer(tiny_config(compile=True), write_corpus(tmp_path / "corpus"))
    steps(trainer, 1)

    def broken(*inputs):
        raise RuntimeError("[malloc] out of memory")

    trainer._accumulate.compiled = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train_segment()


def test_memory_limits_are_set(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    before = mx.set_cache_limit(0)
    try:
        Trainer(tiny_config(cache_limit_mb=77), corpus)
        assert mx.set_cache_limit(0) == 77 << 20
    finally:
        mx.set_cache_limit(before)


def test_more_wired_memory_than_the_gpu_may_use_is_refused(tmp_path, monkeypatch):
    def refuse(size):
        raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")

    def device_info(device=mx.cpu):  # a run on the CPU may set the limit, too
        return {"max_recommended_working_set_size": 1000 << 20} if device == mx.gpu else {}

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    monkeypatch.setattr(mx, "device_info", device_info)
    with pytest.raises(UserError, match="`wired_limit_mb` 99999: expected at most 1000 "):
        Trainer(tiny_config(wired_limit_mb=99999), write_corpus(tmp_path / "corpus"))


@pytest.mark.usefixtures("compilation")
def test_the_number_of_compiled_graphs_does_not_grow(tmp_path):
    """There is about one graph per set of layers whose memory is full in every lane."""
    corpus = write_corpus(tmp_path / "corpus", notes=60)
    trainer = Trainer(tiny_config(compile=True, horizons="custom:40,4", batch_size=2), corpus)
    traced, function = 0, trainer._accumulate.function

    def counted(*inputs):
        nonlocal traced
        traced += 1
        return function(*inputs)

    trainer._accumulate = Compiled(counted, compiled=True)
    steps(trainer, 60)
    after_60 = traced
    steps(trainer, 100)
    assert 1 < after_60 == traced <= 5
    assert trainer.progress.tokens > 10 * 40
