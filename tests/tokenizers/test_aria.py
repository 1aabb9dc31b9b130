"""Aria's tokenizer: golden vectors of its published behaviour, and properties of all three vocabularies."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.midi_files import midi, note, note_off, note_on, pedal, tempo, track
from support.reference_grammar import first_violation

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import Augmentation, Draw, augment
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.music.midi import CORPUS_LIMITS, read_notes
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.aria.encoding import TimedMusic, decode_events, encode_events
from dsmr_mlx.tokenizers.aria.grids import nearest_step, velocity_steps
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import ENDING, SIZES, vocabulary_of
from dsmr_mlx.tokenizers.keyboard import notes_played
from dsmr_mlx.tokenizers.round_trip import report_tokens

A, B, C = SIZES
FILES = int(os.environ.get("DSMR_ARIA_FILES", 3))  # of MAESTRO
CHORD = [(1000, 480, 60, 64), (1005, 295, 64, 65), (1015, 3, 67, 1), (5995, 105, 72, 127)]
SEGMENTS = [(0, 100, 60), (4994, 106, 61), (4995, 105, 62), (4999, 101, 63), (5000, 100, 64), (20001, 1, 65)]
PEDALLED = [(0, 200, 60), (300, 700, 62), (400, 100, 60), (1500, 100, 65)]
PEDALS = [(100, pedal(127)), (1000, pedal(0)), (1500, pedal(64))]


def file_of(*notes: tuple[int, ...], others=(), tpq: int = 500) -> bytes:
    """A MIDI file of notes (tick, length, pitch, velocity = 80) and other messages; a tick is a millisecond."""
    return midi(track(*(note(*row, *[80][len(row) - 3 :]) for row in notes), *others), tpq=tpq)


def ids_of(data: bytes, size: int = A, programs: bool = False) -> list[int]:
    return AriaTokenizer(size, programs).encode(data).tolist()


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split() if word != "|"]


GOLDEN = {
    "rounding": (CHORD, (), "825 17227 16774 | 877 17227 16756 | 911 17229 16727 | 987 17726 16736"),
    "segments": (
        SEGMENTS,
        (),
        "827 17227 16736 840 17726 16737 853 17726 16736 866 17726 16736 5 879 17227 16736 5 5 5 892 17227 16727",
    ),
    "order": ([(0, 500, 60), (0, 300, 64), (0, 400, 67)], (), "879 17227 16756 918 17227 16766 827 17227 16776"),
    "pedal": (PEDALLED, PEDALS, "827 17227 16826 853 17257 16796 827 17267 16786 892 17377 16736"),
    "half pedal": (
        [(0, 200, 60), (300, 600, 62)],
        [(100, pedal(64)), (600, pedal(63)), (610, pedal(70)), (1200, pedal(10))],
        "827 17227 16786 853 17257 16816",
    ),
    "long": ([(0, 7000, 60), (16000, 100, 61)], (), "827 17227 17226 5 5 5 840 17327 16736"),
    "pedal held": ([(0, 100, 60), (500, 400, 62)], [(50, pedal(127))], "827 17227 16816 853 17277 16766"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    notes, others, events = GOLDEN[name]
    assert ids_of(file_of(*notes, others=others)) == [6, 0, *ids(events), 1]


def test_golden_vectors_with_pedal_tokens():
    data = file_of(*PEDALLED[:2], others=PEDALS[:2])
    assert ids_of(data, B) == ids("6 0 827 17227 16826 17727 17237 853 17257 16796 17728 17327 1")
    assert ids_of(data, C) == ids("6 0 795 2172 1771 2672 2182 821 2202 1741 2673 2272 1")


def test_golden_vector_with_instruments():
    drum, guitar = (note(0, 100, 40, 100, 9), note(0, 100, 50, 100, 1))
    programs = [(0, bytes([0xC1, 25])), (0, bytes([0xC2, 11]))]
    data = midi(track(*programs, [drum[0], guitar[0], drum[1], guitar[1]], note(0, 100, 70, 100, 2)), tpq=500)
    assert ids_of(data, A, True) == [8, 16, *ids("0 16684 17227 4027 17227 16736 1")]
    low = midi(track(note(0, 100, 30, 100, 9), note(0, 100, 60, 80)), tpq=500)
    assert ids_of(low, A, True) == [6, 16, 0, 3, 17227, 827, 17227, 16736, 1]
    assert ids_of(low) == [6, 0, 827, 17227, 16736, 1]  # without programs there are no drums
    with pytest.raises(UserError, match="`programs`: Aria's vocabulary of 17729 ids is for the piano alone"):
        AriaTokenizer(B, True)


def test_golden_vector_with_leading_silence():
    columns = ([12003], [97], [60], [80], [0])
    music = TimedMusic(*map(np.array, columns), np.zeros(0, np.int64), np.zeros(0, bool))
    assert encode_events(music, vocabulary_of(A)).tolist() == [5, 5, 827, 17427, 16736]


def test_golden_vector_of_other_ticks():
    found = ids_of(file_of((0, 1, 60), (5, 5, 62), (481, 479, 64), tpq=480))
    assert found == [6, 0, 827, 17227, 16727, 853, 17227, 16727, 879, 17227 + 50, 16726 + 50, 1]


def test_golden_vector_decoded():
    found = AriaTokenizer(A).decode(ids("6 0 827 17227 16826 828 17277 16826 5 853 17228 16727 1"))
    assert found == Notes([0, 0.5, 5.01], [0.5, 1.5, 5.02], [60, 60, 62], [80, 90, 80])


def test_a_length_is_counted_in_the_tempo_of_its_time():
    """Aria's code counts the stretch back to the last of several tempo changes twice."""
    changes = [(500, tempo(250_000)), (1000, tempo(500_000))]
    found = ids_of(midi(track(*changes, note(0, 100, 60, 80), note(1500, 1000, 62, 80)), tpq=500))
    assert found == [6, 0, 827, 17227, 16736, 853, 17227 + 125, 16726 + 100, 1]


