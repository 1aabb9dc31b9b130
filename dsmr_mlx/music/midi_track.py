"""Decode the track chunks of MIDI files (Standard MIDI Files 1.0, "Track Chunks").

Most bytes of a performance are messages with two data bytes. Blocks of them are decoded at once: the last byte of a
delta time and both data bytes are below 128 and no other byte is, so every three such bytes are one message. Everything
else (meta events, SysEx, program changes, faults) is decoded byte by byte, and a block ends before the first message of
that kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.repairs import Repair, Repairs

NOTE_OFF, NOTE_ON, CONTROL, PROGRAM = 0x8, 0x9, 0xB, 0xC  # kinds of channel messages: the upper half of a status
SYSEX, ESCAPE, META = 0xF0, 0xF7, 0xFF
MARKER, PORT, END_OF_TRACK, TEMPO = 0x06, 0x21, 0x2F, 0x51  # types of meta events
ONE_DATA_BYTE = (0xC, 0xD)
SYSTEM_DATA = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0} | dict.fromkeys(range(0xF8, 0xFF), 0)  # F4 and F5 are undefined
MAX_TICK = 1 << 36  # of a file: two years at 480 ticks per quarter and 120 BPM
TWO_DATA_BYTES = np.array([0x80 <= status < 0xF0 and status >> 4 not in ONE_DATA_BYTE for status in range(256)])

MIN_BLOCK, BLOCK, MAX_BLOCK = 64, 4096, 1 << 20  # bytes
FEW = 32  # messages; after a block with fewer, this many are decoded one by one before the next block


@dataclass
class Track:
    """One decoded track; E channel messages in the order of the file.

    tick: `(E,)` int64; kind: `(E,)` uint8, the upper half of the status byte
    channel: `(E,)` int64, 16 · port + channel, both from 0
    first, second: `(E,)` uint8, data bytes, 0 if there is no second one
    tempos: tick and microseconds per quarter of each tempo event; markers: texts as bytes
    end: tick of the last event, End of Track included
    """

    tick: np.ndarray
    kind: np.ndarray
    channel: np.ndarray
    first: np.ndarray
    second: np.ndarray
    tempos: list[tuple[int, int]] = field(default_factory=list)
    markers: list[bytes] = field(default_factory=list)
    end: int = 0


def decode_track(body: bytes, repairs: Repairs, name: str = "track", *, blocks: bool = True) -> Track:
    """Decode the content of a track chunk, to its end, even after an End of Track.

    Running status continues after SysEx, meta and system messages, although files may not use it there; data bytes
    above 127 are read as 127. repairs: faults are counted here; blocks: False decodes byte by byte, with the same
    result.

    Raises `UserError`, which states the position, for malformed bytes: data without a status, an undefined
    status, a SysEx or meta event longer than the track, times above `MAX_TICK`.
    """
    return _Decoder(body, repairs, name, blocks).decode()


class _Cut(Exception):
    """The track ends in the middle of a message."""


class _Decoder:
    """The state of decoding one track: position, tick, running status, and all messages so far."""

    def __init__(self, body: bytes, repairs: Repairs, name: str, blocks: bool) -> None:
        self.body, self.repairs, self.name, self.blocks = body, repairs, name, blocks
        self.bytes = np.frombuffer(body, np.uint8)
        self.position = self.tick = self.count = 0
        self.status: int | None = None  # running status
        self.interrupted = False  # whether another kind of message came after the last status
        self.end_position: int | None = None  # after the first End of Track
        self.parts: list[tuple[np.ndarray, ...]] = []  # tick, status, first, second
        self.singles: list[tuple[int, int, int, int]] = []  # decoded one by one after the last part
        self.ports: list[tuple[int, int]] = [(0, 0)]  # messages before a port event, port
        self.tempos: list[tuple[int, int]] = []
        self.markers: list[bytes] = []

    def decode(self) -> Track:
        """Decode everything. See `decode_track`."""
        size, one_by_one = BLOCK, 0
        while self.position < len(self.body):
            if self.blocks and one_by_one == 0 and len(self.body) - self.position >= MIN_BLOCK:
                decoded, all_of_it = self._block(size)
                size = min(4 * size, MAX_BLOCK) if all_of_it else BLOCK
                one_by_one = 0 if all_of_it else 1 if decoded >= FEW else FEW
            else:
                one_by_one = max(one_by_one - 1, 0)
                if not self._event_or_end():
                    break
        if self.end_position is None:
            self.repairs[Repair.NO_END] += 1
        return self._track()

    def _block(self, size: int) -> tuple[int, bool]:
        """Decode messages with two data bytes. Return their number and whether the block held nothing else."""
        window = self.bytes[self.position : self.position + size]
        low = np.flatnonzero(window < 0x80)
        n = len(low) // 3
        if not n:
            return 0, False
        wait_end, first, second = low[: 3 * n].reshape(n, 3).T
        start = np.empty(n, np.int64)
        start[0], start[1:] = 0, second[:-1] + 1
        wait_bytes, status_bytes = wait_end - start, first - wait_end - 1  # the last byte of a wait is not counted
        status = np.where(status_bytes == 1, window[wait_end + 1], 0)
        good = (wait_bytes < 4) & (second == first + 1) & ((status_bytes == 0) | TWO_DATA_BYTES[status])
        good &= status_bytes < 2
        with_status = np.append(np.flatnonzero(status_bytes == 1), n)
        if self.interrupted or self.status is None or not TWO_DATA_BYTES[self.status]:
            good[: with_status[0]] = False  # no running status, or one that is not decoded here
        accepted = n if good.all() else int(np.argmin(good))
        if not accepted:
            return 0, False
        window = window[: second[accepted - 1] + 1]
        cut = slice(accepted)
        wait = self._waits(window, wait_end[cut], wait_bytes[cut])
        tick = self.tick + np.cumsum(wait)
        status = self._with_running_status(status[cut])
        self._flush()
        self.parts.append((tick, status, window[first[cut]], window[second[cut]]))
        self.count += accepted
        self.repairs[Repair.EARLY_END] += accepted * (self.end_position is not None)
        self.status, self.tick = int(status[-1]), int(tick[-1])
        self.interrupted = False
        self.position += len(window)
        self._check_tick()
        return accepted, accepted == n

    @staticmethod
    def _waits(window: np.ndarray, last: np.ndarray, more: np.ndarray) -> np.ndarray:
        """Return delta times `(N,)` int64 from the offsets of their last bytes and the number of bytes before."""
        wait = window[last].astype(np.int64)
        longer = np.flatnonzero(more)
        for back in (1, 2, 3):
            longer = longer[more[longer] >= back]
            wait[longer] += (window[last[longer] - back] & 0x7F).astype(np.int64) << (7 * back)
        return wait

    def _with_running_status(self, status: np.ndarray) -> np.ndarray:
        """Replace zeros in `(N,)` statuses by the status before them."""
        last = np.maximum.accumulate(np.where(status, np.arange(len(status)), -1))
        return np.where(last >= 0, status[last], self.status or 0).astype(np.uint8)

    def _event_or_end(self) -> bool:
        """Decode one event. Return False if nothing readable follows."""
        start, tick = self.position, self.tick
        try:
            self._event()
        except _Cut:
            self.repairs[Repair.CUT_MESSAGE] += 1
            return False
        except UserError:
            if self.end_position is None:
                raise
            self.repairs[Repair.UNREADABLE_END] += len(self.body) - start
            self.tick = tick
            return False
        if self.end_position is not None and start >= self.end_position:
            self.repairs[Repair.EARLY_END] += 1
        return True

    def _event(self) -> None:
        """Decode a delta time and one event."""
        wait = self._variable_length()
        start, byte = self.position, self._byte()
        self.tick += wait
        self._check_tick()
        if byte < 0x80:
            if self.status is None:
                raise self._error(start, f"data byte {byte:02X} without a status byte")
            self.repairs[Repair.RUNNING_STATUS] += self.interrupted
            self.interrupted = False
            self._channel_message(self.status, byte)
        elif byte < 0xF0:
            self._channel_message(byte, self._byte())
            self.status, self.interrupted = byte, False
        else:
            self.interrupted = True
            self._other(start, byte)

    def _channel_message(self, status: int, first: int) -> None:
        second = 0 if status >> 4 in ONE_DATA_BYTE else self._byte()
        if first > 127 or second > 127:
            self.repairs[Repair.DATA_BYTE] += (first > 127) + (second > 127)
            first, second = min(first, 127), min(second, 127)
        self.singles.append((self.tick, status, first, second))
        self.count += 1

    def _other(self, start: int, byte: int) -> None:
        """Decode a meta event, a SysEx, an escape or a system message."""
        if byte == META:
            self._meta(self._byte(), self._content(start))
        elif byte in (SYSEX, ESCAPE):
            content = self._content(start)
            self.repairs[Repair.ESCAPED] += byte == ESCAPE and bool(content) and 0x80 <= content[0] < 0xF0
        elif byte in SYSTEM_DATA:
            for _ in range(SYSTEM_DATA[byte]):
                self._byte()
            self.repairs[Repair.SYSTEM_MESSAGE] += 1
        else:
            raise self._error(start, f"undefined status byte {byte:02X}")

    def _meta(self, kind: int, content: bytes) -> None:
        if kind == TEMPO:
            tempo = int.from_bytes(content[:3]) if len(content) >= 3 else 0
            if tempo:
                self.tempos.append((self.tick, tempo))
            else:
                self.repairs[Repair.TEMPO] += 1
        elif kind == MARKER:
            self.markers.append(content)
        elif kind == PORT and content:
            self.ports.append((self.count, content[0]))
        elif kind == END_OF_TRACK and self.end_position is None:
            self.end_position = self.position

    def _content(self, start: int) -> bytes:
        """Return the bytes of an event of variable length that begins at `start`."""
        length = self._variable_length()
        if length > len(self.body) - self.position:
            left = len(self.body) - self.position
            raise self._error(
                start, f"event {self.body[start]:02X} of {length:,} bytes, {left:,} are left in the track"
            )
        self.position += length
        return self.body[self.position - length : self.position]

    def _variable_length(self) -> int:
        """Return a variable-length quantity."""
        start, value = self.position, 0
        while (byte := self._byte()) > 0x7F:
            value = (value | byte & 0x7F) << 7
            if value > MAX_TICK << 8:
                raise self._error(start, "a number of too many bytes")
        self.repairs[Repair.LONG_WAIT] += self.position - start > 4
        return value | byte

    def _byte(self) -> int:
        if self.position >= len(self.body):
            raise _Cut
        self.position += 1
        return self.body[self.position - 1]

    def _check_tick(self) -> None:
        if self.tick > MAX_TICK:
            raise UserError(f"time stamp of {self.tick:,} ticks, expected at most {MAX_TICK:,}")

    def _error(self, position: int, reason: str) -> UserError:
        return UserError(f"not a readable MIDI file ({self.name}, byte {position:,}: {reason})")

    def _flush(self) -> None:
        """Append the messages that were decoded one by one."""
        if self.singles:
            tick, *others = np.array(self.singles, np.int64).T
            self.parts.append((tick, *(column.astype(np.uint8) for column in others)))
            self.singles = []

    def _track(self) -> Track:
        self._flush()
        if not self.parts:
            self.parts = [(np.empty(0, np.int64), *[np.empty(0, np.uint8)] * 3)]
        tick, status, first, second = (np.concatenate(columns) for columns in zip(*self.parts, strict=True))
        channel = (status & 15).astype(np.int64)
        if len(self.ports) > 1:
            begins, ports = np.array(self.ports).T
            channel += 16 * np.repeat(ports, np.diff(np.append(begins, len(tick))))
        return Track(tick, status >> 4, channel, first, second, self.tempos, self.markers, self.tick)
