"""Settings in every form that MidiTok saves, a vocabulary that has changed, machines without MidiTok."""

import json
import sys
import warnings

import numpy as np
import pytest
from support.music import on_grid, random_notes
from support.tiny import tiny_config

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.tokenizers.miditok import tokenizer as miditok_tokenizer
from dsmr_mlx.tokenizers.miditok.config import tokenizer_names
from dsmr_mlx.tokenizers.registry import load_tokenizer, make_tokenizer

miditok = pytest.importorskip("miditok")


def write(path, settings) -> str:
    """Write settings, as text or JSON, and return the path."""
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


def notes(seed: int = 0):
    """Return random notes on the grid of 10 ms."""
    return on_grid(random_notes(seed, 60))


def test_every_supported_tokenizer_can_be_made():
    """With unique names and the special tokens that a model needs."""
    for name in tokenizer_names():
        tokenizer = make_tokenizer(f"miditok:{name}")
        assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} == {0, 1, 2}
        assert len(set(tokenizer.tokens)) == tokenizer.vocab_size
    assert {"REMI", "TSD", "MIDILike", "Structured", "PerTok"} <= set(tokenizer_names())
    assert not {"CPWord", "Octuple", "MuMIDI", "MMM"} & set(tokenizer_names())


def test_saved_tokenizers_and_configurations_of_miditok(tmp_path):
    """Files saved by MidiTok give its vocabulary; an object with a few settings changes only those."""
    for config in (miditok.TokenizerConfig(), miditok.TokenizerConfig(num_velocities=8, use_programs=True)):
        theirs = miditok.REMI(config)
        theirs.save(tmp_path / "saved.json")
        theirs.config.save_to_json(tmp_path / "config.json")
        for name in ("saved.json", "config.json"):
            ours = make_tokenizer("miditok:REMI", tmp_path / name)
            assert ours.tokens == tuple(sorted(theirs.vocab, key=theirs.vocab.get))
            assert ours.programs == config.use_programs
    few = make_tokenizer("miditok:TSD", write(tmp_path / "few.json", {"num_velocities": 8, "special_tokens": ["PAD"]}))
    assert sum(token.startswith("Velocity_") for token in few.tokens) == 8
    assert few.tokens[few.bos_id] == "BOS_None"
    assert len(few.decode(few.encode_notes(notes()))) == len(notes())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("REMI", {"foo": 1, "bar": 2}, "unknown setting bar, foo, expected those of MidiTok's TokenizerConfig"),
        ("REMI", "{", r"s\.json: not valid JSON"),
        ("REMI", [1], "a list, expected an object with settings of MidiTok"),
        ("REMI", {"tokenization": "TSD", "config": {}}, "tokenization 'TSD', expected 'REMI'"),
        ("REMI", {"beat_res": {"0-4": 8}}, r"expected the form in which MidiTok saves its settings: \{\"0_2\": 50\}"),
        ("REMI", {"num_velocities": 500}, "`num_velocities` must be within 1 and 127"),
        ("REMI", {"max_bar_embedding": 64}, "does not reproduce the notes that it encodes: 36 in 8.8 s became 36 in"),
        (
            "REMI",
            {"use_programs": True, "programs": [-1], "use_pitchdrum_tokens": True, "drums_pitch_range": [27, 88]},
            "does not reproduce|fails",
        ),
        ("Structured", {"use_key_signatures": True}, "Key signatures are not supported by Structured"),
        (
            "TSD",
            {"use_programs": True, "one_token_stream_for_programs": False},
            "must be true: a piece is one sequence",
        ),
        ("REMI", {"base_tokenizer": "TSD"}, "unknown setting base_tokenizer"),
        ("PerTok", {"use_pitch_intervals": True}, "does not reproduce the notes"),
        (
            "REMI",
            {"special_tokens": [5]},
            r'special_tokens is \[5\], expected a list of names such as \["PAD"',
        ),
        ("REMI", {"special_tokens": None}, "special_tokens is None, expected a list of names"),
        ("REMI", {"special_tokens": "PAD"}, "special_tokens is 'PAD', expected a list of names"),
        ("REMI", {"config": {"special_tokens": [""]}}, r"special_tokens is \[''\], expected a list of names"),
        ("REMI", {"config": 5}, "config is 5, expected an object with settings of MidiTok"),
        ("REMI", {"config": {"additional_params": [1]}}, r"additional_params is \[1\], expected an object"),
        ("REMI", {"additional_params": None}, "additional_params is None, expected an object"),
        ("REMI", {"config": {"additional_params": {"nonsense": 1}}}, "unknown setting nonsense, expected those"),
        ("REMI", {"encode_ids_split": "nonsense"}, "encode_ids_split is 'nonsense', expected one of bar, beat, no"),
        ("REMI", {"encode_ids_split": ["bar"]}, r"encode_ids_split is \['bar'\], expected one of bar, beat, no"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, name, settings, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make_tokenizer(f"miditok:{name}", write(tmp_path / "s.json", settings))
    assert str(tmp_path / "s.json") in str(caught.value)


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^`tokenizer` miditok:Foo: expected one of .*REMI, Structured, TSD"):
        make_tokenizer("miditok:Foo")
    for name in ("foo", "miditok:", "miditok", str(tmp_path)):
        with pytest.raises(UserError, match="expected performance, miditok:NAME"):
            make_tokenizer(name)
    with pytest.raises(
        UserError, match="`tokenizer_config`: needs a MidiTok `tokenizer` such as miditok:REMI, not performance"
    ):
        make_tokenizer("performance", "s.json")
    with pytest.raises(UserError, match="`programs`: needs the `tokenizer` miditok:NAME or aria, not performance"):
        make_tokenizer("performance", programs=True)
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        make_tokenizer("miditok:TSD", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *[(name, "its tokens are compounds of several fields") for name in ("CPWord", "Octuple", "MuMIDI")],
        ("MMM", "it is for bands and encodes one instrument after the other"),
    ],
)
def test_tokenizers_that_need_flattening_are_refused(tmp_path, name, reason):
    """By name, and in a saved tokenizer."""
    expected = f"not supported because {reason}; expected one of BEAT, .*TSD"
    with pytest.raises(UserError, match=f"^`tokenizer` miditok:{name}: {expected}$"):
        make_tokenizer(f"miditok:{name}")
    with pytest.raises(UserError, match=f"^tokenization '{name}': {expected}$"):
        miditok_tokenizer.MidiTokTokenizer({"tokenization": name, "config": {}})


