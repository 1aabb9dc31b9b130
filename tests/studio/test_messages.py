"""Messages of clients: what is valid, what is not, and that the documentation has all of them."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.messages import CLIENT, MAX_BYTES, SETTINGS, InvalidMessage, Nullable, check, parse
from dsmr_mlx.studio.settings import NOTHING_SET, as_settings, check_settings, playing_options
from dsmr_mlx.studio.studio import QUICK, SLOW, Studio
from dsmr_mlx.studio.takes import KINDS, Take
from dsmr_mlx.studio.work import Status

PROTOCOL = (Path(__file__).parents[2] / "docs" / "studio-protocol.md").read_text(encoding="utf-8")
SERVER = (
    *("session", "take", "notes", "selection", "settings", "status", "key", "pedal", "midi", "playing", "sessions"),
    *("models", "error", "done", "pong"),
)


def rows(section: str) -> list[list[str]]:
    """The rows of the first table of a section, cell by cell."""
    text = PROTOCOL.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names(cell: str) -> list[str]:
    """The names in backquotes."""
    return re.findall(r"`(\w+)`", cell)


def test_the_documentation_has_every_message_of_clients():
    documented = {}
    for kinds, fields, _ in rows("From the client"):
        for kind in names(kinds):
            documented[kind] = set(names(fields))
    documented["stop_playing"] = set()  # in the description of `play`
    assert "`stop_playing`" in PROTOCOL
    assert documented == {kind: set(spec) for kind, spec in CLIENT.items()}


def test_the_documentation_has_every_message_of_the_server():
    documented = [kind for kinds, *_ in rows("From the server") for kind in names(kinds)]
    assert sorted(documented) == sorted(SERVER)


def test_the_documentation_has_every_field_of_a_take_and_every_setting():
    documented = {name for cells in rows("A session") for name in names(cells[0])}
    assert documented == {name for name in Take.__dataclass_fields__ if name not in ("rows", "tokens")} | {"notes"}
    (kinds,) = (cells[1] for cells in rows("A session") if cells[0] == "`kind`")
    assert set(names(kinds)) == set(KINDS)
    described = PROTOCOL.split("`settings` (each may be null")[1].split("## From the server")[0]
    assert set(SETTINGS) <= set(names(described))


def test_the_documentation_has_every_field_of_the_status():
    (fields,) = (cells[1] for cells in rows("From the server") if cells[0] == "`status`")
    assert set(Status.__dataclass_fields__) <= set(names(fields))


def test_the_studio_knows_every_message():
    for kind in CLIENT:
        assert callable(getattr(Studio, f"_on_{kind}"))
    assert set(QUICK) | set(SLOW) <= set(CLIENT)


VALID = [
    {"type": "continue"},
    {"type": "continue", "take": 3, "at": 1.5, "seconds": None, "count": 2, "seed": 0, "request": 7},
    {"type": "replace", "take": 1, "start": 0, "end": 3.5},
    {"type": "key", "pitch": 60, "velocity": 0},
    {"type": "keep", "take": 1, "kept": None},
    {"type": "rename", "take": 1, "name": "Für Elise"},
    {"type": "settings", "settings": {"key": None, "pitch_range": [20, 80], "max_polyphony": 4.0}},
    {"type": "open", "name": "A song, 2"},
]


@pytest.mark.parametrize("message", VALID, ids=lambda m: m["type"])
def test_valid_messages(message):
    parsed = parse(json.dumps(message))
    assert (parsed.type, parsed.request) == (message["type"], message.get("request"))
    assert set(parsed.fields) == set(CLIENT[message["type"]])


INVALID = [
    ("[]", "no JSON object"),
    ("{", "not valid JSON"),
    ("[" * 10_000, "not valid JSON"),
    ('{"type": 1}', "`type` 1: no such message"),
    ('{"type": "contniue"}', "did you mean continue"),
    ('{"type": "stop", "now": 1}', "unknown field 'now'"),
    ('{"type": "stop", "request": "x"}', "`request` 'x'"),
    ('{"type": "select", "take": true}', "`take` True: expected an integer"),
    ('{"type": "select", "take": 0}', "`take` 0"),
    ('{"type": "select", "take": 1e300}', "`take`"),
    ('{"type": "select", "take": 1.5}', "`take` 1.5"),
    ('{"type": "continue", "at": NaN}', "`at` nan"),
    ('{"type": "continue", "at": Infinity}', "`at` inf"),
    ('{"type": "continue", "at": -1}', "`at` -1"),
    ('{"type": "continue", "count": 1000}', "`count` 1000: expected an integer from 1 to 16"),
    ('{"type": "continue", "seconds": 1e9}', "`seconds`"),
    ('{"type": "key", "pitch": 128, "velocity": 1}', "`pitch` 128"),
    ('{"type": "key", "pitch": 60}', "`velocity` None"),
    ('{"type": "open", "name": "../../etc/passwd"}', "a name without"),
    ('{"type": "open", "name": ".."}', "a name without"),
    ('{"type": "open", "name": "a\\u0000b"}', "without control characters"),
    ('{"type": "rename", "take": 1, "name": "\\ud800"}', "without control characters"),
    ('{"type": "open", "name": ""}', "1 to 100 characters"),
    ('{"type": "settings", "settings": {"colour": 1}}', "known settings, found 'colour'"),
    ('{"type": "settings", "settings": {"temperature": 9}}', "temperature to be null or a number from 0.1 to 2"),
    ('{"type": "settings", "settings": {"pitch_range": [80, 20]}}', "pitch_range"),
    ('{"type": "settings", "settings": []}', "an object"),
    (b"\xff\xfe", "not valid JSON"),
    ('{"type": "import", "name": "a", "data": 3}', "`data` 3"),
    (" " * (MAX_BYTES + 1), "8,388,609 bytes"),
]


@pytest.mark.parametrize(("text", "reason"), INVALID, ids=lambda value: str(value)[:40])
def test_invalid_messages_are_named(text, reason):
    with pytest.raises(InvalidMessage) as error:
        parse(text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(CLIENT)), st.data())
def test_any_values_are_checked(kind, data):
    """Either a message is valid, with fields in range, or it is refused."""
    message = {"type": kind} | {name: data.draw(JSON) for name in CLIENT[kind] if data.draw(st.booleans())}
    try:
        parsed = check(message)
    except InvalidMessage:
        return
    for name, rule in CLIENT[kind].items():
        value = parsed.fields[name]
        if value is not None:
            assert (rule.check if isinstance(rule, Nullable) else rule)(value) == value  # valid again
    json.dumps(parsed.fields, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text_is_a_message_or_refused(text):
    try:
        parse(text)
    except InvalidMessage as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_settings_replace_recommended_options():
    recommended = {"tempo": 0.15, "loop_penalty": 1, "end_within": 10, "max_note_seconds": 5}
    options = playing_options(
        NOTHING_SET | {"temperature": 0.8, "tempo": 0.0, "pitch_range": [40, 80]}, recommended, 9.0
    )
    assert options["sampling"].temperature == 0.8
    kinds = {type(p).__name__: p for p in options["processors"]}
    assert set(kinds) == {"PitchRange", "MaxNoteSeconds", "Tempo", "LoopPenalty"}
    ends = playing_options(NOTHING_SET | {"end_within": 3.0}, recommended, 9.0)
    assert "EndWithin" in {type(p).__name__ for p in ends["processors"]}
    endless = playing_options(NOTHING_SET | {"end_within": 3.0}, recommended)
    assert "EndWithin" not in {type(p).__name__ for p in endless["processors"]}
    assert as_settings(recommended) == {"tempo": 0.15, "end_within": 10, "max_note_seconds": 5}
    with pytest.raises(UserError, match="`key` H major"):
        check_settings({"key": "H major"})
