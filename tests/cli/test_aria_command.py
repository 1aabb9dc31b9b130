"""Aria's weights, as a small stand-in, from the file to music; files to a corpus of its ids."""

import json

import numpy as np
import pytest
from support.midi_files import tune, write_midi_files

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.generation.generate import generate, generate_variations
from dsmr_mlx.generation.steering import EndWithin, MaxPolyphony, MaxSilenceSeconds, PitchClasses, Tempo, VelocityRange
from dsmr_mlx.model import checkpoint
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.aria.vocabulary import ENDING, SIZES, TIME_STEP

pytest.importorskip("torch")
from support.foreign_models import write_aria

A, B, C = SIZES


@pytest.fixture(scope="module", params=SIZES[1:])  # the first is the second without <D>
def converted(request, tmp_path_factory):
    """The checkpoint of a vocabulary, converted by the command."""
    from dsmr_mlx.cli import main

    folder = tmp_path_factory.mktemp("aria")
    source = write_aria(folder / "model.safetensors", request.param)
    assert main(["convert", str(source), str(folder / "aria")]) == 0
    return folder / "aria"


@pytest.fixture
def song(tmp_path):
    return write_midi_files(tmp_path, {"song.mid": tune(3, 24)}) / "song.mid"


@pytest.mark.slow
def test_converted_weights_continue_a_file(converted, run, song):
    made = run("generate", converted, "--prompt", song, "--prompt-seconds", 2, "--seconds", 1.5, "--out", "a.mid")
    assert made.code == 0, made.err
    prompt, whole = read_notes(song), read_notes("a.mid")
    first = prompt.take(prompt.onset <= 1.9)
    assert whole.pitch[: len(first)].tolist() == first.pitch.tolist()
    clock = prompt.onset[prompt.onset <= 2.001].max()
    assert clock - 0.02 <= whole.onset.max() <= clock + 1.5 + 0.02
    paused = run("generate", converted, "--seconds", 1, "--save-state", "s.safetensors", "--out", "b.mid", "-n", 2)
    assert paused.code == 0, paused.err
    resumed = run("generate", converted, "--from-state", "s.safetensors", "--seconds", 1, "--out", "c.mid")
    assert resumed.code == 0, resumed.err


@pytest.mark.slow
def test_music_obeys_the_grammar_and_the_limits(converted, song):
    """Prompted or not, as one stream, as notes and steered; without `may_end` no end is announced."""
    model, tokenizer = checkpoint.load(converted)
    prompt = tokenizer.first_seconds(tokenizer.encode(song), 2.0)
    steering = [PitchClasses.key("C major"), VelocityRange(40, 90), MaxPolyphony(3), Tempo(-0.5)]
    for given, processors in ((None, [MaxSilenceSeconds(0.5)]), (prompt, steering)):
        options = {"prompt": given, "seconds": 1.5, "seed": 1, "processors": processors}
        (variation,) = generate_variations(model, tokenizer, **options).variations
        read = tokenizer.prompt(np.array([], np.int64) if given is None else given)
        assert syntax_errors(np.concatenate([read, variation.ids]), tokenizer) == (0, "")
        assert len(variation.notes) > 0
        assert variation.notes.onset.max() <= 1.5
        assert ENDING not in variation.ids
        assert list(generate(model, tokenizer, **options))[: len(variation.ids) - 1] == variation.ids[:-1].tolist()
        streamed = Notes.of(generate(model, tokenizer, **options, as_notes=True))
        assert np.allclose(streamed.rows, variation.notes.rows, atol=1e-6)
    assert set((variation.notes.pitch % 12).tolist()) <= {0, 2, 4, 5, 7, 9, 11}
    assert 40 <= variation.notes.velocity.min() <= variation.notes.velocity.max() <= 90
    times = np.unique(variation.notes.onset)
    sounding = (variation.notes.onset <= times[:, None]) & (variation.notes.offset > times[:, None])
    assert sounding.sum(axis=1).max() <= 3


@pytest.mark.slow
def test_the_end_is_announced_once(converted):
    """By the weights that know the announcement, when the span begins."""
    model, tokenizer = checkpoint.load(converted)
    known = tokenizer.vocab_size != C
    options = {"seconds": 1.6, "may_end": True, "processors": [EndWithin(0.8, 0.8)], "seed": 3}
    (variation,) = generate_variations(model, tokenizer, **options).variations
    places = np.flatnonzero(variation.ids == ENDING)
    assert len(places) == known
    assert variation.notes.duration <= 1.6
    if known:
        before = 0.01 * tokenizer.event_grammar().elapsed(variation.ids[: places[0]])[-1]
        assert 0.8 <= before <= 1.6
        assert tokenizer.decode(variation.ids[: places[0]]).onset[:-1].max(initial=0) <= before


