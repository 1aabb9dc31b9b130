"""Files of torch.save: the weights are found and read bit for bit, and no code is executed."""

import argparse
import os
import pickle
import warnings
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsmr_mlx import UserError
from dsmr_mlx.convert.weights_source import open_source

torch = pytest.importorskip("torch")

from support.torch_states import MODEL, WIDE_UNSIGNED, assert_holds, state_dict  # noqa: E402


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_bitwise(tmp_path, suffix, zipped):
    """Also in the format before PyTorch 1.6, which lacks the wider unsigned types."""
    path = tmp_path / f"model{suffix}"
    state = {name: tensor for name, tensor in state_dict().items() if zipped or tensor.dtype not in WIDE_UNSIGNED}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    assert_holds(source, state)
    assert (source.files, source.config, source.tokenizer, source.entry) == ([path], {}, None, "")
    assert [*source.shapes] == [*state]


def test_parameters_views_and_tied_weights_are_read_as_by_torch(tmp_path):
    base = torch.randn(6, 4)
    state = {
        "parameter": torch.nn.Parameter(base.clone()),
        "embed": base,
        "head": base,
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[0].expand(3, 4),
        "half": base.T.bfloat16().T,
    }
    torch.save(state, tmp_path / "a.pt")
    assert_holds(open_source(tmp_path / "a.pt"), state)


LARGE = {"exp_avg": torch.zeros(100), "exp_avg_sq": torch.zeros(100)}
OPTIMIZER = {"state": {0: LARGE, 1: LARGE}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"state_dict": MODEL, "optimizer_states": [OPTIMIZER], "hyper_parameters": {"d": 4}}, "state_dict"),
        ({"model": MODEL, "optimizer": OPTIMIZER, "iter_num": 5, "best_val_loss": torch.tensor(1.0)}, "model"),
        ({"model_state_dict": MODEL, "optimizer_state_dict": OPTIMIZER, "loss": 0.5}, "model_state_dict"),
        ({"module": MODEL, "optimizer": None, "buffer_names": [], "ds_version": "0.1"}, "module"),
        ({"model": MODEL, "ema": LARGE, "flat_optimizer": LARGE}, "model"),
        ({"model": {"state_dict": MODEL, "step": 1}, "optimizer": OPTIMIZER}, "model.state_dict"),
        ({"decoder_weights": MODEL, "optimizer": OPTIMIZER, "small": {"x": torch.ones(3)}}, "decoder_weights"),
        (
            {"decoder_weights": MODEL, "flat_optim_state": LARGE, "rng": {"cpu": torch.get_rng_state()}},
            "decoder_weights",
        ),
        (MODEL | {"_extra_state": None, "version": 2}, ""),
    ],
)
def test_the_state_dict_is_found_among_other_entries(tmp_path, content, entry):
    torch.save(content, tmp_path / "a.ckpt")
    source = open_source(tmp_path / "a.ckpt")
    assert source.entry == entry
    assert_holds(source, MODEL)


@pytest.mark.parametrize(
    ("content", "entry", "left_out"),
    [
        ({"model": MODEL, "ema": MODEL}, "model", {"ema": 2}),
        ({"ema": MODEL, "model": MODEL}, "model", {"ema": 2}),
        ({"state_dict": MODEL, "state_dict_ema": MODEL, "optimizer": LARGE}, "state_dict", {"state_dict_ema": 2}),
        ({"model": {"state_dict": MODEL}, "ema": {"module": MODEL}}, "model.state_dict", {"ema.module": 2}),
        ({"model": MODEL, "model_ema": MODEL, "swa": {"x": torch.ones(1)}}, "model", {"model_ema": 2, "swa": 1}),
        ({"net": MODEL, "rng": LARGE, "args": {"d": 4}}, "net", {}),
        (MODEL | {"version": 2}, "", {}),
    ],
)
def test_weights_that_are_left_out_are_known_and_can_be_chosen(tmp_path, content, entry, left_out):
    path = tmp_path / "a.pt"
    averaged = {name: tensor * 2 for name, tensor in MODEL.items()}
    swapped = {
        key: (dict.fromkeys(value, averaged) if "module" in value else averaged) if "ema" in key else value
        for key, value in content.items()
    }
    torch.save(swapped, path)
    source = open_source(path)
    assert (source.entry, source.left_out) == (entry, left_out)
    assert_holds(source, MODEL)
    for name in left_out:
        chosen = open_source(path, weights=name)
        assert chosen.entry == name
        if "ema" in name:
            assert_holds(chosen, averaged)
            assert_holds(open_source(path, weights=name.partition(".")[0]), averaged)
    with pytest.raises(UserError, match=r"a\.pt: has no weights nothing, expected one of its entries with tensors: "):
        open_source(path, weights="nothing")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model.ema": MODEL, "model.raw": MODEL}, ["model.ema", "model.raw"]),
        ({0: MODEL, 1: MODEL}, ["0", "1"]),
        ({"a": {"b.c": MODEL, 5: MODEL}}, ["a.b.c", "a.5"]),
        ({"a.b": {"c.d": MODEL}, "a": {"b.e": MODEL}}, ["a.b.c.d", "a.b.e"]),
    ],
)
def test_all_listed_names_can_be_chosen(tmp_path, content, names):
    """Keys with dots, and numbers."""
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"expected one of its entries with tensors: {', '.join(names)}$"):
        open_source(tmp_path / "a.pt", weights="nothing")
    for name in names:
        source = open_source(tmp_path / "a.pt", weights=name)
        assert source.entry == name
        assert_holds(source, MODEL)


