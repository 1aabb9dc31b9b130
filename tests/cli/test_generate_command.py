"""`dsmr-mlx generate`: growing files, Ctrl-C, prompts, piano rolls."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from support.bands import band
from support.performances import assert_same_notes, observe_steps

from dsmr_mlx.generation import ranking as scoring
from dsmr_mlx.generation import recording
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_midi, read_notes, read_text


def steps_of(trained, lanes: int = 1, **options) -> list[np.ndarray]:
    """Iterate over the steps of an endless player with the same seed."""
    model, tokenizer = checkpoint.load(trained.run)
    return Player(model, tokenizer, n=lanes, **options).play(Limits())


@pytest.mark.slow
def test_ctrl_c_keeps_all_notes_so_far(generate, trained, monkeypatch):
    """Interrupted long before the requested hours, while keys are down."""
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_WRITES", 2)
    looks, handler = [], signal.getsignal(signal.SIGINT)

    def look(player, count):
        if count % 50 == 0 and Path("a.mid").stat().st_size:  # the name is claimed by an empty file at first
            looks.append(len(read_midi("a.mid", allow_empty=True).notes))  # without a warning of keys that are down
        if count == 300:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        observe_steps(patched, look)
        stopped = generate("--seconds", 36_000, "--out", "a.mid")
    assert (stopped.code, stopped.err) == (130, "dsmr-mlx: interrupted\n")
    assert "a.mid" in stopped.out
    assert looks == sorted(looks)
    assert looks[0] < looks[-1], "the file grows"
    steps = steps_of(trained)
    ids = np.array([next(steps)[0] for _ in range(301)])
    expected = checkpoint.load(trained.run)[1].decode(ids)
    assert_same_notes(read_notes("a.mid"), expected)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far(generate, monkeypatch):
    """Interrupted while the candidates are played, then while they are scored: the rest is ranked and written."""
    with monkeypatch.context() as patched:
        observe_steps(patched, lambda player, count: count == 60 and signal.raise_signal(signal.SIGINT))
        stopped = generate("--seconds", 36_000, "--best-of", 3, "-n", 2, "--out", "a")
    assert (stopped.code, stopped.err) == (130, "dsmr-mlx: interrupted\n")
    assert [line.split()[0] for line in stopped.out.splitlines()[1:4]] == ["1", "2", "3"]
    for name in ("a/1.mid", "a/2.mid"):
        assert 0 < json.loads(read_text(name))["score"]["tokens"] <= 61
        assert len(read_notes(name))
    score = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *a: (signal.raise_signal(signal.SIGINT), score(*a))[1])
    stopped = generate("--tokens", 30, "--best-of", 5, "--out", "b.mid")
    assert stopped.code == 130
    assert json.loads(read_text("b.mid"))["candidate"] == 1
    assert len(stopped.out.partition("\n\n")[0].splitlines()) == 2, "one was scored"


@pytest.mark.slow
def test_what_a_prompt_of_several_instruments_loses_is_said(generate, trained):
    Path("band.mid").write_bytes(band())
    made = generate("--prompt", "band.mid", "--seconds", 1, "--out", "a.mid")
    assert made.code == 0
    assert "note: band.mid: 2 instruments are read as one, drums are left out" in " ".join(made.err.split())


def test_an_excerpt_of_a_file_as_prompt(generate, trained):
    prompt = trained.midi / "0.mid"
    options = ["--prompt", prompt, "--prompt-start", 2, "--prompt-seconds", 1, "--seconds", 1]
    assert generate(*options, "--include-prompt", "--out", "a.mid").code == 0
    assert generate(*options, "--out", "b.mid").code == 0
    assert generate(*options, "--continuation-only", "--out", "c.mid").code == 0
    whole, original = read_notes("a.mid"), read_notes(prompt)
    part = original.take((original.onset >= 2) & (original.onset <= original.onset[original.onset >= 2][0] + 1))
    assert whole.pitch[: len(part)].tolist() == part.pitch.tolist()
    assert read_notes("b.mid") == whole
    new = read_notes("c.mid")
    assert len(new) == len(whole) - len(part)
    assert generate(*options, "--continuation-only", "--best-of", 1, "--out", "d.mid").code == 0
    assert read_notes("d.mid") == new, "the velocity of the prompt carries on"
    assert json.loads(read_text("a.mid"))["prompt_start"] == 2.0


def test_progress_of_reading_a_prompt_is_shown(generate, trained, monkeypatch):
    shown = []

    class Shown:
        def __init__(self, title, unit):
            self.title = title

        def __enter__(self):
            return lambda done, total: shown.append((self.title, done, total))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("dsmr_mlx.cli.generate.progress", Shown)
    assert generate("--prompt", trained.midi / "0.mid", "--tokens", 5, "--out", "a.mid").code == 0
    reading = [(done, total) for title, done, total in shown if title == "reading the prompt"]
    total = reading[-1][1]
    done = [done for done, _ in reading]
    assert done == [*range(8, total, 8), total][-len(done) :]  # what is passed over counts at once


def test_show_prints_piano_rolls(run, trained):
    ended = run("generate", trained.run, "--seconds", 2, "-n", 2, "--out", "two", "--show")
    assert ended.code == 0, ended.err
    plain = run("generate", trained.run, "--seconds", 2, "-n", 2, "--out", "same")
    assert len(ended.out.splitlines()) > len(plain.out.splitlines()) + 10
    assert all(name in ended.out.split("tokens/s")[-1] for name in ("two/1.mid", "two/2.mid"))
    assert [Path("two", f"{i}.mid").read_bytes() for i in (1, 2)] == [
        Path("same", f"{i}.mid").read_bytes() for i in (1, 2)
    ]
