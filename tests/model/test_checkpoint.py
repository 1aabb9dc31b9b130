"""Checkpoints: round trip, verification, and crash safety."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from support.performance_reference import first_violation
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx import DSMR, UserError
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.generation.generate import generate_variations
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint import load, resolve
from dsmr_mlx.model.checkpoint_folder import (
    PARTS,
    CheckpointStore,
    checkpoint_name,
    order,
    verify_checkpoint,
    write_checkpoint,
)


def save(folder, seed: int = 0) -> DSMR:
    mx.random.seed(seed)
    model = DSMR(tiny_config().model_config(TOKENIZER))
    checkpoint.save_model(folder, model.config, model.parameters(), TOKENIZER)
    return model


def store_one(run, name: str = "step-00000010", **options):
    return CheckpointStore(run, keep_last=2).save(name, lambda folder: save(folder, **options) and None)


def test_save_and_load_round_trip(tmp_path):
    model = save(tmp_path / "c")
    loaded, tokenizer = load(tmp_path / "c")
    assert loaded.config == model.config
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert not loaded.training
    for (name, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(loaded.parameters()), strict=True):
        assert mx.array_equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("options", [{}, {"max_positions": 300, "norm": "layer", "tie_embeddings": False}])
def test_half_precision_weights_in_evaluation_and_generation(tmp_path, dtype, options):
    """Close to the same weights in float32: the arithmetic has 8 or 11 significant bits, hence the tolerance."""
    exact = DSMR(tiny_config(**options).model_config(TOKENIZER))
    exact.update(tree_map(lambda p: p.astype(dtype).astype(mx.float32), exact.parameters()))
    checkpoint.save_model(
        tmp_path / "c", exact.config, tree_map(lambda p: p.astype(dtype), exact.parameters()), TOKENIZER
    )
    model, tokenizer = load(tmp_path / "c", as_stored=True)
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {dtype}
    logits, state = model(mx.array(np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (2, 30))))
    assert (logits.dtype, state.dtype) == (mx.float32, dtype)
    assert all(array.dtype == dtype for array in state.arrays)
    assert model.n_parameters == exact.n_parameters
    corpus = write_corpus(tmp_path / "corpus", train=1, validation=1, notes=8)
    assert evaluate(model, corpus).nats_per_token == pytest.approx(evaluate(exact, corpus).nats_per_token, rel=5e-3)
    report = generate_variations(model, tokenizer, 2, tokens=12)
    assert all(first_violation(variation.ids) is None for variation in report.variations)
    assert report.state_bytes == exact.new_state(2, rewindable=True).nbytes // 2


def test_weight_bytes_is_the_size_of_the_file(tmp_path):
    path = store_one(tmp_path)
    size = (path / "model.safetensors").stat().st_size
    assert checkpoint.weight_bytes(path) == checkpoint.weight_bytes(tmp_path) == size
    assert 4 * load(path)[0].n_parameters < size < 4 * load(path)[0].n_parameters + 10_000
    with pytest.raises(UserError, match="gone: no such folder"):
        checkpoint.weight_bytes(tmp_path / "gone")


def test_loaded_model_is_independent_of_the_file(tmp_path):
    save(tmp_path / "c", seed=1)
    loaded, _ = load(tmp_path / "c")
    before = np.array(loaded.embed.weight)
    save(tmp_path / "c", seed=2)
    np.testing.assert_array_equal(np.array(loaded.embed.weight), before)


def test_run_resolves_to_its_best_else_its_last_checkpoint(tmp_path):
    path = store_one(tmp_path)
    assert resolve(tmp_path) == tmp_path / "last"
    CheckpointStore(tmp_path, 2).point("best", path)
    assert resolve(tmp_path) == tmp_path / "best"
    assert resolve(path) == path


def test_a_run_whose_best_checkpoint_was_deleted_resolves_to_its_last(tmp_path):
    path = store_one(tmp_path)
    store_one(tmp_path, "step-00000020")
    CheckpointStore(tmp_path, 2).point("best", path)
    shutil.rmtree(path)
    assert resolve(tmp_path) == tmp_path / "last"


def test_damaged_best_checkpoint_is_an_error(tmp_path):
    path = store_one(tmp_path)
    CheckpointStore(tmp_path, 2).point("best", path)
    store_one(tmp_path, "step-00000020")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"best: not a complete checkpoint, config\.json missing"):
        load(tmp_path)


def test_a_moved_or_copied_run_still_works(tmp_path):
    store_one(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    load(tmp_path / "moved")
    load(tmp_path / "copy")


@pytest.mark.parametrize("part", PARTS)
def test_missing_parts_are_named(tmp_path, part):
    save(tmp_path / "c")
    (tmp_path / "c" / part).unlink()
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        load(tmp_path / "c")


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        load(tmp_path / "gone")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_checksums_detect_damage(tmp_path, name, damage):
    path = store_one(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) - 1] if damage == "truncate" else data)
    with pytest.raises(UserError, match=rf"{path.name}: damaged, {'bytes' if damage == 'truncate' else 'sha256'} is"):
        load(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_damage_without_checksums(tmp_path, cut):
    save(tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"model\.safetensors: (cannot be read|truncated)"):
        load(tmp_path / "c")


def test_weights_of_another_configuration(tmp_path):
    save(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_ff": 99}))
    with pytest.raises(UserError, match=r"model\.safetensors: .* has shape .*, expected .* as in config\.json"):
        load(tmp_path / "c")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 7, "never_predicted": []}))
    with pytest.raises(UserError, match="393 tokens, the model 7"):
        load(tmp_path / "c")


def test_interrupted_save_keeps_the_old_checkpoint_only(tmp_path):
    first = store_one(tmp_path)

    def fail(folder):
        save(folder)
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, 2)
    with pytest.raises(OSError, match="No space"):
        store.save("step-00000020", fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert store.latest() == first
    load(tmp_path)


@pytest.mark.parametrize(
    "name", ["step-00000030.incomplete", ".step-00000030.0f.incomplete", ".step-00000030.0f.replaced"]
)
def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path, name):
    first = store_one(tmp_path)
    leftover = tmp_path / "checkpoints" / name
    save(leftover)
    store = CheckpointStore(tmp_path, 2)
    assert store.complete() == [first]
    assert store.latest() == first
    store.remove_leftovers()
    assert store.latest() == first
    assert not leftover.exists()


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_interrupted_replacement_keeps_one_complete_folder(tmp_path, monkeypatch, moment):
    """The interruption comes before the old folder is renamed, before the new one is renamed, or after both."""
    final, replace = tmp_path / "c", os.replace
    write_checkpoint(final, lambda folder: save(folder, seed=1) and None)
    old = (final / "model.safetensors").read_bytes()

    def interrupted(source, target):
        is_new = str(source).endswith(".incomplete")
        if moment == ("between" if is_new else "before"):
            raise KeyboardInterrupt
        replace(source, target)
        if is_new and moment == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(final, lambda folder: save(folder, seed=2) and None)
    assert list(tmp_path.iterdir()) == [final]
    verify_checkpoint(final)
    assert ((final / "model.safetensors").read_bytes() == old) == (moment != "after")


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        path = store.save(checkpoint_name(step), lambda folder: save(folder) and None)
        if step == 2:
            store.point("best", path)
    assert [path.name[-1] for path in store.complete()] == ["2", "4", "5"]
    assert store.target("best").name == checkpoint_name(2)
    assert store.target("last").name == checkpoint_name(5)
    assert not (tmp_path / "last").readlink().is_absolute()


def test_checkpoint_names_sort_in_the_order_of_the_run():
    names = [
        checkpoint_name(9),
        checkpoint_name(9, 1),
        checkpoint_name(9, 12),
        checkpoint_name(10),
        checkpoint_name(101),
    ]
    assert names == sorted(names)


@pytest.mark.parametrize("keep_last", [1, 3, 20])
def test_a_checkpoint_of_a_step_that_was_saved_before_is_the_latest(tmp_path, keep_last):
    """Also the tenth, and if the names of removed checkpoints are free."""
    store = CheckpointStore(tmp_path, keep_last)
    earlier = store.save(checkpoint_name(4), lambda folder: None)
    saved = [earlier]
    for i in range(1, 13):
        name = store.free_name(checkpoint_name(5))
        assert name == checkpoint_name(5) + (f"+{i}" if i > 1 else "")
        saved.append(store.save(name, lambda folder: None))
        assert store.latest() == store.target("last") == saved[-1]
        assert store.complete() == saved[-keep_last:]
    saved.append(store.save(checkpoint_name(5, 1), lambda folder: None))
    assert store.complete() == saved[-keep_last:]


def test_checkpoints_are_set_aside_in_the_order_of_the_run(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=20)
    names = [checkpoint_name(5), *(f"{checkpoint_name(5)}+{i}" for i in range(2, 13))]
    saved = [store.save(name, lambda folder: None) for name in names]
    assert store.set_aside(saved[8]).name == saved[-1].name.replace("step", "cooled")
    assert store.complete() == saved[:9]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(1, 200)), unique=True),
    other=st.text(max_size=5),
)
def test_names_sort_by_step_segments_and_number(steps, other):
    """Names of other programs do no harm."""
    names = [checkpoint_name(step, n) + (f"+{number}" if number > 1 else "") for step, n, number in sorted(steps)]
    assert sorted(map(Path, names[::-1]), key=order) == [*map(Path, names)]
    sorted(map(Path, [*names, f"step-{other}", f"step-1+{other}"]), key=order)
