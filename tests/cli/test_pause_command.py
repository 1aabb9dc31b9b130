"""`dsmr-mlx generate` with pauses: resumed pieces, branches of a saved state, refusals."""

import json
import signal
from argparse import Namespace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from support.performances import observe_steps
from support.players import new_player
from support.stand_ins import constant_model, tiny_model

from dsmr_mlx.cli.generate import Generation
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import GenerationReport, timed
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.tokenizers.performance import (
    EOS,
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    PerformanceTokenizer,
)


@pytest.fixture
def ending(tmp_path) -> Path:
    """A model that ends a piece soon, each lane at a different time."""
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[NOTE_OFF:TIME_SHIFT], preferences[TIME_SHIFT:VELOCITY] = 4, 5, 1
    return saved(tmp_path / "ending", constant_model(preferences))


def saved(folder: Path, model) -> Path:
    folder.mkdir()
    checkpoint.save_model(folder, model.config, model.parameters(), PerformanceTokenizer())
    return folder


@pytest.mark.slow
def test_parts_equal_the_whole(generate, trained):
    """3 s, 2.5 s and 2 s are 7.5 s without a pause: note by note, drawn and steered as at first, with the same end."""
    options = ["--seed", 3, "--temperature", "0:0.7,5:1.3", "--max-polyphony", 4, "--density", 6]
    a, b, c = "a.safetensors", "b.safetensors", "c.mid"
    assert generate("--seconds", 7.5, *options, "--out", "whole.mid").code == 0
    assert generate("--seconds", 3, *options, "--save-state", a, "--out", "a.mid").code == 0
    assert generate("--from-state", a, "--seconds", 2.5, "--save-state", b, "--out", "b.mid").code == 0
    assert generate("--from-state", b, "--seconds", 2, "--out", c).code == 0
    whole, parts = read_notes("whole.mid"), [read_notes(name) for name in ("a.mid", "b.mid", c)]
    assert np.concatenate([part.pitch for part in parts]).tolist() == whole.pitch.tolist()
    assert np.concatenate([part.velocity for part in parts]).tolist() == whole.velocity.tolist()
    start = 0
    for part in parts:
        own = whole.take(np.arange(start, start + len(part)))
        np.testing.assert_allclose(part.onset, own.onset - own.onset[0], atol=1e-6)
        start += len(part)
    np.testing.assert_allclose(part.offset, own.offset - own.onset[0], atol=1e-6)
    written = json.loads(read_text("b.mid"))
    assert (written["from_state"], written["temperature"]) == (a, [[0.0, 0.7], [5.0, 1.3]])
    assert [processor["kind"] for processor in written["processors"]] == ["MaxPolyphony", "Density"]
    assert len(written["from_state_sha256"]) == 64
    assert len({Path(name).stat().st_size for name in (a, b)}) == 1
    states = [Player.load(name, *checkpoint.load(trained.run)) for name in (a, b)]
    assert [state.pause_ticks for state in states] == [(300,), (550,)]
    assert all(state.ticks > state.pause_ticks for state in states)


def test_an_interrupted_part_resumes_where_it_stopped(generate, trained, monkeypatch):
    """Not from the requested pause."""
    with monkeypatch.context() as patched:
        observe_steps(patched, lambda player, count: count == 30 and signal.raise_signal(signal.SIGINT))
        stopped = generate("--seconds", 600, "--save-state", "a.safetensors", "--out", "a.mid")
    assert stopped.code == 130
    player = Player.load("a.safetensors", *checkpoint.load(trained.run))
    assert (player.position, player.pause_ticks) == (1 + 31, None)
    assert generate("--from-state", "a.safetensors", "--seconds", 2, "--out", "b.mid").code == 0
    assert 1 < read_notes("b.mid").duration < 6


