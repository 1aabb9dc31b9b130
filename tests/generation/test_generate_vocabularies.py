"""New music in every vocabulary: its notes are those that the ids decode to, wherever it is cut, saved or rewound."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from support.reference_grammar import first_violation
from support.stand_ins import constant_model, tiny_model
from support.vocabularies import NAMES, music_for, vocabulary

from dsmr_mlx.cli.outputs import Recordings
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.generation import generate as generation
from dsmr_mlx.generation import grammar
from dsmr_mlx.generation.generate import finish, generate, generate_variations, make_limits, notes_of
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.prompts import prompt_ids
from dsmr_mlx.generation.ranking import score, token_nats
from dsmr_mlx.generation.recording import Recording, notes_after
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.token_tables import NEVER

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

MODELS: dict[str, DSMR] = {}
TOKENS = 18
FLAT = Sampling(temperature=12.0)  # so that a random model does not repeat itself


@pytest.fixture(params=NAMES)
def made(request) -> tuple[DSMR, Tokenizer, Notes]:
    """A random model, its vocabulary, and music for a prompt."""
    name = request.param
    size = vocabulary(name).vocab_size
    if name not in MODELS:
        MODELS[name] = tiny_model(size, 1, horizons=(16,), d_model=16, head_dim=8, d_ff=16)
    return MODELS[name], vocabulary(name), music_for(name, 5)


@pytest.fixture(autouse=True)
def _quick_endings(monkeypatch):
    """Keys that are down at a limit are released soon."""
    monkeypatch.setattr(grammar, "RELEASE_TOKENS", 6)


def rows(notes: Notes, seconds: float = 0.0) -> list[tuple]:
    """(onset, pitch, program, offset, velocity) of each note, shifted by `later` seconds; times to 0.1 ms."""
    program = np.zeros(len(notes)) if notes.program is None else notes.program
    times = (np.round(time + seconds, 4) for time in (notes.onset, notes.offset))
    onset, offset = times
    columns = (onset, notes.pitch, program, offset, notes.velocity)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def new_rows(known: Notes, whole: Notes) -> list[tuple]:
    """The notes of the whole that are not in its beginning, whose last notes may be longer in the whole."""
    left, new = Counter(row[:3] for row in rows(known)), []
    for row in rows(whole):
        new += [] if left[row[:3]] else [row]
        left[row[:3]] -= 1
    return new


def prompts(tokenizer: Tokenizer, notes: Notes) -> list[np.ndarray | None]:
    """None, music cut after some seconds, and music cut anywhere."""
    ids = tokenizer.prompt(tokenizer.encode_notes(notes))
    timed = tokenizer.seconds(ids)
    cut = ids[:30] if timed is None else tokenizer.prompt(tokenizer.first_seconds(ids, timed / 3))
    return [None, cut, ids[:61]]


def start_of(tokenizer: Tokenizer, ids: np.ndarray) -> float:
    """The time at which music continues after some ids."""
    seconds = tokenizer.seconds(ids)
    return tokenizer.decode(ids).duration if seconds is None else seconds


@pytest.mark.slow
def test_notes_equal_those_of_prompt_and_continuation_decoded_together(made):
    """However the prompt ends; and the whole obeys the grammar."""
    model, tokenizer, notes = made
    for seed, prompt in enumerate(prompts(tokenizer, notes)):
        ids = prompt_ids(tokenizer, prompt)
        known, start, named = tokenizer.decode(ids), start_of(tokenizer, ids), is_named(tokenizer, ids)
        options = {"prompt": prompt, "tokens": TOKENS, "seed": seed, "sampling": FLAT}
        for variation in generate_variations(model, tokenizer, 1 + (seed == 0), **options).variations:
            whole = np.concatenate([ids, variation.ids])
            expected = new_rows(known, tokenizer.decode(whole))
            # If voices are written one after the other, new music may begin before the end of the prompt.
            earliest = min([start, *(row[0] for row in expected)])
            found = rows(variation.notes, start if tokenizer.event_grammar().plays_keys else earliest)
            # A pending note of the prompt, and a key that both press at once, belong to the continuation.
            both = {row[:3] for row in rows(known) if named or row[0] >= start - 1e-3}
            assert [row for row in found if row[:3] not in both] == expected
            if len(variation.ids) > 1:
                assert syntax_errors(whole, tokenizer) == (0, "")


def is_named(tokenizer: Tokenizer, ids: np.ndarray) -> bool:
    """Whether ids end in the middle of a note, after its pitch."""
    return GrammarWalk(tokenizer).begin(ids).pending_pitch.item() >= 0


@pytest.mark.slow
def test_streams_equal_variations_and_their_notes(made):
    model, tokenizer, notes = made
    options = {"prompt": prompts(tokenizer, notes)[1], "tokens": TOKENS, "seed": 2, "sampling": FLAT}
    walk, streamed = GrammarWalk(tokenizer), np.array(list(generate(model, tokenizer, **options)))
    (variation,) = generate_variations(model, tokenizer, **options).variations
    assert np.array_equal(finish(walk, streamed), variation.ids)
    if walk.grammar.plays_keys:
        found = list(generate(model, tokenizer, **options, as_notes=True))
        assert [note.offset for note in found] == sorted(note.offset for note in found)
        assert found
        columns = zip(*((n.onset, n.offset, n.pitch, n.velocity) for n in found), strict=True)
        assert rows(Notes.sorted(*columns)) == rows(variation.notes)
    else:
        with pytest.raises(UserError, match=r"`as_notes`: tokenizer .*: its ids cannot be decoded one by one"):
            generate(model, tokenizer, **options, as_notes=True)


@pytest.mark.slow
def test_seconds_are_kept_if_the_vocabulary_has_a_clock(made):
    """The last note begins before the limit, and some note begins shortly before it."""
    model, tokenizer, notes = made
    prompt = prompts(tokenizer, notes)[1]
    if tokenizer.seconds(prompt) is None:
        with pytest.raises(UserError, match="no known duration, expected `tokens` instead of `seconds`"):
            generate(model, tokenizer, prompt=prompt, seconds=1.0)
        return
    late = 3 if tokenizer.event_grammar().held else 0
    options = {"prompt": prompt, "seconds": 0.8, "tokens": 100, "sampling": FLAT}
    for variation in generate_variations(model, tokenizer, 2, **options).variations:
        assert variation.notes.onset.max(initial=0) <= 0.8 + late


def test_a_model_that_never_lets_time_pass_ends(monkeypatch):
    """Any number of notes with lengths can begin at one time, but keys run out."""
    tokenizer = vocabulary("REMI")
    assert make_limits(tokenizer, 0.1, None, False).tokens == 1050
    assert make_limits(tokenizer, 0.1, 10**6, False).tokens == 10**6
    assert make_limits(vocabulary("performance"), 0.1, None, False).tokens == NEVER
    assert make_limits(vocabulary("MIDILike"), 0.1, None, False).tokens == NEVER
    monkeypatch.setattr(generation, "MAX_TOKENS_AT_ONCE", 50)
    preferred = {"Position_0": 15.0} | {name: 30.0 for name in tokenizer.tokens if name.startswith("Pitch_")}
    preferences = np.array([preferred.get(name, 0.0) for name in tokenizer.tokens])
    model = constant_model(preferences, horizons=(16,), d_model=16, head_dim=8, d_ff=16)
    (variation,) = generate_variations(model, tokenizer, seconds=0.1).variations
    assert 90 <= len(variation.ids) <= 101
    assert syntax_errors(variation.ids, tokenizer) == (0, "")
    assert variation.notes.onset.min() == variation.notes.onset.max()


def recorded(path, tokenizer: Tokenizer, steps: np.ndarray, **options) -> tuple[Notes, Recording]:
    """The notes that a file has of one lane's ids `(T,)`, and the recording's counts."""
    with Recordings([path], tokenizer, {}, **options) as recordings:
        for token in steps:
            recordings.play(np.array([token]))
    found = read_notes(path, programs=tokenizer.programs, allow_empty=True)
    (lane,) = recordings.lanes
    assert lane.tokens == len(steps)
    return found, lane


@pytest.mark.slow
def test_files_have_the_notes_of_the_ids(made, tmp_path):
    """With and without the prompt."""
    model, tokenizer, notes = made
    walk = GrammarWalk(tokenizer)
    for i, prompt in enumerate(prompts(tokenizer, notes)[::2]):
        player, ids = Player(model, tokenizer, seed=i, sampling=FLAT), prompt_ids(tokenizer, prompt)
        player.read(ids)
        before = player.moments[0]
        steps = np.concatenate(list(player.play(Limits(tokens=TOKENS))))
        whole, lane = recorded(tmp_path / f"{i}.mid", tokenizer, steps, moments=[before], prompt=ids)
        expected = tokenizer.decode(np.concatenate([ids, steps]))
        assert near(whole, expected)
        new = notes_of(walk, ids, before, steps)
        assert lane.notes == len(new)
        if len(new):
            assert (lane.lowest, lane.highest) == (new.pitch.min(), new.pitch.max())
            assert lane.seconds == pytest.approx(new.duration)
        alone, lane = recorded(tmp_path / f"{i}-new.mid", tokenizer, steps, moments=[before], recent=[ids])
        assert near(alone, new)
        assert lane.notes == len(new)


@pytest.mark.parametrize("name", ["PerTok", "TSD rests", "BEAT", "REMI programs"])
def test_a_continuation_keeps_its_instruments_and_its_place_in_the_bar(name, tmp_path):
    """In vocabularies whose ids cannot be decoded one by one: from the last 100 ids before it."""
    tokenizer = vocabulary(name)
    walk, piece = GrammarWalk(tokenizer), music_for(name, 2, 80)
    ids = tokenizer.prompt(tokenizer.encode_notes(piece))
    for cut in range(len(ids) // 3, len(ids) // 3 + 6):
        moments = walk.begin(ids[:cut]).moments()
        found, _ = recorded(
            tmp_path / "a.mid", tokenizer, ids[cut:], moments=moments, recent=[ids[max(cut - 100, 0) : cut]]
        )
        whole = rows(tokenizer.decode(ids))
        assert {row[1:3] for row in rows(found)} <= {row[1:3] for row in whole}
        assert near(found, notes_after(tokenizer, ids[:cut], ids[cut:]))


def near(found: Notes, expected: Notes) -> bool:
    """From the first onset on, to a millisecond, the unit of files."""
    found, expected = rows(found.from_first_onset()), rows(expected.from_first_onset())
    times = [np.array([(row[0], row[3]) for row in side]) for side in (found, expected)]
    others = [[(*row[1:3], row[4]) for row in side] for side in (found, expected)]
    return others[0] == others[1] and np.allclose(*times, atol=0.0011)


def take(player: Player, n: int) -> np.ndarray:
    """The next n ids of the first lane."""
    return np.array([int(step[0]) for step in islice(player.play(Limits()), n)])


@pytest.mark.slow
def test_notes_after_saving_loading_rewinding_and_branching_anywhere(made, tmp_path):
    """Also in the middle of a note, whose rest is then in the new file."""
    model, tokenizer, notes = made
    prompt = prompts(tokenizer, notes)[1]
    whole = Player(model, tokenizer, sampling=FLAT)
    whole.read(prompt)
    expected = take(whole, 26)
    player, path = Player(model, tokenizer, sampling=FLAT), tmp_path / "state.safetensors"
    player.read(prompt)
    stream, named = player.play(Limits()), False
    for n in range(1, 13):
        assert next(stream)[0] == expected[n - 1]
        if player.walk.grammar.plays_keys and (n < 4 or player.moments[0].pending_pitch >= 0) and not named:
            named = player.moments[0].pending_pitch >= 0
            player.save(path)
            loaded = Player.load(path, model, tokenizer)
            assert_same_moment(loaded, player)
            later = take(loaded, 6)
            assert np.array_equal(later, expected[n : n + 6])
            found, _ = recorded(tmp_path / "new.mid", tokenizer, later, moments=player.moments)
            known, both = (
                notes_of(player.walk, prompt, moment_after(player, prompt), expected[:m]) for m in (n, n + 6)
            )
            twice = (found.onset == 0).sum() if len(found) else 0  # also keys that were pressed just before
            assert len(both) - len(known) <= len(found) <= len(both) - len(known) + twice
    grammar = player.walk.grammar
    assert named == (grammar.plays_keys and not grammar.running_velocity)
    player.save(path)
    loaded = Player.load(path, model, tokenizer)
    branch = player.branch(2, 1)
    assert np.array_equal(take(loaded, 14), expected[12:])
    loaded.rewind(9)
    assert np.array_equal(take(loaded, 9), expected[17:])
    assert_same_moment(loaded, whole)
    steps = np.stack(list(islice(branch.play(Limits()), 8)), axis=1)
    for lane in steps:
        ids = np.concatenate([prompt, expected[:12], lane])
        assert first_violation(player.walk.grammar, player.walk.tables.flat(ids[1:])) is None


def moment_after(player: Player, ids: np.ndarray) -> Moment:
    return player.walk.begin(ids).moments()[0]


def assert_same_moment(one: Player, other: Player) -> None:
    for a, b in zip(one.moments[0], other.moments[0], strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_scores_cover_all_ids_and_notes(made):
    model, tokenizer, notes = made
    prompt, limits = prompts(tokenizer, notes)[1], Limits(tokens=TOKENS)
    player = Player(model, tokenizer, sampling=FLAT)
    player.read(prompt)
    judge = player.branch(1)
    lane = finish(player.walk, np.concatenate(list(player.play(limits))))
    nats = token_nats(judge, lane[:-1], limits)
    found = score(judge, lane, limits)
    assert found.nats == pytest.approx(nats.sum(), rel=1e-4) or found.tokens == len(lane)
    assert np.isfinite(found.nats)
    assert found.notes == player.walk.tables.notes[lane].sum()


@pytest.mark.slow
def test_any_ids_give_a_readable_file(made, tmp_path):
    """Any ids, as a prompt and after it: at worst a `UserError`, never an unreadable file."""
    model, tokenizer, _ = made
    rng, walk = np.random.default_rng(0), GrammarWalk(tokenizer)
    for n in (3, 90):
        ids = rng.integers(0, tokenizer.vocab_size, n)
        ids = ids[(ids != tokenizer.eos_id) & (ids != tokenizer.fill_id)]  # a FILL without a PLAY is refused
        (before,) = walk.begin(ids).moments()
        for options in ({"prompt": ids}, {}):
            found, lane = recorded(tmp_path / "a.mid", tokenizer, ids, moments=[before], **options)
            assert lane.seconds >= 0
            assert (found.offset > found.onset).all()
        player = Player(model, tokenizer, sampling=FLAT)
        if not walk.allowed(walk.begin(ids), walk.bounds(Limits(), walk.begin(ids))).any().item():
            with pytest.raises(UserError, match="`prompt`: nothing may follow its last id"):
                player.read(ids)
            continue
        player.read(ids)
        steps = np.concatenate(list(player.play(Limits(tokens=12))))
        recorded(tmp_path / "b.mid", tokenizer, steps, moments=player.moments)