def test_blocks_of_ids():
    for size, name, first in (
        *((A, "piano_0.0", 39), (A, "synth_lead_127.120", 16678), (A, "drum_35", 16679), (A, "Duration_0", 16726)),
        *((A, "Onset_0", 17227), (A, "Prefix_drum", 16), (A, "Prefix_bach", 17), (A, "Prefix_sonata", 29)),
        *((A, "Prefix_jazz", 37), (B, "Pedal_down", 17727), (B, "Pedal_up", 17728), (C, "piano_0.0", 7)),
        *((C, "Duration_0", 1671), (C, "Onset_0", 2172), (C, "Pedal_down", 2672), (C, "<X>", 2674), (A, "<T>", 5)),
    ):
        tokenizer = AriaTokenizer(size)
        assert tokenizer.tokens[first] == name
        assert len(set(tokenizer.tokens)) == tokenizer.vocab_size == size
    assert AriaTokenizer(A).programs is False
    assert AriaTokenizer(A, True).fingerprint == AriaTokenizer(A).fingerprint != AriaTokenizer(B).fingerprint
    for size in ("17728", "x", "1" * 5000):  # more digits than `int` converts
        with pytest.raises(UserError, match=f"`tokenizer` aria:{size}: expected aria:N with N one of 17727, 17729"):
            AriaTokenizer.parse(size, False)
    with pytest.raises(UserError, match="`size` 17728: expected one of Aria's vocabularies, 17727, 17729, 2675 ids"):
        AriaTokenizer(17728)


def searched(value: int, grid: list[int]) -> int:
    """The index that a binary search over the grid meets first of those nearest to the value."""
    low, high, best = 0, len(grid) - 1, 0
    while low <= high:
        middle = (low + high) // 2
        if abs(grid[middle] - value) < abs(grid[best] - value) or (low, high) == (0, len(grid) - 1):
            best = middle
        low, high = (middle + 1, high) if grid[middle] < value else (low, middle - 1)
    return best


