"""`examples/train_pytorch.py` trains as `dsmr-mlx train` does, resumes exactly, and writes what converts."""

import dataclasses
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from support.tiny import tiny_config, write_corpus

from dsmr_mlx import UserError, load

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_ends_training_in_pytorch_with_one_line(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    corpus = write_corpus(tmp_path / "corpus").path
    (tmp_path / "file").write_bytes(b"")
    settings = [f"--set={setting}" for setting in (*TINY, "horizons=uniform:8", "max_steps=1")]
    monkeypatch.setattr(sys, "argv", ["train_pytorch", "--data", str(corpus), "--out", "file/model.pt", *settings])
    with pytest.raises(SystemExit, match=r"^train_pytorch: error: .*file'?$"):
        runpy.run_path(str(EXAMPLES / "train_pytorch.py"), run_name="__main__")


@pytest.mark.slow
def test_training_in_pytorch_resumes_exactly_and_converts(example, tmp_path):
    """Stopped after 3 steps of 6: the weights of 6 steps at once, and the perplexity that this program measures."""
    torch = pytest.importorskip("torch")
    from dsmr_mlx.convert.importing import plan_conversion, write_conversion
    from dsmr_mlx.evaluation import evaluate

    corpus = write_corpus(tmp_path / "corpus")
    settings = (*TINY, "horizons=uniform:8", "learning_rate=0.01", "min_learning_rate=0.01", "warmup_steps=0")
    settings = [f"--set={setting}" for setting in (*settings, "eval_every=6")]
    options = ["--data", corpus.path, "--device", "cpu", *settings]
    shown = example("train_pytorch", *options, "--out", "once.pt", "--set=max_steps=6")
    example("train_pytorch", *options, "--out", "twice.pt", "--set=max_steps=3")
    example("train_pytorch", *options, "--out", "twice.pt", "--set=max_steps=6", "--resume")
    once, twice = (torch.load(f"{name}.pt.last", weights_only=True) for name in ("once", "twice"))
    assert once["progress"]["step"] == twice["progress"]["step"] == 6
    assert all(torch.equal(weight, twice["state_dict"][name]) for name, weight in once["state_dict"].items())
    model, _ = load(write_conversion(plan_conversion(tmp_path / "once.pt"), tmp_path / "model"))
    (line,) = [line for line in shown.splitlines() if line.startswith("validation")]
    assert evaluate(model, corpus).perplexity == pytest.approx(float(line.split()[-1]), rel=1e-5)


@pytest.fixture
def pytorch_run(example, tmp_path):
    """`train_pytorch` on a tiny corpus, with some more arguments: what it prints."""
    pytest.importorskip("torch")
    corpus = write_corpus(tmp_path / "corpus")
    settings = (*TINY, "horizons=uniform:8", "warmup_steps=0", "eval_every=6", "dropout=0.3", "max_steps=1")
    given = ["--data", corpus.path, "--device", "cpu", *(f"--set={setting}" for setting in settings)]
    return lambda *more: example("train_pytorch", *given, *more)


@pytest.mark.slow
def test_training_in_pytorch_resumes_random_states(pytorch_run):
    """Dropout forgets in step 4 what it would have forgotten without the stop."""
    import torch

    rate = "--set=min_learning_rate=0.002"
    pytorch_run("--out", "once.pt", "--set=max_steps=5", rate)
    pytorch_run("--out", "twice.pt", "--set=max_steps=3", rate)
    pytorch_run("--out", "twice.pt", "--set=max_steps=5", "--resume", rate)
    once, twice = (torch.load(f"{name}.pt.last", weights_only=True)["state_dict"] for name in ("once", "twice"))
    assert all(torch.equal(weight, twice[name]) for name, weight in once.items())


@pytest.mark.slow
def test_training_in_pytorch_cools_down_and_continues(pytorch_run):
    """A cooled run that is continued equals one that never cooled down, with all settings of the recipe."""
    import torch

    from dsmr_mlx.convert.importing import plan_conversion, write_conversion

    recipe = ("canon", "qk_norm", "value_residual", "embedding_skip", "zero_init")
    recipe = (*(f"{name}=true" for name in recipe), "logit_softcap=15", "optimizer=muon", "ema_decay=0.9", "fill=1")
    settings = [f"--set={setting}" for setting in (*recipe, "lr_schedule=wsd", "cooldown=0.5", "n_kv_heads=1")]
    pytorch_run("--out", "once.pt", "--set=max_steps=10", *settings)
    pytorch_run("--out", "twice.pt", "--set=max_steps=4", *settings)
    assert torch.load("twice.pt.before-cooldown", weights_only=True)["progress"]["step"] == 2
    pytorch_run("--out", "twice.pt", "--set=max_steps=10", "--resume", *settings)
    once, twice = (torch.load(f"{name}.pt.last", weights_only=True) for name in ("once", "twice"))
    for weights in ("state_dict", "average"):
        assert all(torch.equal(weight, twice[weights][name]) for name, weight in once[weights].items())
    assert not torch.equal(once["state_dict"]["embed.weight"], once["average"]["embed.weight"])
    write_conversion(plan_conversion("once.pt"), "model")


@pytest.mark.slow
def test_training_in_pytorch_keeps_the_best_cooled_model(pytorch_run, monkeypatch):
    """A run that continues from before the cool-down validates worse at first, which must not replace `model.pt`."""
    import torch
    import train_pytorch

    losses, kept = iter([5.0, 4.5, 4.8, 4.7, 4.4]), []

    def validate(self) -> float:
        kept.append(Path("a.pt").exists() and Path("a.pt").read_bytes())
        return next(losses)

    monkeypatch.setattr(train_pytorch.Training, "validate", validate)
    wsd = ("--set=lr_schedule=wsd", "--set=cooldown=0.5", "--out", "a.pt")
    pytorch_run(*wsd, "--set=max_steps=4", "--set=eval_every=2")
    cooled = Path("a.pt").read_bytes()
    pytorch_run(*wsd, "--set=max_steps=10", "--set=eval_every=4", "--resume")
    assert kept[2:] == [cooled] * 3
    assert torch.load("a.pt.last", weights_only=True)["progress"]["best"] == 4.4
    assert Path("a.pt").read_bytes() != cooled


@pytest.mark.slow
def test_training_in_pytorch_continues_from_before_its_last_cooldown(pytorch_run, monkeypatch):
    """Not from before an earlier one, and not with cooled weights; the last cool-down began at once."""
    import torch
    import train_pytorch

    def step(state: str) -> int:
        return torch.load(f"a.pt.{state}", weights_only=True)["progress"]["step"]

    def stopped_step(self) -> float:
        if self.step == 7:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self)

    wsd = ("--set=lr_schedule=wsd", "--set=cooldown=0.5", "--out", "a.pt", "--resume")
    pytorch_run(*wsd, "--set=max_steps=4")
    assert step("before-cooldown") == 2
    train_step = train_pytorch.Training.train_step
    with monkeypatch.context() as patched:
        patched.setattr(train_pytorch.Training, "train_step", stopped_step)
        pytorch_run(*wsd, "--set=max_steps=30")
    assert step("last") == 8
    pytorch_run(*wsd, "--set=max_steps=12")
    assert step("before-cooldown") == 8
    assert "continues from step 8, before the cool-down" in pytorch_run(*wsd, "--set=max_steps=30")