@pytest.mark.slow
def test_a_state_may_branch(generate):
    assert generate("--tokens", 40, "--save-state", "a.safetensors", "--out", "a.mid").code == 0
    assert generate("--from-state", "a.safetensors", "--tokens", 40, "-n", 3, "--out", "b.mid").code == 0
    assert generate("--from-state", "a.safetensors", "--tokens", 40, "--seed", 5, "--out", "c.mid").code == 0
    made = [read_notes(name) for name in ("b-1.mid", "b-2.mid", "b-3.mid", "c.mid")]
    assert all(made[i] != made[j] for i in range(4) for j in range(i))
    assert generate("--tokens", 20, "-n", 2, "--save-state", "two.safetensors", "--out", "d.mid").code == 0
    assert generate("--from-state", "two.safetensors", "--tokens", 20, "--out", "e.mid").code == 0
    assert sorted(path.name for path in Path.cwd().glob("e*.mid")) == ["e-1.mid", "e-2.mid"]
    for folder in ("two-1", "two-2"):  # named as several files of a prompt are
        assert generate("--from-state", "two.safetensors", "--tokens", 20).code == 0
        assert sorted(path.name for path in Path(folder).iterdir()) == ["1.mid", "2.mid"]
    for options, message in (
        (["-n", 3], "-n 3: two.safetensors has 2 lanes, which can only be resumed as saved"),
        (["--seed", 1], "--seed 1: two.safetensors has 2 lanes, which can only be resumed as saved"),
        (["--best-of", 5], "--best-of 5: two.safetensors has 2 lanes, which can only be resumed as saved"),
        (["--best-of", 2], "--best-of 2: two.safetensors has 2 lanes, which can only be resumed as saved"),
    ):
        refused = generate("--from-state", "two.safetensors", "--tokens", 20, *options, "--out", "f.mid")
        assert (refused.code, refused.err) == (2, f"dsmr-mlx: error: {message}\n")
    assert generate("--from-state", "a.safetensors", "--best-of", 3, "--tokens", 20, "--out", "g.mid").code == 0


def test_best_of_from_a_state(generate):
    """The limits count from the requested pause."""
    assert generate("--seconds", 1, "--save-state", "a.safetensors", "--out", "a.mid").code == 0
    assert generate("--from-state", "a.safetensors", "--best-of", 3, "--seconds", 1, "-n", 2, "--out", "b").code == 0
    assert len(read_notes("b/1.mid")) > 1


@pytest.mark.slow
def test_progress_is_that_of_the_slowest_lane_still_playing(ending):
    model, tokenizer = checkpoint.load(ending)
    player, shown, clocks = Player(model, tokenizer, n=4, seed=1), [], []
    steps = timed(player, player.play(Limits(may_end=True)), GenerationReport(), lambda *far: shown.append(far))
    ended = np.zeros(4, bool)
    for step in steps:
        ended |= step == EOS
        ticks = np.array(player.ticks)
        clocks.append(ticks[~ended].min() if not ended.all() else ticks.max())
    assert [count for count, _ in shown] == list(range(1, len(shown) + 1))
    np.testing.assert_allclose([seconds for _, seconds in shown], np.array(clocks) / 100)
    assert len(set(player.ticks)) > 1, "some lanes end before others"


@pytest.mark.parametrize("more", [[], ["--best-of", 3], ["-n", 2], ["--save-state", "b.safetensors"]])
def test_an_ended_piece_cannot_be_resumed(run, ending, more):
    assert run("generate", ending, "--seconds", 600, "--may-end", "--save-state", "a.safetensors").code == 0
    refused = run("generate", ending, "--from-state", "a.safetensors", *more, "--out", "new.mid")
    message = "a.safetensors: the piece has ended and cannot be resumed"
    assert (refused.code, refused.err) == (2, f"dsmr-mlx: error: {message}\n")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a.safetensors", "ending-1.mid"]


def test_lanes_that_have_ended_get_no_file(run, ending):
    paused = run("generate", ending, "--tokens", 40, "--may-end", "-n", 6, "--seed", 1, "--save-state", "a.safetensors")
    assert paused.code == 0, paused.err
    ended = Player.load("a.safetensors", *checkpoint.load(ending)).ended
    assert any(ended)
    assert not all(ended)
    result = run("generate", ending, "--from-state", "a.safetensors", "--tokens", 20, "--out", "new.mid")
    assert result.code == 0, result.err
    over = ", ".join(f"{i}" for i, over in enumerate(ended, start=1) if over)
    assert f"note: a.safetensors: of 6 variations {over} ended; the others continue\n" in result.err
    left = [f"new-{i}.mid" for i, over in enumerate(ended, start=1) if not over]
    assert sorted(path.name for path in Path.cwd().glob("new*.mid")) == left
    assert all(name in result.out for name in left)
    assert len(result.out.splitlines()) == len(left) + 2