@pytest.mark.parametrize("n", [13, 500, 501])
def test_rounding_is_that_of_a_binary_search(n):
    grid, values = list(range(0, 10 * n, 10)), range(0, 10 * n + 20, 1 if n == 13 else 5)
    assert nearest_step(np.array(values), n).tolist() == [searched(value, grid) for value in values]


def test_ties():
    expected = {5: 10, 15: 20, 25: 20, 35: 40, 45: 40, 55: 60, 65: 60, 75: 70, 85: 90, 95: 90, 105: 110, 115: 110}
    assert {v: 10 * int(velocity_steps(np.array(v))) for v in expected} == expected
    assert [10 * int(velocity_steps(np.array(v))) for v in (1, 125, 127)] == [10, 120, 120]
    onsets, durations = (nearest_step(np.arange(5, 10 * n, 10), n) > np.arange(n) for n in (500, 501))
    assert (onsets.sum(), durations[:500].sum()) == (244, 245)
    assert onsets[[0, 1, 2, 3, 30, 31, 32]].tolist() == [False, True, False, True, False, False, True]


@settings(deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 2**32), st.integers(0, 200), st.booleans())
def test_decoding_never_fails(size, seed, n, programs):
    rng = np.random.default_rng(seed)
    v = vocabulary_of(size)
    interesting = [5, v.notes + 13 * 60 + 8, v.onsets, v.durations, v.durations + 10, v.pedal or 0, size - 1, -1, size]
    mixed = np.where(rng.random(n) < 0.7, rng.choice(interesting, n), rng.integers(-5, size + 5, n))
    found = decode_events(mixed, v, programs)
    assert (found.offset > found.onset).all()
    assert programs or found.program is None
    AriaTokenizer(size).decode(mixed.reshape(1, -1))


def test_half_pedal_floods_are_thinned():
    """A pedal that sends a hundred values while it moves gives two events, or none if it holds no note."""
    values = [*range(40, 127), *range(127, 30, -1)]
    flood = [(100 + 3 * i, pedal(value)) for i, value in enumerate(values)]
    for size in (B, C):
        tokenizer = AriaTokenizer(size)
        down, up = vocabulary_of(size).pedal, vocabulary_of(size).pedal + 1
        found = ids_of(file_of((0, 300, 60), others=flood), size)
        assert (found.count(down), found.count(up)) == (1, 1)
        assert down not in ids_of(file_of((0, 50, 60), others=flood), size)
        assert tokenizer.decode(found).offset[0] == pytest.approx(0.1 + 0.003 * (len(range(40, 127)) + 64), abs=0.01)


def test_the_pedal_of_the_drums_is_left_out():
    """As drums are; with 17,727 ids, only the pedal of their own channel extends notes."""
    data = file_of(*PEDALLED[:2], others=[*note(250, 50, 40, 100, 9), (100, pedal(127, 9)), (1400, pedal(0, 9))])
    for size in SIZES:
        assert ids_of(data, size) == ids_of(file_of(*PEDALLED[:2]), size)


def test_the_pedal_is_heard_in_the_notes():
    """Also if the lengths end before it goes up, as a model may write them."""
    v, tokenizer = vocabulary_of(C), AriaTokenizer(C)
    first = v.notes + 13 * 60 + 8
    music = [first, v.onsets, v.durations + 10, v.pedal, v.onsets + 5, first + 13, v.onsets + 20, v.durations + 10]
    up = [v.pedal + 1, v.onsets + 50]
    assert tokenizer.decode(music + up).offset.tolist() == [0.5, 0.5]
    assert tokenizer.decode([*music, first, v.onsets + 30, v.durations + 40, *up]).offset.tolist() == [0.3, 0.5, 0.7]
    assert tokenizer.decode(music).offset.tolist() == [0.2, 0.3]  # it never goes up: until the last event
    assert tokenizer.decode([*music, 5]).offset.tolist() == [5.0, 5.0]