KEYS = st.sampled_from(["a", "b", "a.b", "model", "ema.module", "", ".", 1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@example(content={"": {"": MODEL}, ".": {}})  # two entries with one name
@given(content=st.dictionaries(KEYS, st.just(MODEL) | st.dictionaries(KEYS, st.just(MODEL), max_size=2), max_size=3))
def test_any_listed_name_can_be_chosen(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        open_source(path, weights="nothing")
    listed = str(caught.value).partition("tensors: ")[2].split(", ")
    for name in listed if listed != ["none"] else []:
        assert_holds(open_source(path, weights=name), MODEL)
    with suppress(UserError):  # not all files have one state dict
        assert_holds(open_source(path), MODEL)


def test_two_models_in_an_entry_are_named_in_full(tmp_path):
    torch.save({"runs": {"x": MODEL, "y": MODEL}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"'runs\.x' and 'runs\.y' have .* `weights` runs\.x takes one"):
        open_source(tmp_path / "a.pt", weights="runs")


def test_weights_are_not_chosen_in_safetensors(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.ones(2)})
    with pytest.raises(UserError, match="`weights` ema: not with a"):
        open_source(tmp_path / "a.safetensors", weights="ema")


def test_entries_within_themselves_are_no_weights(tmp_path):
    content: dict = {"model": {}}
    content["model"]["model"] = content["model"]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: contains no named tensors"):
        open_source(tmp_path / "a.pt")


def test_two_models_of_equal_size_are_refused(tmp_path):
    torch.save({"student": MODEL, "teacher": MODEL}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: 'student' and 'teacher' have 8 elements each, expected one"):
        open_source(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains a list"),
        (torch.ones(2), "contains a Tensor"),
        ({}, "no named tensors, only nothing"),
        ({"lr": 0.1, "optimizer": OPTIMIZER}, "no named tensors, only lr, optimizer"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt: .*{message}[;,] expected a state dict"):
        open_source(tmp_path / "a.pt")


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, zipped):
    mark = tmp_path / "executed"
    torch.save(MODEL | {"x": Payload(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"a\.pt: refused: it contains posix\.mkdir, .*nothing was executed") as caught:
        open_source(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"b\.bin: "):
        open_source(tmp_path / "b.bin")
    assert not mark.exists()
    pickle.loads((tmp_path / "b.bin").read_bytes())
    assert mark.exists(), "the payload must work"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"state_dict": MODEL, "hyper_parameters": argparse.Namespace(d=1)}, r"argparse\.Namespace"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({"model": MODEL, "loss": np.float64(1)}, r"numpy\._core\.multiarray\.scalar"),
    ],
)
def test_classes_of_other_programs_are_refused_with_advice(tmp_path, content, wanted):
    torch.save(content, tmp_path / "a.ckpt")
    message = rf"a\.ckpt: refused: it contains {wanted}, .*nothing was executed: save its state dict alone"
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_torchscript_program_is_refused_with_advice(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: is a TorchScript program, .*save its state dict alone"):
        open_source(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "is sparse, expected a dense tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "is qint8, expected float"),
        (lambda: torch.ones(2).to(torch.float8_e5m2), "is float8_e5m2, expected float"),
        (lambda: torch.ones(2, dtype=torch.complex128), "is complex128"),
        (lambda: torch.ones(2, device="meta"), "has no values"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unsupported_tensors_are_refused_by_name(tmp_path, tensor, message):
    torch.save({"ok": torch.ones(1), "odd.weight": tensor()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt: odd\.weight {message}"):
        open_source(tmp_path / "a.pt")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), zipped=st.booleans())
def test_truncated_and_random_files_are_refused_by_name(tmp_path, data, zipped):
    path = tmp_path / "a.pt"
    torch.save(MODEL, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    truncated = st.integers(0, len(whole) - 1).map(lambda length: whole[:length])
    path.write_bytes(data.draw(truncated | st.binary(max_size=40)))
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
