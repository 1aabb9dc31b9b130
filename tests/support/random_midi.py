"""Random MIDI files of every layout that the standard allows, and of the faults that readers repair."""

from random import Random

from support.midi_files import variable_length

END = b"\xff\x2f\x00"
DIVISIONS = (1, 96, 480, 500, 0xE728, 0xE250, 0xE364, 0xE80A)  # ticks per quarter; 25, 30, 29.97, 24 frames


def random_file(
    seed: int, *, plain: bool = False, faults: bool = True, kind: int | None = None, size: int = 40
) -> bytes:
    """Return a file that depends on the seed.

    plain: only what all readers agree on: one message after the other, every key released in its track. faults: also
    what files may not have but readers read. kind: the format. size: events per track, about.
    """
    r = Random(seed)
    kind = r.choice([0, 1, 1, 1, 2]) if kind is None else kind
    tracks = 1 if kind == 0 else r.randint(1, 4)
    bodies = [random_track(r, plain, faults and not plain, size) for _ in range(tracks)]
    division = r.choice(DIVISIONS[:4] if plain else DIVISIONS)
    extra = b"" if plain else bytes(r.choice([0, 0, 1, 4]))
    counted = tracks if plain or not faults else r.choice([tracks, tracks, 0, tracks + 1])
    fields = b"".join(number.to_bytes(2, "big") for number in (kind, counted, division))
    data = b"MThd" + (6 + len(extra)).to_bytes(4, "big") + fields + extra
    for body in bodies:
        if not plain and r.random() < 0.1:
            data += b"XFIH" + (3).to_bytes(4, "big") + b"MTr"
        data += b"MTrk" + len(body).to_bytes(4, "big") + body
    return (r.choice([b"", b"", b"\r\n", bytes(128)]) if faults and not plain else b"") + data


def random_track(r: Random, plain: bool, faults: bool, size: int) -> bytes:
    """Return the body of a track."""
    channels = r.sample([0, 0, 0, 1, 2, 9], r.randint(1, 3))
    running = r.random() < 0.6
    waits = r.choice([[0, 1, 2, 5], [0, 10, 127, 128, 300], [0, 1, 20_000, 3_000_000]])
    body, status, down = b"", None, []
    for _ in range(r.randint(0, 2 * size)):
        wait = variable_length(r.choice(waits))
        if r.random() < 0.08:
            message = other_event(r, plain, faults)
            body += wait + message
            status = status if faults else None
            if message == END:
                status = None
            continue
        message = released_message(r, channels, down) if plain else channel_message(r, channels, faults)
        skip = running and status == message[0] and r.random() < 0.9
        body += wait + message[skip:]
        status = message[0]
    for channel, pitch in down:
        body += variable_length(r.choice(waits)) + bytes([0x80 | channel, pitch, 64])
    if plain or not faults or r.random() < 0.9:
        body += variable_length(r.choice(waits)) + END
    return body


def other_event(r: Random, plain: bool, faults: bool) -> bytes:
    """Return what is no channel message: tempo, text, SysEx and, if allowed, ports, escapes and system messages."""
    text = r.randbytes(r.choice([0, 1, 5, 200]))
    events = [
        b"\xff\x51\x03" + r.randint(1, 2**24 - 1).to_bytes(3, "big"),
        b"\xff\x51\x03" + (500_000).to_bytes(3, "big"),
        b"\xff\x01" + variable_length(len(text)) + text,
        b"\xff\x58\x04\x04\x02\x18\x08",
    ]
    if not plain:
        events += [
            b"\xf0\x05\x7e\x7f\x09\x01\xf7",
            b"\xf7\x03\x90\x3c\x40",
            b"\xf7\x00",
            b"\xff\x21\x01" + bytes([r.randint(0, 2)]),
        ]
    if faults:
        events += [END, b"\xfe", b"\xf8", b"\xf2\x01\x02", b"\xff\x51\x02\x07\xa1", b"\xff\x51\x03\0\0\0"]
    return r.choice(events)


def channel_message(r: Random, channels: list[int], faults: bool) -> bytes:
    """Return any channel message; few pitches, so that keys are struck while they are down."""
    channel, pitch, kind = r.choice(channels), r.randint(60, 62), r.random()
    top = 255 if faults and r.random() < 0.03 else 127
    if kind < 0.4:
        return bytes([0x90 | channel, pitch, r.randint(0, top)])
    if kind < 0.6:
        return bytes([0x80 | channel, pitch, r.randint(0, 127)])
    if kind < 0.85:
        return bytes([0xB0 | channel, 64, r.choice([0, 0, 63, 64, 127, top])])
    if kind < 0.93:
        return bytes([0xB0 | channel, r.choice([7, 66, 67, 120, 121, 123, 126]), r.randint(0, top)])
    if kind < 0.97:
        return bytes([r.choice([0xC0, 0xD0]) | channel, r.randint(0, top)])
    return bytes([r.choice([0xA0, 0xE0]) | channel, r.randint(0, 127), r.randint(0, 127)])


def released_message(r: Random, channels: list[int], down: list[tuple[int, int]]) -> bytes:
    """Return a message that strikes a key that is up or releases one that is down, or a pedal or other controller."""
    channel, pitch, kind = r.choice(channels), r.randint(48, 72), r.random()
    if kind < 0.4 and (channel, pitch) not in down:
        down.append((channel, pitch))
        return bytes([0x90 | channel, pitch, r.randint(1, 127)])
    if kind < 0.7 and down:
        channel, pitch = down.pop(r.randrange(len(down)))
        return bytes([0x90 | channel, pitch, 0]) if r.random() < 0.5 else bytes([0x80 | channel, pitch, 64])
    return bytes([0xB0 | channel, r.choice([64, 64, 7, 67]), r.randint(0, 127)])