def test_prompts():
    tokenizer = AriaTokenizer(A)
    assert tokenizer.prompt(np.array([], np.int64)).tolist() == [6, 0]
    piece = np.array(ids("6 0 827 17227 16826 4 853 17257 16796 1"))
    assert tokenizer.prompt(piece).tolist() == ids("6 0 827 17227 16826 853 17257 16796")
    labelled = tokenizer.with_prefixes(composer="Chopin", form="étude", genre=None)
    assert labelled.prompt(piece).tolist()[:4] == [6, 20, 32, 0]
    assert [labelled.tokens[i] for i in (20, 32)] == ["Prefix_chopin", "Prefix_étude"]
    assert labelled.fingerprint == tokenizer.fingerprint
    for each in (tokenizer, labelled):
        assert each.prompt(each.prompt(piece)).tolist() == each.prompt(piece).tolist(), "read once more"
    demo = AriaTokenizer(C)
    assert demo.prompt(np.array([], np.int64)).tolist() == [6, 0]
    assert demo.prompt(np.array([6, 0, 795, 2172, 1771, 2672, 2182, 1])).tolist() == [6, 0, 795, 2172, 1771, 2674]
    with pytest.raises(UserError, match="`composer` satyr: expected one of bach, beethoven"):
        tokenizer.with_prefixes(composer="satyr")
    with pytest.raises(UserError, match="`genre` jazz: this vocabulary has no genres"):
        demo.with_prefixes(genre="jazz")


def test_the_first_seconds_have_whole_notes():
    tokenizer = AriaTokenizer(A)
    piece = tokenizer.encode(file_of((0, 900, 60), (500, 900, 62), (1200, 900, 64), (5500, 100, 65)))
    for seconds, notes in ((0.0, 1), (0.49, 1), (0.5, 2), (1.5, 3), (5.0, 3), (6.0, 4)):
        cut = tokenizer.first_seconds(piece, seconds)
        assert len(tokenizer.decode(cut)) == notes
        assert cut[0] == 6
        assert len(cut) == 1 + 3 * notes + (seconds >= 5)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30_000))
def test_seconds_count_from_the_first_note(size, seed, silence):
    """Also if the pedal is down long before it: the same notes are in the first seconds, and the duration is kept."""
    rng, tokenizer = np.random.default_rng(seed), AriaTokenizer(size)
    rows = [(int(t), 200, 60 + i % 12) for i, t in enumerate(np.append(0, 10 * rng.integers(1, 1200, 12)))]
    end = 20_000 + 10 * silence
    later = [(10 * silence + tick, length, pitch) for tick, length, pitch in rows]
    data = file_of(*later, others=[(0, pedal(127)), (end, pedal(0))])
    reading, piece = tokenizer.read(data)
    starts = np.array([tick for tick, *_ in rows]) / 1000
    count, duration = tokenizer.recovered(reading.notes, piece)
    assert count == 13
    assert size == A or duration == pytest.approx(reading.notes.duration, abs=0.02)
    assert tokenizer.seconds(piece) == pytest.approx(starts.max() if size == A else 20.0)
    assert report_tokens(tokenizer, reading.notes, piece).round_trip.onset.max < 0.011
    for seconds in (0.0, 1.0, float(rng.choice(starts)), 12.0):
        cut = tokenizer.first_seconds(piece, seconds)
        assert len(tokenizer.decode(cut)) == np.count_nonzero(starts <= seconds)
        assert tokenizer.seconds(cut) <= seconds + 1e-6


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 12))
def test_an_excerpt_keeps_the_pedal_that_holds_its_notes(size, seed, start):
    """Its notes are those of the file from there on, also if the pedal went down before."""
    rng, tokenizer = np.random.default_rng(seed), AriaTokenizer(size)
    onsets, lengths = 20 * rng.integers(0, 600, 12), 20 * rng.integers(0, 200, 12) + 10
    pedals = [(20 * int(rng.integers(0, 800)), pedal(127 * int(rng.integers(0, 2)))) for _ in range(12)]
    rows = [(int(t), int(length), 60 + i % 5) for i, (t, length) in enumerate(zip(onsets, lengths, strict=True))]
    data = file_of((0, 10, 70), *rows, (12_000, 10, 71), others=[*pedals, (16_000, pedal(0))])
    notes = read_notes(data)
    late = notes.take(notes.onset >= start)
    found = tokenizer.encode_excerpt(data, late)
    if size == A:
        assert np.array_equal(found, tokenizer.encode_notes(late))
    else:
        np.testing.assert_allclose(tokenizer.decode(found).rows, late.from_first_onset().rows, atol=1e-9)


