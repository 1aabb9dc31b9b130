"""`dsmr-mlx generate` as a long performance: files that grow, Ctrl-C, pausing and going on."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from dsmr_mlx import checkpoint, recording
from dsmr_mlx.grammar import Limits
from dsmr_mlx.midi import Notes, read_notes, read_text
from dsmr_mlx.performance import performance_grammar
from dsmr_mlx.player import Player
from dsmr_mlx.sampling import Sampling
from dsmr_mlx.steering import MaxPolyphony

G = performance_grammar()


def watched(monkeypatch, at_step):
    """Let `at_step(player, count)` look on before each step of a player is given."""
    original = Player.play

    def play(self, limits=None):
        for count, step in enumerate(original(self, limits)):
            at_step(self, count)
            yield step

    monkeypatch.setattr(Player, "play", play)


def played(trained, lanes: int = 1, **options) -> list[np.ndarray]:
    """What a player of the same seed plays for ever, as an iterator of steps."""
    model, tokenizer = checkpoint.load(trained.run)
    return Player(model, tokenizer, n=lanes, **options).play(Limits())


def notes_until(steps, seconds: float) -> tuple[np.ndarray, int]:
    """The ids of one lane until so much music has been played, and how many they are."""
    ids, ticks = [], 0
    for step in steps:
        ids.append(int(step[0]))
        ticks += G.ticks[ids[-1]]
        if ticks >= 100 * seconds:
            return np.array(ids), len(ids)
    raise AssertionError


def test_ctrl_c_leaves_all_notes_so_far(generate, trained, monkeypatch):
    """After an hour of music would come an end; it is asked to stop much earlier, in the middle of held keys."""
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_WRITES", 2)
    looks = []

    def look(player, count):
        if count % 50 == 0 and Path("a.mid").exists():
            looks.append(len(read_notes("a.mid", may_be_empty=True)))
        if count == 300:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        watched(patched, look)
        stopped = generate("--seconds", 36_000, "--out", "a.mid")
    assert (stopped.code, stopped.err) == (130, "dsmr-mlx: error: interrupted\n")
    assert "a.mid" in stopped.out
    assert looks == sorted(looks)
    assert looks[0] < looks[-1], "the file grows"
    steps = played(trained)
    ids = np.array([next(steps)[0] for _ in range(301)])
    expected = checkpoint.load(trained.run)[1].decode(ids)
    assert_same_notes(read_notes("a.mid"), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def assert_same_notes(actual: Notes, expected: Notes) -> None:
    assert np.array_equal(actual.pitch, expected.pitch)
    assert np.array_equal(actual.velocity, expected.velocity)
    np.testing.assert_allclose(actual.onset, expected.onset - expected.onset[0], atol=1e-6)
    np.testing.assert_allclose(actual.offset, expected.offset - expected.onset[0], atol=1e-6)


def test_a_paused_piece_goes_on_as_if_it_had_not(generate, trained):
    """Two halves are the notes of one performance, drawn and steered as at first, to the byte of the state."""
    options = ["--seed", 3, "--temperature", 0.9, "--max-polyphony", 4]
    assert generate("--seconds", 3, *options, "--save-state", "a.safetensors", "--out", "a.mid").code == 0
    assert (
        generate(
            "--from-state", "a.safetensors", "--seconds", 2, "--save-state", "b.safetensors", "--out", "b.mid"
        ).code
        == 0
    )
    steps = played(trained, seed=3, sampling=Sampling(temperature=0.9), processors=[MaxPolyphony(4)])
    first, _ = notes_until(steps, 3)
    second, _ = notes_until(steps, 2)
    tokenizer = checkpoint.load(trained.run)[1]
    assert_same_notes(read_notes("a.mid"), tokenizer.decode(first))
    whole, own = tokenizer.decode(np.concatenate([first, second])), read_notes("b.mid")
    late = whole.take(whole.onset >= G.ticks[first].sum() / 100)
    assert own.pitch.tolist() == late.pitch.tolist()
    assert own.velocity.tolist() == late.velocity.tolist()
    written = json.loads(read_text("b.mid"))
    assert (written["from_state"], written["temperature"]) == ("a.safetensors", 0.9)
    assert written["processors"] == [{"kind": "MaxPolyphony", "keys": 4}]
    assert len(written["from_state_sha256"]) == 64
    sizes = {Path(name).stat().st_size for name in ("a.safetensors", "b.safetensors")}
    assert len(sizes) == 1
    assert generate("--seconds", 5, *options, "--save-state", "c.safetensors", "--out", "c.mid").code == 0
    model = checkpoint.load(trained.run)[0]
    ends = [Player.load(name, model, tokenizer).held for name in ("b.safetensors", "c.safetensors")]
    assert ends[0] == ends[1] or len(read_notes("c.mid")) != len(whole)


def test_a_state_may_branch(generate):
    assert generate("--tokens", 40, "--save-state", "a.safetensors", "--out", "a.mid").code == 0
    assert generate("--from-state", "a.safetensors", "--tokens", 40, "-n", 3, "--out", "b.mid").code == 0
    assert generate("--from-state", "a.safetensors", "--tokens", 40, "--seed", 5, "--out", "c.mid").code == 0
    made = [read_notes(name) for name in ("b-1.mid", "b-2.mid", "b-3.mid", "c.mid")]
    assert all(made[i] != made[j] for i in range(4) for j in range(i))
    assert generate("--tokens", 20, "-n", 2, "--save-state", "two.safetensors", "--out", "d.mid").code == 0
    assert generate("--from-state", "two.safetensors", "--tokens", 20, "--out", "e.mid").code == 0
    assert sorted(path.name for path in Path.cwd().glob("e*.mid")) == ["e-1.mid", "e-2.mid"]
    for options, message in (
        (["-n", 3], "-n 3: two.safetensors has 2 lanes, which go on as they are"),
        (["--seed", 1], "--seed 1: two.safetensors has 2 lanes, which go on as they are"),
        (["--best-of", 5], "--best-of 5: two.safetensors has 2 lanes, which go on as they are"),
    ):
        refused = generate("--from-state", "two.safetensors", "--tokens", 20, *options, "--out", "f.mid")
        assert (refused.code, refused.err) == (2, f"dsmr-mlx: error: {message}\n")
    assert generate("--from-state", "a.safetensors", "--best-of", 3, "--tokens", 20, "--out", "g.mid").code == 0


def test_a_state_is_saved_when_it_is_interrupted(generate, trained, monkeypatch):
    watched(monkeypatch, lambda player, count: count == 30 and signal.raise_signal(signal.SIGINT))
    stopped = generate("--seconds", 600, "--save-state", "a.safetensors", "--out", "a.mid")
    assert stopped.code == 130
    model, tokenizer = checkpoint.load(trained.run)
    assert Player.load("a.safetensors", model, tokenizer).position == 1 + 31


def test_the_prompt_may_be_a_part_of_the_file(generate, trained):
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
    assert read_notes("d.mid") == new, "loudness goes on from the prompt's"
    assert json.loads(read_text("a.mid"))["prompt_start"] == 2.0


def test_reading_a_long_prompt_is_shown(generate, trained, monkeypatch):
    from dsmr_mlx import console

    told = []

    class Shown:
        def __init__(self, title, unit):
            self.title = title

        def __enter__(self):
            return lambda done, total: told.append((self.title, done, total))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(console, "progress", Shown)
    assert generate("--prompt", trained.midi / "0.mid", "--tokens", 5, "--out", "a.mid").code == 0
    reading = [(done, total) for title, done, total in told if title == "reading the prompt"]
    total = reading[-1][1]
    assert [done for done, _ in reading] == [*range(8, total, 8), total]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--from-state", "a.safetensors", "--prompt", "a.mid"],
            "--prompt: not with --from-state, which goes on as it",
        ),
        (["--from-state", "a.safetensors", "--top-k", 3], "--top-k: not with --from-state, which goes on as it was"),
        (["--from-state", "a.safetensors", "--tempo", 1], "--tempo: not with --from-state, which goes on as it was"),
        (["--from-state", "no.safetensors"], "no.safetensors: cannot be read (No such file or directory), expected a"),
        (["--from-state", "text.mid"], "text.mid: cannot be read ("),
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


def test_what_was_made_is_drawn(run, trained):
    ended = run("generate", trained.run, "--seconds", 2, "-n", 2, "--out", "two", "--show")
    assert ended.code == 0, ended.err
    plain = run("generate", trained.run, "--seconds", 2, "-n", 2, "--out", "same")
    assert len(ended.out.splitlines()) > len(plain.out.splitlines()) + 10
    assert all(name in ended.out.split("tokens/s")[-1] for name in ("two/1.mid", "two/2.mid"))
    assert [Path("two", f"{i}.mid").read_bytes() for i in (1, 2)] == [
        Path("same", f"{i}.mid").read_bytes() for i in (1, 2)
    ]
