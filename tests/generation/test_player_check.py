"""A saved player whose values no player has is refused before anything computes with them."""

import json
import os
import random
import time

import mlx.core as mx
import numpy as np
import pytest
from support.players import REMEMBERING, TOKENIZER, some_ids, take
from support.stand_ins import tiny_model

from dsmr_mlx import UserError
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.player_file import checksum, read_arrays, to_bytes

SECONDS = float(os.environ.get("DSMR_FUZZ_SECONDS", "3"))  # of mutations; more in longer runs


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The arrays and the metadata of a saved player of two lanes, whose processors remember the music."""
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    player = Player(model, TOKENIZER, n=2, processors=REMEMBERING, seed=1)
    player.read(some_ids(21))
    take(15, player)
    player.save(path)
    return read_arrays(path)


def write(path, arrays, metadata):
    path.write_bytes(to_bytes(arrays, metadata | {"sha256": checksum(to_bytes(arrays, metadata), metadata)}))
    return path


def of_type(array, value):
    return mx.array(np.broadcast_to(np.array(value), array.shape).astype(np.array(array).dtype))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("state.filled", n) for n in (-1, 17, 40, 1000, 2**62)),
        *(("state.clock", n) for n in (-1, 3, 2**62)),
        *(("state.starts", n) for n in (-1, 38, 2**62)),
        *(("state.rebased", n) for n in (-(2**40), 2**40, 2**62)),
        *(("state.evicted_at", n) for n in (-2, 0, 5, 2**62)),
        *(("positions", n) for n in ([-1, 0, 0], [36, 40, 41], [2**62] * 3, [36, 0, 32], [35, 16, 32])),
        *(("tokens", n) for n in (-1, 393, 2**30)),
        *(("origins", n) for n in (4, 255)),
        *(("pause_ticks", n) for n in (-2, 2**40, 10**12)),
        *((f"{where}.0.0", n) for where in ("now", "first", "last") for n in (-1, 2**30)),  # state of the grammar
        *((f"now.0.{i}", 2**31 - 1 if i == 4 else -2) for i in (2, 3, 4, 5, 6, 7)),
        *((f"now.0.{i}", 2**30) for i in (2, 3)),
        *((f"now.1.{i}.{field}", 2**29) for i, field in ((0, 3), (0, 5), (3, 0))),  # tables and ids of processors
    ],
)
def test_values_out_of_range(model, saved, tmp_path, name, value):
    arrays, metadata = saved
    path = write(tmp_path / "a", arrays | {name: of_type(arrays[name], value)}, metadata)
    with pytest.raises(UserError, match=r"a: not a player of this model \(.+\)$"):
        Player.load(path, model, TOKENIZER)


@pytest.mark.parametrize("kind", ["missing", "unknown", "type", "axes", "lanes"])
def test_arrays_of_another_form(model, saved, tmp_path, kind):
    arrays, metadata = saved
    for name in (*sorted(arrays)[::8], "keys", "logits", "tokens"):
        array = arrays[name]
        changed = {
            "missing": {other: a for other, a in arrays.items() if other != name},
            "unknown": arrays | {f"{name}.more": array},
            "type": arrays | {name: array.astype(mx.int16)},
            "axes": arrays | {name: array[None]},
            "lanes": arrays | {name: mx.concatenate([array, array]) if array.ndim else array.reshape(1)},
        }[kind]
        with pytest.raises(UserError, match=r"a: (not a player of this model|recurrent state)"):
            Player.load(write(tmp_path / "a", changed, metadata), model, TOKENIZER)


@pytest.mark.parametrize("name", ["model", "weights", "tokenizer", "sampling", "processors"])
def test_metadata(model, saved, tmp_path, name):
    arrays, metadata = saved
    without = {key: text for key, text in metadata.items() if key != name}
    texts = ("", "[", "null", "7", "[7]", '["x"]', "[" * 50_000, "9" * 5000, '{"a": 1}', "NaN", '[{"kind": "Tempo"}]')
    for changed in (without, *(metadata | {name: text} for text in texts)):
        with pytest.raises(UserError):
            Player.load(write(tmp_path / "a", arrays, changed), model, TOKENIZER)


def test_many_lanes_are_refused_at_once(model, saved, tmp_path):
    arrays, metadata = saved
    many = {"keys": mx.zeros((100_000, 2), mx.uint32), "pause_ticks": mx.full(100_000, -1, mx.int64)}
    started = time.perf_counter()
    with pytest.raises(UserError, match="100000 lanes, expected 1 to"):
        Player.load(write(tmp_path / "a", arrays | many, metadata), model, TOKENIZER)
    assert time.perf_counter() - started < 5


def test_untouched_players_are_loaded(model, saved, tmp_path):
    """The checks refuse nothing that a player saves: at any moment, rewound, paused, with any number of lanes."""
    path = tmp_path / "a"
    for n, played in ((1, 0), (2, 3), (3, 20)):
        player = Player(model, TOKENIZER, n=n, processors=REMEMBERING)
        player.save(path)
        Player.load(path, model, TOKENIZER)
        for _ in range(2):
            take(played, player)
            player.read(some_ids(played))
            player.rewind(min(played // 2, player.rewindable))
            player.save(path, player.ticks)
            assert Player.load(path, model, TOKENIZER).position == player.position


def mutate(random_state: random.Random, arrays: dict, metadata: dict) -> tuple[dict, dict]:
    """Change a value, a shape or a type of some arrays, or a text."""
    arrays, metadata = dict(arrays), dict(metadata)
    for _ in range(random_state.randint(1, 3)):
        name = random_state.choice(sorted(arrays))
        values = np.array(arrays[name].astype(mx.float32) if arrays[name].dtype == mx.bfloat16 else arrays[name])
        match random_state.randrange(6):
            case 0 | 1 | 2 if values.size:
                flat = values.reshape(-1)
                extremes = [0, -1, 1, 2**31 - 1, -(2**31), 2**62, 17, 393, 255, np.nan, np.inf]
                with np.errstate(all="ignore"):
                    flat[random_state.randrange(flat.size)] = np.array(random_state.choice(extremes)).astype(flat.dtype)
            case 3 if values.ndim:
                values = np.concatenate([values, values]) if random_state.random() < 0.5 else values[:-1]
            case 4:
                values = values.astype(random_state.choice([np.int64, np.float32, np.uint8, bool]))
            case 5:
                key = random_state.choice(sorted(metadata))
                text = metadata[key]
                at = random_state.randrange(len(text) + 1)
                metadata[key] = (
                    text[:at] + random_state.choice(['"', "[", "-", "9" * 400, "\x1b", "é"]) + text[at + 1 :]
                )
        arrays[name] = mx.array(values)
    return arrays, metadata


@pytest.mark.filterwarnings("ignore:invalid value")
def test_mutations_are_refused_or_play(saved, tmp_path):
    """Whatever passes the checks can be played, rewound and saved; all else is one line."""
    model, end, seed, messages = tiny_model(), time.monotonic() + SECONDS, 0, set()
    while time.monotonic() < end or seed < 30:  # however slow the machine
        seed += 1
        arrays, metadata = mutate(random.Random(seed), *saved)
        path = write(tmp_path / "a", arrays, metadata)
        try:
            player = Player.load(path, model, TOKENIZER)
            player.rewind(min(player.rewindable, 5))
            take(20, player)
            player.save(tmp_path / "b")
        except UserError as error:
            messages.add(str(error))
    assert messages
    assert not [message for message in messages if "\n" in message]


def test_text_of_metadata_is_json(saved):
    assert all(json.loads(saved[1][name]) is not None for name in ("model", "sampling", "processors"))
