"""`dsmr-mlx generate` with steering options: their effect, what the files store, refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dsmr_mlx.generation.generate import generate_variations, make_limits
from dsmr_mlx.generation.options import STEERING_OPTIONS
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.ranking import best, score
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.generation.steering import EndWithin, MaxPolyphony, PitchRange, Tempo, from_dicts
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.tokenizers.performance import encode_notes


@pytest.mark.slow
def test_limits_hold_in_the_file(generate):
    limits = ["--pitch-range", "C3-B4", "--key", "Eb major", "--velocity-range", "30-60", "--max-polyphony", 3]
    made = generate("--tokens", 120, *limits, "--max-note-seconds", 0.5, "--out", "a.mid")
    assert (made.code, made.err) == (0, "")
    notes = read_notes("a.mid")
    assert len(notes) > 10
    assert 48 <= notes.pitch.min() <= notes.pitch.max() <= 71
    assert set((notes.pitch % 12).tolist()) <= {3, 5, 7, 8, 10, 0, 2}
    assert 30 <= notes.velocity.min() <= notes.velocity.max() <= 60
    assert (notes.offset - notes.onset).max() <= 0.5 + 1e-6
    for moment in notes.onset + 0.001:
        assert ((notes.onset <= moment) & (moment < notes.offset)).sum() <= 3


def test_pitch_classes(generate):
    assert (
        generate("--tokens", 60, "--pitch-classes", "C,E,7", "--avoid-pitch-classes", "4", "--out", "a.mid").code == 0
    )
    assert set((read_notes("a.mid").pitch % 12).tolist()) == {0, 7}


def test_end_within(generate):
    made = generate("--seconds", 1, "--end-within", 2, "--out", "a.mid")
    assert made.code == 0
    assert json.loads(read_text("a.mid"))["seconds"] == 1.0
    notes = read_notes("a.mid")
    assert notes.offset.max() <= 3 + 1e-6


def test_the_file_stores_the_steering_that_reproduces_it(generate, trained):
    options = ["--tokens", 40, "--seed", 5, "--tempo", -0.5, "--max-polyphony", 2, "--pitch-range", "40-90"]
    assert generate(*options, "--temperature", "0:1.2,1:0.8", "--out", "a.mid").code == 0
    written = json.loads(read_text("a.mid"))
    assert written["temperature"] == [[0.0, 1.2], [1.0, 0.8]]
    assert written["processors"] == [
        {"kind": "PitchRange", "low": 40, "high": 90},
        {"kind": "MaxPolyphony", "keys": 2},
        {"kind": "Tempo", "bias": -0.5},
    ]
    assert not set(STEERING_OPTIONS) & set(written)
    model, tokenizer = checkpoint.load(trained.run)
    processors = from_dicts(written["processors"])
    assert processors == [PitchRange(40, 90), MaxPolyphony(2), Tempo(-0.5)]
    sampling = Sampling(temperature=written["temperature"])
    again = generate_variations(model, tokenizer, tokens=40, seed=5, sampling=sampling, processors=processors)
    assert np.array_equal(encode_notes(read_notes("a.mid")), encode_notes(again.variations[0].notes))


BIASES = [("--pitch-temperature", 0.2), ("--tonality", 3), ("--tempo", 2), ("--dynamics", 9), ("--density", 2)]


@pytest.mark.slow
def test_biases_change_the_music(generate):
    assert generate("--tokens", 30, "--out", "free.mid").code == 0
    free = Path("free.mid").read_bytes()
    assert "processors" not in json.loads(read_text("free.mid"))
    for option, value in (*BIASES, ("--loop-penalty", 5)):
        assert generate("--tokens", 30, option, value, "--out", "a.mid", "--force").code == 0
        (processor,) = json.loads(read_text("a.mid"))["processors"]
        assert value in processor.values()
        assert read_notes("a.mid") != read_notes("free.mid") or option == "--loop-penalty"
    assert generate("--tokens", 30, "--out", "free.mid", "--force").code == 0
    assert Path("free.mid").read_bytes() == free


@pytest.mark.slow
def test_best_of_keeps_the_best(generate, trained):
    options = ["--tokens", 50, "--seed", 2]
    made = generate(*options, "--best-of", 5, "-n", 2, "--out", "a.mid")
    assert made.code == 0
    model, tokenizer = checkpoint.load(trained.run)
    candidates = generate_variations(model, tokenizer, 5, tokens=50, seed=2).variations
    limits, player = make_limits(tokenizer, None, 50, False), Player(model, tokenizer)
    scores = [score(player, candidate.ids, limits) for candidate in candidates]
    kept = best(scores, 2)
    for rank, i in enumerate(kept, start=1):
        written = json.loads(read_text(f"a-{rank}.mid"))
        assert (written["best_of"], written["n"], written["variation"], written["candidate"]) == (5, 2, rank, i + 1)
        assert written["score"]["nats_per_note"] == pytest.approx(scores[i].nats_per_note, rel=1e-5)
        assert np.array_equal(encode_notes(read_notes(f"a-{rank}.mid")), encode_notes(candidates[i].notes)), (
            "the file holds the candidate in the table"
        )
    table = made.out.partition("\n\n")[0]
    rows = {int(row[0]): row for row in map(str.split, table.splitlines()[1:])}
    assert sorted(rows) == [1, 2, 3, 4, 5]
    for i, row in rows.items():
        assert row[1] == f"{scores[i - 1].nats_per_note:.3f}"
        assert (row[-1] == f"a-{kept.index(i - 1) + 1}.mid") if i - 1 in kept else not row[-1].endswith(".mid")


def test_best_of_with_end_within(generate):
    made = generate("--seconds", 0.5, "--end-within", 1, "--best-of", 2, "--out", "a.mid")
    assert (made.code, made.err) == (0, "")
    assert from_dicts(json.loads(read_text("a.mid"))["processors"]) == [EndWithin(0.5, 1.0)]


WRONG = {
    "--temperature hot": "--temperature hot: expected a number, or pairs SECONDS:TEMPERATURE such as 0:1.2,30:0.9",
    "--temperature 0:1,2": "--temperature 0:1,2: expected a number, or pairs",
    "--temperature 5:1,5:2": "--temperature 5:1,5:2: expected a number, or pairs",
    "--temperature 1e39": "--temperature 1e39: expected at most 1e+38",
    "--temperature 0:0,3:1e39": "--temperature 0:0,3:1e39: expected at most 1e+38",
    "--temperature 0:1,1e39:1": "expected a number, or pairs (seconds, temperature) with rising seconds from 0 to",
    "--tempo 1e38": "--tempo 1e+38: expected at most 1,000,000, and at least −1,000,000",
    "--loop-penalty 1e39": "--loop-penalty 1e+39: expected at most 1,000,000",
    "--temperature -1": "--temperature -1: expected 0 or more",
    "--top-p 2": "--top-p 2.0: expected more than 0 and at most 1",
    "--pitch-range 60": "--pitch-range 60: expected two pitches such as 48-84 or C3-C6",
    "--pitch-range 84-48": "--pitch-range 84-48: expected MIDI pitches 0 ≤ low ≤ high ≤ 127",
    "--pitch-range 60-60 --pitch-classes 1": "processors: PitchRange, PitchClasses together forbid every key",
    "--key H-dur": "--key H-dur: 'H-dur': expected a tonic from A to G and one of major, minor",
    "--pitch-classes 12": "--pitch-classes 12: '12': expected a pitch class, 0 to 11 or a name such as C, F# or Bb",
    "--avoid-pitch-classes 0,1,2,3,4,5,6,7,8,9,10,11": "expected at least one remaining pitch class",
    "--velocity-range loud": "--velocity-range loud: expected two numbers such as 30-90",
    "--velocity-range 0-20": "--velocity-range 0-20: expected MIDI velocities 1 ≤ low ≤ high ≤ 127",
    "--velocity-range 60-61": "VelocityRange: 60 to 61 contains none of the vocabulary's velocities: 2, 6,",
    "--max-polyphony 99999999999": "--max-polyphony 99999999999: expected at most 1,000,000",
    "--max-polyphony 0": "--max-polyphony 0: expected at least 1",
    "--max-polyphony two": "argument --max-polyphony: found 'two', expected a whole number",
    "--max-note-seconds 0": "--max-note-seconds 0.0: expected more than 0",
    "--end-within 0": "--end-within 0.0: expected more than 0",
    "--end-within 5 --tokens 30": "--end-within 5: expected --seconds, not --tokens",
    "--pitch-temperature 0": "--pitch-temperature 0.0: expected at least 0.01",
    "--tonality nan": "--tonality nan: expected a finite number",
    "--tempo nan": "--tempo nan: expected a finite number",
    "--dynamics inf": "--dynamics inf: expected a finite number",
    "--density 0": "--density 0.0: expected more than 0",
    "--loop-penalty -1": "--loop-penalty -1.0: expected 0 or more",
    "--best-of 2 -n 3": "--best-of 2: expected at least 3, the number to keep (-n)",
    "--best-of 0": "--best-of 0: expected at least 1, the number to keep (-n)",
}


@pytest.mark.parametrize("options", WRONG)
def test_invalid_options_are_a_one_line_error_and_write_nothing(generate, options):
    result = generate(*options.split())
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"dsmr-mlx( \w+)?: error: [^\n]+\n", result.err), result.err
    assert WRONG[options] in result.err
    assert not list(Path.cwd().iterdir())