def test_a_saved_tokenizer_that_needs_flattening_is_refused_by_its_file(tmp_path):
    make_tokenizer("miditok:REMI").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"REMI"', '"CPWord"'))
    with pytest.raises(UserError, match=r"tokenizer\.json: tokenization 'CPWord' is not supported because its tokens"):
        load_tokenizer(tmp_path)


@pytest.fixture
def trained_by_miditok(tmp_path):
    """A TSD whose vocabulary MidiTok has extended by pairs."""
    theirs = make_tokenizer("miditok:TSD")._vocabulary.miditok
    for i in range(6):
        (tmp_path / f"{i}.mid").write_bytes(midi_bytes(notes(i)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.train(vocab_size=650, model="BPE", files_paths=[tmp_path / f"{i}.mid" for i in range(6)])
    theirs.save(tmp_path / "trained.json")
    return tmp_path / "trained.json"


def test_learned_ids_of_miditok_stand_for_events(trained_by_miditok, tmp_path):
    tokenizer, base = make_tokenizer("miditok:TSD", trained_by_miditok), make_tokenizer("miditok:TSD")
    assert (tokenizer.vocab_size, base.vocab_size) == (650, 611)
    ids, events = tokenizer.encode_notes(notes()), base.encode_notes(notes())
    assert len(ids) < len(events)
    names = [tokenizer.tokens[event] for event in tokenizer.to_events(ids)]
    assert names == [base.tokens[event] for event in events]
    assert tokenizer.decode(ids) == base.decode(events)
    assert len(tokenizer.decode(ids)) == len(notes())
    tokenizer.save(tmp_path / "saved")
    assert np.array_equal(load_tokenizer(tmp_path / "saved").encode_notes(notes()), ids)
    assert max(map(len, tokenizer.token_events)) == 2


# The vocabulary is stored and verified


def saved(folder, version="2.9", change=None):
    """Save a TSD as another version of MidiTok would, with names of ids changed by `change`."""
    tokenizer = make_tokenizer("miditok:TSD")
    tokenizer.save(folder)
    path = folder / "vocabulary.json"
    content = json.loads(path.read_text()) | {"miditok": version}
    if change:
        content["tokens"] = change(content["tokens"])
        described = json.loads((folder / "tokenizer.json").read_text())
        other = type(tokenizer)(tokenizer.parameters["description"], tuple(content["tokens"]))
        (folder / "tokenizer.json").write_text(json.dumps(described | {"fingerprint": other.fingerprint}))
    path.write_text(json.dumps(content))
    return tokenizer


def test_another_version_with_the_same_ids_is_accepted(tmp_path):
    tokenizer = saved(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_another_version_with_different_ids_is_refused(tmp_path):
    """On loading, with both fingerprints, both versions and the first id that differs."""
    swapped = lambda tokens: [*tokens[:5], tokens[6], tokens[5], *tokens[7:]]  # noqa: E731
    tokenizer = saved(tmp_path, change=swapped)
    recorded = json.loads((tmp_path / "tokenizer.json").read_text())["fingerprint"]
    with pytest.raises(UserError, match="numbers the tokens of TSD differently") as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert f"fingerprint {tokenizer.fingerprint}, expected {recorded} as with MidiTok 2.9" in message
    assert "(id 5 was Pitch_3, is Pitch_2)" in message
    assert str(tmp_path / "vocabulary.json") in message


def test_the_same_version_is_trusted_until_notes_are_encoded(tmp_path):
    saved(tmp_path, miditok_tokenizer.installed(), lambda tokens: [*tokens[:-1], "Program_9"])
    tokenizer = load_tokenizer(tmp_path)
    for use in (lambda: tokenizer.encode_notes(notes()), lambda: tokenizer.decode([5]), tokenizer.event_grammar):
        with pytest.raises(UserError, match=r"numbers the tokens of TSD differently \(id 610 was Program_9"):
            use()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "expected an object with miditok and tokens"),
        ('{"miditok": "3", "tokens": [1]}', "tokens: expected a list of names"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, content, reason):
    saved(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=rf"^{path}: {reason}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (None, "invalid parameters .* \\(`description`: expected MidiTok's tokenization and config"),
        ({"tokenization": "TSD"}, "expected MidiTok's tokenization and config"),
        ({"tokenization": "Foo", "config": {}}, "tokenization 'Foo': expected one of BEAT, MIDILike, .*TSD"),
        ({"tokenization": "TSD", "config": {"beat_res": 3}}, "MidiTok: AttributeError: "),
    ],
)
def test_an_invalid_description_is_refused(tmp_path, description, reason):
    saved(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": {"description": description}}))
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_names_that_contradict_the_fingerprint_are_refused(tmp_path):
    saved(tmp_path, miditok_tokenizer.installed())
    path = tmp_path / "vocabulary.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tokens": [*content["tokens"][:-1], "Other_1"]}))
    with pytest.raises(UserError, match=r"fingerprint .*, expected .*this version has another vocabulary"):
        load_tokenizer(tmp_path)


