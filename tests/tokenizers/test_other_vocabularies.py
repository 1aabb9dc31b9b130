"""From MIDI to new music with every kind of vocabulary: corpus, training, evaluation, prompts, saved players."""

import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from support.bands import random_band
from support.midi_files import write_midi_files
from support.tiny import tiny_config
from support.vocabularies import NAMES, figures, music_for, vocabulary

import dsmr_mlx
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import Augmentation, augment
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.training import samples
from dsmr_mlx.training.run import Callback, train

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

KINDS = {
    "REMI": ("miditok:REMI", True, None),
    "MIDILike": ("miditok:MIDILike", False, None),
    "subwords": ("performance", False, "bpe:400"),
    "TSD subwords": ("miditok:TSD", True, "bpe:886"),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A corpus of music of several instruments, and a run of three steps with augmentation."""
    name, programs, subwords = KINDS[request.param]
    folder = tmp_path_factory.mktemp("made")
    midi = write_midi_files(folder / "midi", {f"{i}.mid": midi_bytes(random_band(i, 40)) for i in range(6)})
    tokenizer = make_tokenizer(name, programs=programs)
    prepare(midi, folder / "corpus", tokenizer=tokenizer, subwords=subwords, validation_fraction=0.3)
    config = tiny_config(max_steps=3, eval_every=3, augment_transpose=2, augment_stretch=0.05, sample_seconds=1.0)
    train(config, folder / "corpus", folder / "run")
    return folder


@pytest.mark.slow
def test_a_checkpoint_carries_its_vocabulary(made):
    model, tokenizer = dsmr_mlx.load(made / "run")
    corpus = Corpus.load(made / "corpus")
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert model.config.vocab_size == tokenizer.vocab_size
    evaluation = evaluate(model, corpus)
    assert math.isfinite(evaluation.perplexity)
    assert evaluation.notes == sum(piece.notes for piece in corpus.pieces("validation"))


@pytest.mark.slow
def test_generation_after_a_prompt(made):
    """Prompts of ids and of notes give the same music, as does a player that was saved and loaded."""
    model, tokenizer = dsmr_mlx.load(made / "run")
    notes = random_band(50, 20)
    ids = tokenizer.encode_notes(notes)
    options = {"tokens": 30, "seed": 3}
    new = list(dsmr_mlx.generate(model, tokenizer, prompt=notes, **options))
    assert new == list(dsmr_mlx.generate(model, tokenizer, prompt=ids, **options))
    assert all(0 <= i < tokenizer.vocab_size for i in new)
    whole = tokenizer.decode(np.concatenate([tokenizer.prompt(ids), new]))
    assert (whole.program is not None) == tokenizer.programs
    assert len(whole) >= 0.8 * len(tokenizer.decode(ids))
    assert midi_bytes(whole)

    player = Player(model, tokenizer, seed=3)
    player.read(ids)
    player.save(made / "player.safetensors")
    loaded = Player.load(made / "player.safetensors", model, tokenizer)
    first, second = (([int(step[0]) for step, _ in zip(p.play(), range(12), strict=False)]) for p in (player, loaded))
    assert first == second


@pytest.mark.slow
def test_pieces_are_augmented_as_notes(made):
    """All instruments except drums are transposed by the same interval; an augmentation of nothing changes nothing."""
    corpus = Corpus.load(made / "corpus")
    tokenizer, piece = corpus.tokenizer, corpus.tokens(corpus.pieces("train")[0])
    assert augment(tokenizer, piece, Augmentation(), 0, 0, 0) is piece
    before = tokenizer.decode(piece)
    moved = {0}
    for epoch in range(8):
        after = tokenizer.decode(augment(tokenizer, piece, Augmentation(transpose=2), 0, epoch, 0))
        pitched = slice(None) if before.program is None else before.program != 128
        difference = np.unique(np.sort(after.pitch[pitched]).astype(int) - np.sort(before.pitch[pitched]))
        assert len(difference) == 1
        moved.add(int(difference[0]))
    assert len(moved) > 2


def test_a_corpus_of_another_vocabulary_is_refused_with_both_fingerprints(made, run):
    checkpoint, corpus = made / "run", Corpus.load(made / "corpus")
    midi = made / "midi"
    assert run("prepare", midi, "--out", "other").code == 0
    done = run("evaluate", checkpoint, "--data", "other")
    assert done.code == 2
    for fingerprint in (corpus.tokenizer.fingerprint, Corpus.load("other").tokenizer.fingerprint):
        assert fingerprint[:12] in done.err
    with pytest.raises(UserError, match=r"vocabulary [0-9a-f]{12}, the corpus .* has [0-9a-f]{12}: not the same"):
        train(tiny_config(max_steps=1, init=str(checkpoint)), "other", "new")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_writes_samples_in_every_vocabulary(name, tmp_path, monkeypatch):
    """A validation writes a MIDI file; without a clock its length is a number of tokens."""
    tokenizer, messages = vocabulary(name), []
    with CorpusWriter(tmp_path / "corpus", tokenizer) as writer:
        for i, split in enumerate(("train", "train", "validation")):
            piece = music_for(name, i, 12)
            ids = tokenizer.encode_notes(piece)
            writer.add(ids, source=f"{i}.mid", split=split, duration=piece.duration, notes=len(piece))
        writer.commit({})
    monkeypatch.setattr(samples, "MAX_TOKENS", 60)
    monkeypatch.setattr(samples, "UNTIMED_TOKENS", 30)
    callback = Callback()
    callback.on_message = lambda run, message: messages.append(message)
    config = tiny_config(max_steps=1, eval_every=1, n_layers=1, horizons="uniform:8", sample_seconds=0.5)
    train(config, tmp_path / "corpus", tmp_path / "run", callback=callback)
    assert messages == []
    notes = read_notes(tmp_path / "run" / "samples" / "step-00000001.mid", programs=True, allow_empty=True)
    assert (notes.offset > notes.onset).all()


SETTINGS = [
    f"--set={s}" for s in ("d_model=16", "n_layers=1", "n_heads=2", "head_dim=8", "d_ff=16", "horizons=uniform:8")
]
SETTINGS += [f"--set={s}" for s in ("segment_length=16", "batch_size=2", "sample_seconds=0", "eval_every=2")]
STEPS = ["--preset", "tiny", *SETTINGS, "--max-steps", 2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--tokenizer", "miditok:REMI"], ["--subwords", "bpe:500"]], ids=["REMI", "bpe"])
def test_from_files_to_files_by_the_commands(run, options):
    """prepare, train, evaluate, generate, pause and resume, live, assess, tokenize."""
    write_midi_files(Path("midi"), {f"{i}.mid": midi_bytes(figures(i, 8)) for i in range(5)})

    def succeed(*arguments: object) -> Namespace:
        done = run(*arguments)
        assert done.code == 0, done.err
        return done

    succeed("prepare", "midi", "--out", "corpus", "--validation-fraction", 0.3, *options)
    succeed("train", "--data", "corpus", "--out", "run", *STEPS)
    assert "perplexity" in succeed("evaluate", "run", "--data", "corpus").out
    prompted = ["generate", "run", "--prompt", "midi/0.mid", "--prompt-seconds", 2.5, "--seed", 1]
    succeed(*prompted, "--tokens", 60, "--out", "whole.mid")
    succeed(*prompted, "--tokens", 60, "--out", "again.mid", "-n", 2, "--continuation-only", "--show")
    succeed(*prompted, "--seconds", 1, "--out", "best.mid", "--best-of", 3)
    given, whole = read_notes("midi/0.mid"), read_notes("whole.mid")
    assert len(whole) > (given.onset < 2.5).sum() > 10
    assert np.allclose(whole.onset[:10], given.onset[:10], atol=0.006)
    succeed(*prompted, "--tokens", 30, "--save-state", "state.safetensors", "--out", "first.mid")
    succeed("generate", "run", "--from-state", "state.safetensors", "--tokens", 30, "--out", "second.mid")
    first, second = (read_notes(name, allow_empty=True) for name in ("first.mid", "second.mid"))
    assert len(first) + len(second) > (given.onset < 2.5).sum()
    live = run("live", "run", "--in-file", "midi/1.mid", "--offline", "--out-file", "live.mid", "--max-turn", 1)
    if "--subwords" in options:
        assert live.code == 0, live.err
        assert len(read_notes("live.mid")) >= len(read_notes("midi/1.mid"))
    else:
        assert live.code == 2
        assert "tokenizer miditok:REMI: a note has a length, unknown while its key is down" in live.err
    shown = succeed("assess", "whole.mid", "again-1.mid", "--reference", "corpus", "--json").out
    assert json.loads(shown)
    shown = succeed("tokenize", "midi/2.mid", "--tokenizer", "corpus", "--json").out
    assert json.loads(shown)["tokens"]