def test_first_seconds_without_a_note_are_refused():
    for size, music in ((A, "6 0 5 5 827 17227 16826 1"), (C, "6 0 2672 2182 5 2673 2272 1"), (C, "6 0 1")):
        with pytest.raises(UserError, match="`seconds` 4: no note begins by then, expected a later time"):
            AriaTokenizer(size).first_seconds(np.array(ids(music)), 4.0)


def test_instruments_are_decoded_as_programs():
    found = AriaTokenizer(A, True).decode(ids("8 16 0 16684 17227 4027 17227 16736 1"))
    assert found.program.tolist() == [DRUMS, 24] or found.program.tolist() == [24, DRUMS]
    assert found.duration == 0.1
    assert len(AriaTokenizer(A).decode(ids("8 16 0 16684 17227 4027 17227 16736 1"))) == 0


def test_programs_of_one_group_are_one_instrument():
    """A guitar and strings are recovered with their group's program; the group of the vibraphone is left out."""
    tokenizer = AriaTokenizer(A, True)
    notes = Notes([0, 0, 1, 2], [1, 1, 2, 2.01], [60, 64, 62, 36], [80, 80, 80, 60], [25, 11, 42, DRUMS])
    piece = tokenizer.encode_notes(notes)
    found = report_tokens(tokenizer, notes, piece).round_trip
    assert (found.given, found.returned, found.matched) == (4, 3, 3)
    assert tokenizer.recovered(notes, piece) == (3, 2.01)


@pytest.mark.parametrize("size", SIZES)
def test_prefixes_and_special_ids_are_counted_in_a_report(size):
    tokenizer, data = AriaTokenizer(size), file_of(*PEDALLED, others=PEDALS)
    report = report_tokens(tokenizer, read_notes(data), tokenizer.encode(data))
    assert (report.compression, sum(report.types.values())) == (1, report.events)
    assert [report.types[name] for name in ("Prefix", "<S>", "<E>", "piano")] == [1, 1, 1, 4]


def test_files_without_notes():
    for programs in (False, True):
        with pytest.raises(UserError, match=r"no .*note"):
            ids_of(midi(track((0, note_off(60))), tpq=500), A, programs)
    with pytest.raises(UserError, match="no note of an instrument that Aria has"):
        ids_of(midi(track((0, bytes([0xC0, 11])), [(0, note_on(60)), (9, note_off(60))]), tpq=500), A, True)


def test_a_long_silence_under_an_early_pedal_is_refused():
    """As long music is: each five seconds of it would be an id. The notes alone are short."""
    begin = 9 * 3_600_000
    data = file_of((begin, 500, 60), others=[(0, pedal(127)), (begin + 900, pedal(0))])
    assert len(AriaTokenizer(A).read(data, CORPUS_LIMITS)[1]) == 6
    for size in (B, C):
        with pytest.raises(UserError, match="32401 s long with its pedal, expected at most 14400 s"):
            AriaTokenizer(size).read(data, CORPUS_LIMITS)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_ids_obey_the_grammar_and_are_kept_by_the_notes(size, seed):
    """Also played event by event, as a stream is."""
    check_piece(AriaTokenizer(size), AriaTokenizer(size).encode(random_file(seed)))


def random_file(seed: int) -> bytes:
    """Up to 30 notes and pedal messages anywhere in 20 seconds."""
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 30, 2)
    rows = zip(rng.integers(0, 20_000, n), rng.integers(1, 7000, n), rng.integers(50, 80, n), strict=True)
    notes = [note(int(t), int(length), int(p), int(rng.integers(1, 128))) for t, length, p in rows]
    times, values = rng.integers(0, 20_000, m).tolist(), rng.integers(0, 128, m).tolist()
    pedals = [(time, pedal(value)) for time, value in zip(times, values, strict=True)]
    return midi(track(*notes, *pedals), tpq=500)