@pytest.mark.slow
def test_time_steps_in_a_row_are_limited(converted):
    """Even if the model likes nothing else."""
    model, tokenizer = checkpoint.load(converted)

    def like_steps(logits, music):
        return logits + 100.0 * (np.arange(tokenizer.vocab_size) == TIME_STEP)

    ids = np.array(list(generate(model, tokenizer, tokens=60, processors=[like_steps])))
    runs = "".join("T" if i == TIME_STEP else " " for i in ids).split()
    assert max(map(len, runs)) == 12


@pytest.mark.slow
def test_labels(converted, run):
    size = checkpoint.load(converted)[1].vocab_size
    made = run("generate", converted, "--composer", "Chopin", "--form", "nocturne", "--tokens", 9, "--out", "a.mid")
    if size == C:
        assert (made.code, made.err) == (2, "dsmr-mlx: error: --composer Chopin: this vocabulary has no composers\n")
        return
    assert made.code == 0, made.err
    stored = json.loads(read_text("a.mid"))
    assert (stored["composer"], stored["form"], "genre" in stored) == ("Chopin", "nocturne", False)
    made = run("generate", converted, "--genre", "polka", "--tokens", 9)
    assert "--genre polka: expected one of jazz, classical" in made.err


@pytest.mark.slow
def test_a_session(converted, run, song):
    """A file is played to the model, which answers; the recording has both, and the player can be saved."""
    played = ["--in-file", song, "--offline", "--max-turn", 1, "--pause", 0.8]
    made = run(
        "live", converted, *played, "--max-silence-seconds", 0.5, "--out-file", "a.mid", "--save-state", "s.safetensors"
    )
    assert made.code == 0, made.err
    prompt, both = read_notes(song), read_notes("a.mid")
    assert both.pitch[: len(prompt)].tolist() == prompt.pitch.tolist()
    assert len(both) > len(prompt)
    again = run("live", converted, *played, "--out-file", "b.mid", "--from-state", "s.safetensors")
    assert again.code == 0, again.err


@pytest.mark.slow
def test_a_gap_is_filled_by_ranking(converted, run, song):
    """The command says that the model is not shown what follows; what is outside stays."""
    made = run("generate", converted, "--prompt", song, "--replace", "1.5-2.5", "--best-of", 2, "--out", "a.mid")
    assert made.code == 0, made.err
    assert "cannot be shown what follows a gap" in made.err
    before, after = (read_notes(path).from_first_onset().rows for path in (song, "a.mid"))
    left = [row for row in after if not 1.5 <= row[0] < 2.5]
    assert np.allclose(left, [row for row in before if not 1.5 <= row[0] < 2.5], atol=1e-3)


@pytest.mark.slow
def test_what_the_vocabulary_cannot_do_is_refused(generate):
    assert "tokenizer performance has no such label" in generate("--genre", "jazz").err
    assert "--composer: not with --from-state" in generate("--composer", "bach", "--from-state", "x").err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aria", "aria:17729", "aria:2675"])
def test_files_become_a_corpus(name, run, tmp_path):
    midi = write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i, 40) for i in range(4)})
    made = run("prepare", midi, "--tokenizer", name, "--out", "corpus")
    assert made.code == 0, made.err
    corpus = Corpus.load("corpus")
    assert corpus.tokenizer.label == (name if ":" in name else f"aria:{A}")
    for piece in corpus.pieces():
        ids = corpus.tokens(piece)
        assert ids.tolist() == corpus.tokenizer.encode(midi / piece.source).tolist()
        assert piece.notes_encoded == piece.notes
    shown = run("tokenize", midi / "0.mid", "--tokenizer", name)
    assert "piano_" in shown.out
    assert "Onset" in shown.out
    assert run("tokenize", midi / "0.mid", "--tokenizer", "aria:9").code == 2
    tiny = ["--set", "max_steps=2", "--set", "eval_every=2", "--set", "sample_seconds=1", "--set", "n_layers=1"]
    tiny += [
        "--set",
        "batch_size=2",
        "--set",
        "horizons=uniform:16",
        "--set",
        "d_model=32",
        "--set",
        "n_heads=1",
        "--set",
        "segment_length=16",
    ]
    trained = run("train", "--data", "corpus", "--out", "run", *tiny)
    assert trained.code == 0, trained.err
