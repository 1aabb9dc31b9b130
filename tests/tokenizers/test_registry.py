"""The interface of tokenizers, saved tokenizers that have changed, and vocabularies of ids alone."""

import itertools
import json
import pickle
import re

import mlx.core as mx
import numpy as np
import pytest
from support.midi_files import tune
from support.stand_ins import constant_model, tiny_model

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import generate, generate_variations
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, decode_ids, encode_notes
from dsmr_mlx.tokenizers.registry import load_tokenizer


def test_a_piece_has_bos_and_eos_and_round_trips():
    tokenizer = PerformanceTokenizer()
    notes = read_notes(tune())
    ids = tokenizer.encode(tune())
    assert ids.dtype == tokenizer.dtype == np.uint16
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert np.array_equal(ids[1:-1], encode_notes(notes))
    assert np.array_equal(tokenizer.encode_notes(notes), ids)
    assert tokenizer.decode(ids) == decode_ids(ids)
    assert np.array_equal(tokenizer.encode_notes(tokenizer.decode(ids)), ids)
    assert tokenizer.encode_notes(Notes.empty()).tolist() == [1, 2]
    assert tokenizer.tokens[ids[1]].startswith("VELOCITY_")
    assert tokenizer.vocab_size == tokenizer.event_grammar().allowed.shape[1] == 393


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "bad.mid"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.mid: not a readable MIDI file"):
        PerformanceTokenizer().encode(path)


def test_the_fingerprint_of_the_performance_vocabulary():
    # every checkpoint and corpus refers to this value
    expected = "119a270226fadb52d0e847f29f015993051441efe5b92d07045f7add766cf03d"
    assert PerformanceTokenizer().fingerprint == expected
    assert pickle.loads(pickle.dumps(PerformanceTokenizer())).fingerprint == expected

    class Renamed(PerformanceTokenizer):
        tokens = (*PerformanceTokenizer.tokens[:-1], "OTHER")

    class Revised(PerformanceTokenizer):
        version = 3

    assert len({expected, Renamed().fingerprint, Revised().fingerprint}) == 3


def test_saved_and_loaded(tmp_path):
    PerformanceTokenizer().save(tmp_path / "a" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert isinstance(loaded, PerformanceTokenizer)
    assert [path.name for path in (tmp_path / "a" / "tokenizer").iterdir()] == ["tokenizer.json"]
    loaded.save(tmp_path / "a" / "tokenizer")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    for text in ("", "{", "[]", "null", "{}", '{"kind": "performance"}', "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"tokenizer\.json: (not valid JSON|keys .* expected)"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint 0{64}, expected 119a2702"),
        ({"kind": "other"}, "kind 'other', expected one of 'performance'"),
        ({"kind": ["performance"]}, r"kind \['performance'\], expected one of"),
        ({"parameters": {"bins": 64}}, r"invalid parameters \{'bins': 64\}"),
        ({"parameters": None}, "invalid parameters None"),
        ({"format": 2}, "format 2, expected 1"),
        ({"extra": 1}, "keys .*'extra'.* expected"),
    ],
)
def test_changed_descriptions_are_refused(tmp_path, change, reason):
    PerformanceTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def test_an_earlier_version_is_refused_by_name(tmp_path):
    """Also as the base of subwords; the fingerprint of version 1 is computed as it was."""

    class First(PerformanceTokenizer):
        version = 1
        tokens = PerformanceTokenizer.tokens[:-2]

    First().save(tmp_path)
    message = (
        f"{tmp_path / 'tokenizer.json'}: version 1 of the performance vocabulary, expected version 2: "
        "prepare the corpus again and train a new model, or use a bundled one"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_tokenizer(tmp_path)


SPECIALS = [{}, {"eos_id": 0}, {"pad_id": 3, "bos_id": 0, "eos_id": 1}, {"bos_id": 2, "eos_id": 2}, {"pad_id": 6}]
SHARED = [{"pad_id": 2, "bos_id": 1, "eos_id": 2}, {"pad_id": 0, "bos_id": 0, "eos_id": 0}]
GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("special", [*SPECIALS, *SHARED])
def test_a_vocabulary_of_ids_is_saved_and_loaded(tmp_path, special):
    tokenizer = IdTokenizer(70_000, "aria", **special)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, IdTokenizer)
    assert loaded.parameters == tokenizer.parameters
    assert (loaded.fingerprint, loaded.vocab_size, loaded.dtype) == (tokenizer.fingerprint, 70_000, np.uint32)
    known = {"pad_id": loaded.pad_id, "bos_id": loaded.bos_id, "eos_id": loaded.eos_id}
    assert known == dict.fromkeys(known) | special
    assert pickle.loads(pickle.dumps(loaded)).fingerprint == tokenizer.fingerprint


