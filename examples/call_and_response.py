"""Call and response over a socket: play a melody to `dsmr-mlx live`, receive the answer and show both.

    python examples/call_and_response.py                             # starts `dsmr-mlx live`, too
    python examples/call_and_response.py --connect 192.168.1.5:9080  # run there: dsmr-mlx live --listen 0.0.0.0:9080

The connection carries MIDI bytes in both directions, so any program that writes MIDI to a socket can play along.
"""

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path

from melodies import MELODIES, perform
from mido import Message, Parser

import dsmr_mlx
from dsmr_mlx.music.summary import excerpt, summarize
from dsmr_mlx.music.text_roll import roll_text

SILENCE = 3.0  # seconds after which the answer is over
RECORDING = Path("example-output/call-and-response.mid")


def start_live(model: str | None, max_turn: float) -> tuple[subprocess.Popen, str]:
    """Start `dsmr-mlx live` on a free port. Return the process and its address, once it accepts a client."""
    RECORDING.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dsmr_mlx", "live", *([model] if model else []), "--listen", "127.0.0.1:0"]
    command += ["--max-turn", str(max_turn), "--out-file", str(RECORDING), "--force"]
    live = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in live.stdout:
        if line.startswith("waiting for a client on"):
            return live, line.split()[-1]
        print(line, end="")
    raise SystemExit(live.wait())


def play(connection: socket.socket, notes: dsmr_mlx.Notes) -> None:
    """Press and release keys in real time."""
    keys = [key for on, off, pitch, velocity in notes.rows for key in ((on, velocity, pitch), (off, 0, pitch))]
    began = time.monotonic()
    for at, velocity, pitch in sorted(keys):  # at equal times, releases come before presses
        time.sleep(max(0.0, began + at - time.monotonic()))
        connection.sendall(Message("note_on", note=pitch, velocity=velocity).bin())


def listen(connection: socket.socket, max_wait: float) -> dsmr_mlx.Notes:
    """Receive notes until no key has been down for `SILENCE` seconds; wait at most `max_wait` seconds for the first.

    Times are in seconds from the start of this function.
    """
    parser, down, rows, began = Parser(), {}, [], time.monotonic()
    connection.settimeout(0.05)
    last = began + max_wait - SILENCE
    while down or time.monotonic() < last + SILENCE:
        try:
            data = connection.recv(4096)
        except TimeoutError:
            continue
        if not data:
            break
        last = time.monotonic()
        parser.feed(data)
        for message in parser:
            if message.type == "note_on" and message.velocity:
                down[message.note] = last - began, message.velocity
            elif message.type in ("note_on", "note_off") and message.note in down:
                onset, velocity = down.pop(message.note)
                rows.append((onset, last - began, message.note, velocity))
    return dsmr_mlx.Notes.of(rows)


def main() -> None:
    """Play the call, receive the answer and show both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("melody", nargs="?", default="ode", choices=MELODIES)
    parser.add_argument("--seconds", type=float, default=9.0, help="length of the melody")
    parser.add_argument("--max-turn", type=float, default=9.0, help="longest answer in seconds")
    parser.add_argument("--connect", metavar="HOST:PORT", help="address of `dsmr-mlx live --listen`")
    parser.add_argument("--model", help="a checkpoint or a run (default: the bundled model)")
    a = parser.parse_args()
    live, address = (None, a.connect) if a.connect else start_live(a.model, a.max_turn)
    call = excerpt(perform(MELODIES[a.melody]), seconds=a.seconds)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise a note may be held back
        print(f"playing {MELODIES[a.melody].title} …", flush=True)
        play(connection, call)
        answer = listen(connection, max_wait=8.0)
    if live:
        print(live.communicate()[0], end="")
    for name, notes in (("call", call), ("answer", answer.from_first_onset())):
        print(f"\n{name}: {summarize(notes)}\n\n{roll_text(notes, systems=1)}")


if __name__ == "__main__":
    main()
