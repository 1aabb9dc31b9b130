"""Call and response over a socket: a melody is played to `dsmr-mlx live`, and what it answers is heard and shown.

    python examples/call_and_response.py                             # starts the other side, too
    python examples/call_and_response.py --connect 192.168.1.5:9080  # there: dsmr-mlx live --listen 0.0.0.0:9080

What goes over the wire is MIDI, byte by byte, both ways: any program that writes it to a socket can play along.
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

SILENCE = 3.0  # seconds, after which an answer is over
RECORDING = Path("example-output/call-and-response.mid")


def start_live(model: str | None, max_turn: float) -> tuple[subprocess.Popen, str]:
    """`dsmr-mlx live` on a port that the system chooses, and its address, once it waits there for a client."""
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
    """Press and release keys, each at its time."""
    keys = [key for on, off, pitch, velocity in notes.rows for key in ((on, velocity, pitch), (off, 0, pitch))]
    began = time.monotonic()
    for at, velocity, pitch in sorted(keys):  # what goes up at a time does so before anything goes down
        time.sleep(max(0.0, began + at - time.monotonic()))
        connection.sendall(Message("note_on", note=pitch, velocity=velocity).bin())


def listen(connection: socket.socket, patience: float) -> dsmr_mlx.Notes:
    """What is played from now on, until no key has been down for a while; in seconds from now."""
    parser, down, rows, began = Parser(), {}, [], time.monotonic()
    connection.settimeout(0.05)
    heard = began + patience
    while down or time.monotonic() < heard + SILENCE:
        try:
            data = connection.recv(4096)
        except TimeoutError:
            continue
        if not data:
            break
        heard = time.monotonic()
        parser.feed(data)
        for message in parser:
            if message.type == "note_on" and message.velocity:
                down[message.note] = heard - began, message.velocity
            elif message.type in ("note_on", "note_off") and message.note in down:
                onset, velocity = down.pop(message.note)
                rows.append((onset, heard - began, message.note, velocity))
    return dsmr_mlx.Notes.of(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("melody", nargs="?", default="ode", choices=MELODIES)
    parser.add_argument("--seconds", type=float, default=9.0, help="of the melody")
    parser.add_argument("--max-turn", type=float, default=9.0, help="seconds of the answer, at most")
    parser.add_argument("--connect", metavar="HOST:PORT", help="where `dsmr-mlx live --listen` waits")
    parser.add_argument("--model", help="a checkpoint or a run, instead of the one that comes with the program")
    a = parser.parse_args()
    live, address = (None, a.connect) if a.connect else start_live(a.model, a.max_turn)
    call = excerpt(perform(MELODIES[a.melody]), seconds=a.seconds)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a note waits for the one before
        print(f"playing {MELODIES[a.melody].title} …", flush=True)
        play(connection, call)
        answer = listen(connection, patience=5.0)
    if live:
        print(live.communicate()[0], end="")
    for name, notes in (("call", call), ("answer", answer.from_first_onset())):
        print(f"\n{name}: {summarize(notes)}\n\n{roll_text(notes, systems=1)}")


if __name__ == "__main__":
    main()