@pytest.mark.slow
def test_training_in_pytorch_works_without_validation_pieces_in_a_new_folder(example, tmp_path):
    torch = pytest.importorskip("torch")
    corpus = write_corpus(tmp_path / "corpus", validation=0)
    settings = [f"--set={setting}" for setting in (*TINY, "horizons=uniform:8", "eval_every=2", "max_steps=4")]
    shown = example("train_pytorch", "--data", corpus.path, "--device", "cpu", *settings, "--out", "new/a.pt")
    assert "validation" not in shown
    assert torch.load("new/a.pt.last", weights_only=True)["progress"]["step"] == 4
    assert torch.load("new/a.pt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_training_in_pytorch_starts_from_a_checkpoint(pytorch_run):
    """Another run of two steps, whose rate is 0, leaves model and average as they were."""
    import torch

    from dsmr_mlx.convert.importing import plan_conversion, write_conversion

    pytorch_run("--out", "a.pt", "--set=max_steps=2")
    write_conversion(plan_conversion("a.pt"), "model")
    still = ("learning_rate=1e-30", "min_learning_rate=1e-30", "weight_decay=0", "ema_decay=0.5", "optimizer=adamw")
    pytorch_run("--out", "b.pt", "--set=init=model", *(f"--set={setting}" for setting in still))
    before, after = torch.load("a.pt", weights_only=True), torch.load("b.pt.last", weights_only=True)
    for name, weight in before["state_dict"].items():
        assert torch.equal(weight, after["state_dict"][name]), name
        assert torch.allclose(weight, after["average"][name]), name
    with pytest.raises(UserError, match="d_model = 24: `init` model has d_model = 16, which its weights fix"):
        pytorch_run("--out", "c.pt", "--set=init=model", "--set=d_model=24")


@pytest.mark.slow
def test_training_in_pytorch_continues_with_a_longer_memory(pytorch_run):
    """The weights, the optimizer and the lanes go on; the memory is that of the new horizons."""
    import torch

    pytorch_run("--out", "a.pt")
    pytorch_run("--out", "a.pt", "--resume", "--set=max_steps=2", "--set=horizons=uniform:24")
    longer = torch.load("a.pt.last", weights_only=True)
    assert longer["progress"]["step"] == 2
    assert {layer[0].shape[2] for layer in longer["layers"]} == {24}


@pytest.mark.slow
def test_training_in_pytorch_refuses_unsupported_settings(pytorch_run):
    """Settings that only `dsmr-mlx train` supports, and settings that a resumed run cannot change."""
    for setting, expected in (
        ("accumulate=2", "accumulate = 2: not supported here, must be 1"),
        ("patience=1", "patience = 1: not supported here, must be None"),
        ("gradient_checkpointing=true", "gradient_checkpointing = True: not supported here, must be False"),
        ("not_finite=skip", "not_finite = 'skip': not supported here, must be 'stop'"),
    ):
        with pytest.raises(SystemExit, match=re.escape(expected)):
            pytorch_run("--out", "a.pt", f"--set={setting}")
    pytorch_run("--out", "a.pt")
    for setting in ("seed=4", "segment_length=4", "d_model=32", "weight_decay=0.5"):
        with pytest.raises(SystemExit, match=rf"{setting.split('=')[0]} = .*: a.pt.last has .*, which is fixed"):
            pytorch_run("--out", "a.pt", "--resume", f"--set={setting}")
    pytorch_run("--out", "a.pt", "--resume", "--set=max_steps=2", "--set=learning_rate=0.01")
    Path("a.pt.last").unlink()
    with pytest.raises(SystemExit, match=re.escape("a.pt: already exists, and there is no a.pt.last to resume")):
        pytorch_run("--out", "a.pt", "--resume")


@pytest.mark.slow
def test_training_in_pytorch_keeps_the_licence_of_its_initial_weights(pytorch_run):
    """In the model, also of a resumed run, and in what it is converted to."""
    from dsmr_mlx.convert.importing import plan_conversion, write_conversion

    pytorch_run("--out", "a.pt")
    write_conversion(plan_conversion("a.pt"), "model")
    Path("model/LICENSE").write_text("CC BY-NC-SA\n")
    pytorch_run("--out", "b.pt", "--set=init=model")
    pytorch_run("--out", "b.pt", "--set=init=model", "--set=max_steps=6", "--resume")
    write_conversion(plan_conversion("b.pt"), "converted")
    assert Path("converted/LICENSE").read_text() == "CC BY-NC-SA\n"
    assert not Path("converted/LICENSE").samefile("model/LICENSE")


@pytest.fixture
def program(monkeypatch):
    """The module."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_pytorch

    yield train_pytorch
    for name in ("train_pytorch", "pytorch_muon"):
        sys.modules.pop(name, None)


@pytest.fixture
def training(program, tmp_path):
    """A run of one lane that validates every second step."""
    config = tiny_config(batch_size=1, segment_length=2, fill=1.0, eval_every=2, eval_tokens=1, max_steps=4)
    return program.Training(config, write_corpus(tmp_path / "corpus"), "cpu")


def test_segments_without_targets_take_no_step(training):
    """As in MLX. Everything in them is shown."""
    training.config = dataclasses.replace(training.config, max_steps=100)
    found, lanes = [], training.lanes

    def watched():
        for batch in lanes:
            found.append(batch.n_tokens)
            yield batch

    training.lanes = watched()
    losses = [training.train_step() for _ in range(60)]
    assert 0 in found
    assert training.step == 60 == len(found) - found.count(0)
    assert training.tokens == sum(found)
    assert min(losses) > 0


def test_a_run_saves_before_it_validates_and_repeats_a_validation_that_was_killed(program, training, monkeypatch):
    """The resumed run validates at the same steps."""
    out, validated = training.corpus.path.with_name("a.pt"), []

    def killed(self):
        raise KeyboardInterrupt

    def validate(self):
        validated.append(self.step)
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(program.Training, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            program.run(training, out, {})
    monkeypatch.setattr(program.Training, "validate", validate)
    resumed = program.Training(training.config, training.corpus, "cpu")
    resumed.resume(program.beside(out, "last"))
    assert resumed.step == 2
    program.run(resumed, out, {})
    assert validated == [2, 4]
    resumed.resume(program.beside(out, "last"))
    program.run(resumed, out, {})
    assert validated == [2, 4]


def test_signals_stop_the_run_as_those_of_the_command_do(program, training, monkeypatch):
    """The first saves, a second stops at once, and one that the shell ignores stays ignored."""
    train_step, out = program.Training.train_step, training.corpus.path.with_name("a.pt")
    sent = []

    def interrupted(self):
        for number in sent:
            signal.raise_signal(number)
        return train_step(self)

    monkeypatch.setattr(program.Training, "train_step", interrupted)
    sent[:] = [signal.SIGQUIT]
    program.run(training, out, {})
    assert (training.step, program.beside(out, "last").exists()) == (1, True)
    sent[:] = [signal.SIGINT] * 2
    with pytest.raises(KeyboardInterrupt):
        program.run(training, out, {})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program.run(training, out, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert training.step == 4


@pytest.mark.parametrize(("settings", "expected"), [({}, "before-cooldown"), ({"lr_schedule": "cosine"}, "last")])
def test_a_cooled_run_continues_from_before_the_cooldown_only_with_its_schedule(program, tmp_path, settings, expected):
    torch = pytest.importorskip("torch")
    out = tmp_path / "a.pt"
    for name, before in (("last", 2), ("before-cooldown", None)):
        progress = {"step": 4, "tokens": 9, "seconds": 1.0, "before_cooldown": before}
        torch.save({"progress": progress}, program.beside(out, name))
    config = tiny_config(**{"lr_schedule": "wsd", "cooldown": 0.5, "max_steps": 20, **settings})
    assert program.start_of(config, out) == program.beside(out, expected)


def test_the_next_cooldown_is_saved_too(program, training):
    """If the run left a cool-down because its limit was raised and what was saved before it is gone."""
    training.config = dataclasses.replace(training.config, lr_schedule="wsd", cooldown=0.5, max_steps=8)
    training.before_cooldown = 2
    out = training.corpus.path.with_name("a.pt")
    program.run(training, out, {})
    assert training.before_cooldown == 4
    assert program.beside(out, "before-cooldown").exists()