def test_training_needs_no_miditok(tmp_path, monkeypatch):
    """Without MidiTok a run trains on a corpus, writes no samples and says why."""
    from dsmr_mlx.training.run import train

    tokenizer = make_tokenizer("miditok:TSD")
    with CorpusWriter(tmp_path / "corpus", tokenizer) as writer:
        for i in range(4):
            split = "train" if i < 3 else "validation"
            writer.add(tokenizer.encode_notes(notes(i)), source=f"{i}", split=split, duration=1.0, notes=60)
        writer.commit({})
    monkeypatch.setitem(sys.modules, "miditok", None)
    monkeypatch.setattr(miditok_tokenizer, "installed", lambda: None)
    assert Corpus.load(tmp_path / "corpus").tokenizer.fingerprint == tokenizer.fingerprint
    messages, config = Messages(), tiny_config(max_steps=2, eval_every=2, sample_seconds=1.0)
    train(config, tmp_path / "corpus", tmp_path / "run", callback=messages)
    assert (tmp_path / "run" / "best" / "tokenizer" / "vocabulary.json").is_file()
    assert any("no sample written" in message and "miditok" in message for message in messages.received)


class Messages:
    """Collects the messages of a run."""

    def __init__(self):
        self.received = []

    def on_message(self, run, message):
        """See `Callback.on_message`."""
        self.received.append(message)

    def __getattr__(self, name):
        return lambda *arguments: None
