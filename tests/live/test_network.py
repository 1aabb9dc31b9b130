"""Bytes from the network: the decoder, and addresses and connections that fail."""

from itertools import pairwise

import mido
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mido import Message
from support.live_stand_ins import control, off, on

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.midi_bytes import MAX_SYSEX, Decoder
from dsmr_mlx.live.network import Server, connect
from dsmr_mlx.live.ports import PortLost


def decoded(*parts: bytes) -> list[Message]:
    """Decode bytes that arrive in parts."""
    decoder = Decoder()
    return [message for part in parts for message in decoder.feed(part)]


def test_running_status():
    """A status byte applies to all keys that follow; a note-on of velocity 0 ends a note."""
    messages = decoded(bytes.fromhex("90 3C 40 3C 00 3E 41 B0 40 7F 40 00 80 3E 40"))
    expected = [on(60), on(60, 0), on(62, 65), control(64, 127), control(64, 0), off(62)]
    assert messages == expected


def test_real_time_messages_inside_others():
    """Clock and active sensing interrupt neither a message nor a running status nor a sysex."""
    messages = decoded(bytes.fromhex("90 3C F8 40 FE 3E 40 F0 01 F8 02 F7"))
    kinds = ["clock", "note_on", "active_sensing", "note_on", "clock", "sysex"]
    assert [m.type for m in messages] == kinds
    assert messages[1] == on(60)
    assert messages[3] == on(62)
    assert messages[-1].data == (1, 2)


def test_invalid_bytes_are_skipped():
    """Data without a status, undefined statuses with data, a message cut short, data after a system message."""
    assert decoded(b"\x3c\x40", bytes.fromhex("F4 01 F5 F9 FD 90 3C 80 3C 40")) == [off(60)]
    assert decoded(bytes.fromhex("90 F1 05 3C 40 F6 3C F7 3C 90 3C 40"))[-1] == on(60)
    assert decoded(b"\xf0" + bytes(10 * MAX_SYSEX) + b"\xf7", on(60).bin()) == [on(60)]
    assert decoded(b"\xf0\x01\x02", on(60).bin()) == [on(60)]


def test_an_endless_sysex_needs_constant_memory():
    decoder = Decoder()
    assert not list(decoder.feed(b"\xf0"))
    for _ in range(40):
        assert not list(decoder.feed(bytes(10_000)))
    assert len(decoder._data) <= MAX_SYSEX + 1


CHANNEL_MESSAGE = st.builds(
    lambda status, data: Message.from_bytes([status, *data[: 1 if 0xC0 <= status < 0xE0 else 2]]),
    st.integers(0x80, 0xEF),
    st.lists(st.integers(0, 127), min_size=2, max_size=2),
)


@given(st.lists(CHANNEL_MESSAGE, max_size=20), st.booleans(), st.lists(st.integers(0, 60), max_size=6))
def test_messages_survive_any_split_of_the_bytes(messages, running, cuts):
    """The bytes are mido's, with or without running status, cut anywhere."""
    data, status = bytearray(), None
    for message in messages:
        written = message.bin()
        data += written[1:] if running and written[0] == status else written
        status = written[0]
    edges = [0, *sorted(cuts), len(data)]
    parts = [bytes(data[start:end]) for start, end in pairwise(edges)]
    assert decoded(*parts) == messages


@given(st.binary(max_size=60))
def test_random_bytes_raise_nothing(data):
    for message in decoded(data):
        assert isinstance(message, mido.Message)


@pytest.mark.parametrize("host", ["x" * 70, "x" * 70 + ".org", "a..b"])
def test_an_invalid_host_name_is_a_user_error(host):
    """Labels of host names have 1 to 63 letters."""
    with pytest.raises(UserError, match=r"`socket` .*: cannot connect \("):
        connect(f"{host}:9080")
    with pytest.raises(UserError, match=r"`listen` .*: cannot listen \("):
        Server(f"{host}:9080")


def test_sending_to_a_closed_port_raises_port_lost():
    server = Server(":0")
    near = connect(f"127.0.0.1:{server.port}")
    far = server.accept()
    for port in (near, far):
        port.close()
        for _ in range(2):
            with pytest.raises(PortLost):
                port.send(on(60))
