"""From MIDI to new music with every kind of vocabulary: corpus, training, evaluation, prompts, saved players."""

import math

import numpy as np
import pytest
from midi_files import write_folder
from test_instruments import random_band
from tiny import tiny_config

import dsmr_mlx
from dsmr_mlx.augmentation import Augmentation, augment
from dsmr_mlx.corpus import Corpus
from dsmr_mlx.errors import UserError
from dsmr_mlx.evaluation import evaluate
from dsmr_mlx.midi import midi_bytes
from dsmr_mlx.player import Player
from dsmr_mlx.prepare import prepare
from dsmr_mlx.tokenizer import make_tokenizer
from dsmr_mlx.train import train

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

KINDS = {
    "REMI": ("miditok:REMI", True, None),
    "MIDILike": ("miditok:MIDILike", False, None),
    "Octuple": ("miditok:Octuple", True, None),
    "subwords": ("performance", False, "bpe:400"),
    "TSD subwords": ("miditok:TSD", True, "bpe:820"),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A corpus of music of several instruments, and a run of three steps with augmentation."""
    name, programs, subwords = KINDS[request.param]
    folder = tmp_path_factory.mktemp("made")
    midi = write_folder(folder / "midi", {f"{i}.mid": midi_bytes(random_band(i, 40)) for i in range(6)})
    tokenizer = make_tokenizer(name, programs=programs)
    prepare(midi, folder / "corpus", tokenizer=tokenizer, subwords=subwords, validation_fraction=0.3)
    config = tiny_config(max_steps=3, eval_every=3, augment_transpose=2, augment_stretch=0.05, sample_seconds=1.0)
    train(config, folder / "corpus", folder / "run")
    return folder


def test_a_checkpoint_carries_its_vocabulary(made):
    model, tokenizer = dsmr_mlx.load(made / "run")
    corpus = Corpus.load(made / "corpus")
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert model.config.vocab_size == tokenizer.vocab_size
    evaluation = evaluate(model, corpus)
    assert math.isfinite(evaluation.perplexity)
    assert evaluation.notes == sum(piece.notes for piece in corpus.pieces("validation"))


def test_new_music_after_a_prompt_is_music_of_the_vocabulary(made):
    """From ids and from notes; the same again from a player that was saved in between."""
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


def test_pieces_are_augmented_as_notes(made):
    """Pitches of all instruments but drums move by the same number of semitones; a draw of nothing changes nothing."""
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


def test_a_corpus_of_another_vocabulary_is_refused_and_both_are_named(made, run):
    checkpoint, corpus = made / "run", Corpus.load(made / "corpus")
    midi = made / "midi"
    assert run("prepare", midi, "--out", "other").code == 0
    done = run("evaluate", checkpoint, "--data", "other")
    assert done.code == 2
    for fingerprint in (corpus.tokenizer.fingerprint, Corpus.load("other").tokenizer.fingerprint):
        assert fingerprint[:12] in done.err
    with pytest.raises(UserError, match=r"vocabulary [0-9a-f]{12}, the corpus .* has [0-9a-f]{12}: not the same"):
        train(tiny_config(max_steps=1, init=str(checkpoint)), "other", "new")