def test_the_fingerprint_of_ids_depends_on_all_parameters():
    tokenizers = [IdTokenizer(9, "aria", **special) for special in (*SPECIALS, *SHARED)]
    tokenizers += [IdTokenizer(10, "aria"), IdTokenizer(9, "other")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"vocab_size": 0}, "`vocab_size` 0: expected an integer from 1 to 4,194,304"),
        ({"vocab_size": 1 << 25}, "`vocab_size` 33554432: expected"),
        ({"vocab_size": True}, "`vocab_size` True: expected"),
        ({"vocab_size": "9"}, "`vocab_size` '9': expected"),
        ({"name": " "}, "`name` ' ': expected the name of the vocabulary"),
        ({"name": 3}, "`name` 3: expected the name"),
        ({"pad_id": 9}, "`pad_id` 9: expected an integer from 0 to 8, or none"),
        ({"bos_id": -1}, "`bos_id` -1: expected"),
        ({"eos_id": 1.0}, "`eos_id` 1.0: expected"),
    ],
)
def test_invalid_parameters_of_ids_are_refused(tmp_path, parameters, reason):
    with pytest.raises(UserError, match=reason):
        IdTokenizer(**{"vocab_size": 9, "name": "aria"} | parameters)
    IdTokenizer(9, "aria").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["parameters"] |= parameters
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=rf"tokenizer\.json: invalid parameters .* \({reason}"):
        load_tokenizer(tmp_path)


def test_ids_alone_cannot_be_decoded_and_the_message_says_what_works():
    tokenizer = IdTokenizer(9, "aria", bos_id=0)
    works = r"the vocabulary of aria is not part of this program: .*dsmr_mlx\.generate\(model, tokenizer, prompt=ids"
    for call in (
        lambda: tokenizer.encode(tune()),
        lambda: tokenizer.encode("nowhere.mid"),
        lambda: tokenizer.encode_notes(Notes.empty()),
        lambda: generate(tiny_model(9), tokenizer, prompt=read_notes(tune()), tokens=3),
        lambda: generate(tiny_model(9), tokenizer, tokens=3, as_notes=True),
    ):
        with pytest.raises(UserError, match=works):
            call()
    for ids in ([], [1, 2], np.array([-5, 10**12]), np.zeros((2, 3))):
        assert tokenizer.decode(ids) == Notes.empty()
    assert not tokenizer.decodes
    assert PerformanceTokenizer().decodes
    assert PerformanceTokenizer().why_not == ""


def greedy_reference(model, prompt: list[int], n: int, excluded: list[int]) -> list[int]:
    """Return the most likely ids, each computed from the whole sequence."""
    ids = list(prompt)
    for _ in range(n):
        logits = np.array(model(mx.array([ids]))[0][0, -1])
        logits[excluded] = -np.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("special", [*SPECIALS, *SHARED])
@pytest.mark.parametrize("prompt", [[5], [4, 0, 1, 2, 3, 6, 4]])
def test_ids_continue_an_unchanged_prompt(special, prompt):
    """Special ids in a prompt stay in place; none is drawn; EOS comes after the limit if it is known."""
    model, tokenizer = tiny_model(7), IdTokenizer(7, "aria", **special)
    expected = greedy_reference(model, prompt, 40, excluded=list(special.values()))
    expected += [special["eos_id"]] if "eos_id" in special else []
    assert list(generate(model, tokenizer, prompt=prompt, tokens=40, sampling=GREEDY)) == expected
    report = generate_variations(model, tokenizer, 2, prompt=prompt, tokens=40, sampling=GREEDY)
    assert [variation.ids.tolist() for variation in report.variations] == [expected, expected]
    assert all(variation.ids.dtype == np.int64 for variation in report.variations)
    assert report.tokens == 2 * len(expected)
    assert report.prompt_tokens == len(prompt)


@pytest.mark.parametrize("special", [{"eos_id": 0}, {"eos_id": 3, "bos_id": 3}, {"eos_id": 3, "pad_id": 3}])
def test_lanes_of_ids_end_by_themselves_if_eos_is_known(special):
    """Also if PAD is unknown or equals EOS: ids drawn for an ended lane are dropped."""
    tokenizer, eos = IdTokenizer(7, "aria", **special), special["eos_id"]
    model = constant_model(np.where(np.arange(7) == eos, 0.5, 0.0))
    report = generate_variations(model, tokenizer, 6, prompt=[5], tokens=60, may_end=True)
    lanes = [variation.ids.tolist() for variation in report.variations]
    assert all(lane.index(eos) == len(lane) - 1 for lane in lanes)
    assert len({len(lane) for lane in lanes}) > 2
    assert report.tokens == sum(map(len, lanes))
    alone = list(generate(model, tokenizer, prompt=[5]))
    assert alone.index(eos) == len(alone) - 1


def test_ids_begin_without_a_prompt_only_if_bos_is_known():
    model = tiny_model(7)
    begun = generate(model, IdTokenizer(7, "aria", bos_id=2), tokens=9, sampling=GREEDY)
    assert list(begun) == greedy_reference(model, [2], 9, excluded=[2])
    for prompt in (None, []):
        with pytest.raises(
            UserError, match="`prompt`: empty, expected ids: the BOS of the vocabulary of aria is unknown"
        ):
            generate(model, IdTokenizer(7, "aria"), prompt=prompt, tokens=9)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"may_end": True}, {"tokens": 5, "may_end": True}])
def test_ids_without_a_known_end_need_a_number_of_tokens(options):
    model, tokenizer = tiny_model(7), IdTokenizer(7, "aria")
    with pytest.raises(UserError, match="tokenizer ids: its EOS is unknown, expected `tokens` without `may_end`"):
        generate(model, tokenizer, prompt=[1], **options)
    with pytest.raises(UserError, match="tokenizer ids: its tokens have no known duration"):
        generate(model, tokenizer, prompt=[1], seconds=3, **options)
    endless = generate(model, tokenizer, prompt=[1], tokens=10**12)
    assert len(list(itertools.islice(endless, 50))) == 50