def check_piece(tokenizer: AriaTokenizer, piece: np.ndarray) -> None:
    """Ids obey the grammar, and give the same notes at once, event by event, and after another round trip."""
    grammar, events = tokenizer.event_grammar(), tokenizer.to_events(piece)
    assert first_violation(grammar, events) is None
    assert syntax_errors(piece, tokenizer) == (0, "")
    notes = tokenizer.decode(piece)
    assert notes_played(grammar, events.tolist()) == notes
    again = tokenizer.encode_notes(notes)
    assert steps(tokenizer.decode(again)) == steps(notes)
    assert np.array_equal(tokenizer.encode_notes(tokenizer.decode(again)), again)


def steps(notes: Notes) -> list[list[int]]:
    """The notes in steps of 10 ms from the first onset on; at most 5 s long, the longest length without a pedal."""
    length = np.minimum(notes.offset - notes.onset, 5.0)
    times = (np.rint(100 * (notes.onset - notes.onset[0])), np.rint(100 * length))
    return [column.astype(int).tolist() for column in (*times, notes.pitch, notes.velocity)]


@pytest.mark.maestro
@pytest.mark.parametrize("size", SIZES)
def test_performances(size, maestro_dir):
    tokenizer = AriaTokenizer(size)
    files = sorted(maestro_dir.glob("*/*.mid*"))
    for path in files[:: len(files) // FILES]:
        reading, piece = tokenizer.read(path)
        check_piece(tokenizer, piece)
        known = tokenizer.decode(piece)
        assert np.ptp(known.onset) == pytest.approx(np.ptp(reading.notes.onset), abs=0.011)
        assert np.abs(tokenizer.recovered(reading.notes, piece)[0] - len(reading.notes)) <= len(reading.notes) / 500


@pytest.mark.parametrize("size", SIZES)
def test_augmentation_keeps_the_pedal_and_the_written_lengths(size):
    tokenizer = AriaTokenizer(size)
    piece = tokenizer.encode(file_of(*PEDALLED, (4000, 300, 64), others=PEDALS[:2]))
    assert tokenizer.changed(piece, lambda notes: notes).tolist() == piece.tolist()
    change = Draw(semitones=2, factor=1.4, velocity=20)
    v, found = vocabulary_of(size), tokenizer.changed(piece, change.apply)
    assert [np.count_nonzero(v.index("pedal", found) == i) for i in (0, 1)] == [int(size != A)] * 2
    assert steps(tokenizer.decode(found)) == steps(change.apply(tokenizer.decode(piece)))
    assert syntax_errors(found, tokenizer) == (0, "")
    many = augment(tokenizer, piece, Augmentation(transpose=3, stretch=0.1, velocity=9), 1, 0, 0)
    assert len(tokenizer.decode(many)) == len(tokenizer.decode(piece))


@pytest.mark.parametrize("size", SIZES)
def test_the_end_of_a_training_piece_is_announced(size):
    """Before a whole event, if the piece is long enough and the vocabulary has announcements."""
    tokenizer = AriaTokenizer(size)
    notes = [note(97 * i, 200 + 31 * i, 40 + i % 50) for i in range(80)]
    piece = tokenizer.encode(midi(track(*notes, (50, pedal(127)), (3000, pedal(0))), tpq=500))
    places = set()
    for distance in range(90, 111):
        found = tokenizer.with_announced_end(piece, distance)
        if size == C:
            assert found is piece
            continue
        (place,) = np.flatnonzero(found == ENDING)
        places.add(place)
        assert np.array_equal(np.delete(found, place), piece)
        assert distance <= len(found) - place - 2 <= distance + 2
        assert syntax_errors(found, tokenizer) == (0, "")
        assert tokenizer.decode(found) == tokenizer.decode(piece)
    assert size == C or len(places) > 5
    short = np.append(piece[:152], 1)
    assert tokenizer.with_announced_end(short, 100) is short
    assert ENDING not in tokenizer.prompt(tokenizer.with_announced_end(piece, 100))