def test_used_up_positions_cannot_be_resumed(run, tmp_path):
    model = tiny_model(max_positions=40, rope_dims=0)
    folder = saved(tmp_path / "table", model)
    player = Player(*checkpoint.load(folder))
    player.read([VELOCITY, *range(NOTE_ON, NOTE_ON + 38)])
    next(player.play())
    player.save("a.safetensors")
    refused = run("generate", folder, "--from-state", "a.safetensors", "--out", "new.mid")
    message = "a.safetensors: the model's 40 learned positions are used up, no token can follow"
    assert (refused.code, refused.err) == (2, f"dsmr-mlx: error: {message}\n")
    assert run("generate", folder, "--seconds", 60, "--best-of", 2, "--out", "best.mid").code == 0


def test_a_state_that_cannot_be_saved_is_an_error_after_the_music(generate, monkeypatch):
    def full(*_):
        raise UserError("a.safetensors: cannot be written (No space left on device)")

    monkeypatch.setattr(Player, "save", full)
    failed = generate("--seconds", 2, "--save-state", "a.safetensors", "--out", "a.mid")
    assert (failed.code, failed.err) == (
        2,
        "dsmr-mlx: error: a.safetensors: cannot be written (No space left on device)\n",
    )
    assert "tokens/s" in failed.out
    assert len(read_notes("a.mid"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--from-state", "a.safetensors", "--prompt", "a.mid"],
            "--prompt: not with --from-state, which keeps the options",
        ),
        (
            ["--from-state", "a.safetensors", "--temperature", 1.0],
            "--temperature: not with --from-state, which keeps",
        ),
        (
            ["--from-state", "a.safetensors", "--include-prompt"],
            "--include-prompt: not with --from-state, whose output",
        ),
        (["--from-state", "a.safetensors", "-n", 0], "-n 0: expected at least 1"),
        (["-n", 0], "-n 0: expected at least 1"),
        (["--from-state", ""], "--from-state: expected FILE.safetensors"),
        (["--save-state", "no/a.safetensors"], "--save-state no/a.safetensors: no such folder no"),
        (
            ["--from-state", "a.safetensors", "--top-k", 3],
            "--top-k: not with --from-state, which keeps the options of",
        ),
        (
            ["--from-state", "a.safetensors", "--tempo", 1],
            "--tempo: not with --from-state, which keeps the options of",
        ),
        (["--from-state", "no.safetensors"], "no.safetensors: cannot be read (No such file or directory), expected a"),
        (["--from-state", "text.mid"], "text.mid: cannot be read (cut off, or a file of another kind), expected a"),
        (["--save-state", "a.safetensors", "--best-of", 3], "--best-of: not with --save-state, which does not end the"),
        (
            ["--save-state", "a.safetensors", "--end-within", 3],
            "--end-within: not with --save-state, which does not end",
        ),
        (["--save-state", "a.bin"], "--save-state a.bin: expected a name that ends in .safetensors"),
        (
            ["--save-state", "there.safetensors"],
            "--save-state there.safetensors: already exists, --force overwrites it",
        ),
        (
            ["--include-prompt", "--continuation-only"],
            "argument --continuation-only: not allowed with argument --include",
        ),
    ],
)
def test_options_that_exclude_each_other(generate, options, message):
    Path("text.mid").write_text("no state")
    Path("there.safetensors").touch()
    refused = generate(*options, "--out", "new.mid")
    assert refused.code == 2
    assert message in refused.err
    assert "Traceback" not in refused.err
    assert not Path("new.mid").exists()


def test_a_part_that_stays_at_one_time_is_paused_at_the_limit_on_tokens():
    """Vocabularies whose notes have lengths may start any number of notes at one time."""
    steps, options = [], Namespace(save_state="a", tokens=None, end_within=None, may_end=False)
    player = new_player(tiny_model())
    generation = Generation(options, player, Limits(ticks=10**6, tokens=20), 10_000.0, GenerationReport())
    assert not generation.play(steps.append, Event())
    assert len(steps) == 20
