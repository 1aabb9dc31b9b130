"""The studio behind the server: one open session, the engine, what is played; and what each message does."""

import base64
import binascii
import math
import re
import secrets
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from mido import Message as MidiMessage

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.clock import RealClock
from dsmr_mlx.live.hands import is_music
from dsmr_mlx.live.instrument import Instrument, Voice
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.music.channel_messages import DRUM_CHANNEL, SUSTAIN
from dsmr_mlx.music.midi import CORPUS_LIMITS, read_midi
from dsmr_mlx.music.performance_messages import read_performance
from dsmr_mlx.music.repairs import repair_remark
from dsmr_mlx.studio import exports, folder
from dsmr_mlx.studio.devices import Devices
from dsmr_mlx.studio.duet import Duet
from dsmr_mlx.studio.engine import Engine
from dsmr_mlx.studio.making import Continue, Prepare
from dsmr_mlx.studio.messages import MAX_SEED, Message
from dsmr_mlx.studio.models import Models
from dsmr_mlx.studio.passages import Fill
from dsmr_mlx.studio.performer import Performer
from dsmr_mlx.studio.playback import Playback, close_later
from dsmr_mlx.studio.recording import TakeRecorder
from dsmr_mlx.studio.session import Session
from dsmr_mlx.studio.states import States
from dsmr_mlx.studio.takes import ms, rows_of
from dsmr_mlx.studio.work import Job, Status, Work

QUICK = ("key", "pedal", "turn", "stop", "stop_playing", "ping")  # must not wait for others
ENDS = ("stop", "stop_playing")  # of those: end also what the client has asked for before and is not begun yet
SLOW = ("import", "sessions", "new", "open", "save_as")  # read or write files
LATER = object()  # what a handler returns if the request is answered later; else the new take, or None

NOT_PLAYING = {"type": "playing", "take": None, "at": None}


class Client(Protocol):
    """Who is connected."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Thread-safe, does not block."""
        ...


Publish = Callable[[dict[str, Any], Client | None], None]  # to all clients but one


class Studio:
    """One open session and all that is done with it.

    path: of the session; home: the folder of the others. publish: thread-safe, does not block. unexpected: called for
    errors of the program. Raises `UserError` as `Session` does. `handle` is called by one thread at a time, but for
    messages of `QUICK`; `close` ends everything.
    """

    def __init__(
        self, path: Path, home: Path, models: Models, publish: Publish, unexpected: Callable[[BaseException], None]
    ):
        self.home, self.models, self.unexpected, self._publish = home, models, unexpected, publish
        self.session = Session(path, self.publish)
        self.work = Work(self.session, models, States(), self.publish)
        self.engine = Engine(self.work, unexpected)
        self.devices = Devices(self._play, self._tell_problem, self._tell_ports)
        self.through = Instrument(self.devices.send)  # what is played on the page, on the MIDI output
        self.recorder: TakeRecorder | None = None
        self._recorder_clock: RealClock | None = None
        self.playback: Playback | None = None
        self._playback_clock: RealClock | None = None
        self._playing: int | None = None
        self._playback_lock = threading.Lock()  # a playback may end by itself in its own thread
        self._performers: dict[Client, Performer] = {}  # clients that have played
        self._sender = threading.local()  # the client whose key is being handled in this thread
        self.engine.prepare(Prepare(self.session.tree.selected))

    # Clients

    def publish(self, message: dict[str, Any]) -> None:
        """Send a message to all clients."""
        self._publish(message, None)

    def welcome(self) -> dict[str, Any]:
        """The message `session`."""
        extra = {
            "models": self.models.describe(),
            "ports": self.devices.message(),
            "exports": exports.available(),
            "status": self.status.message(),
        }
        return {"type": "session"} | self.session.message() | extra

    def playing(self) -> dict[str, Any]:
        """The message `playing`, with the current time of the take."""
        with self._playback_lock:
            if self.playback is None or self._playback_clock is None:
                return NOT_PLAYING
            at = ms(self.playback.time_at(self._playback_clock.now()))
            return {"type": "playing", "take": self._playing, "at": at}

    @property
    def status(self) -> Status:
        """What is being done."""
        return self.work.whole_status

    def handle(self, client: Client, message: Message) -> None:
        """Do what a message asks for. Raises `UserError`."""
        handler: Callable[..., int | object | None] = getattr(self, f"_on_{message.type}")
        take = handler(client, message.request, **message.fields)
        if take is not LATER and message.request is not None:
            client.send({"type": "done", "request": message.request, "take": take})

    def leave(self, client: Client) -> None:
        """Release what a client holds that has disconnected. Called in the thread of its messages of `QUICK`."""
        if performer := self._performers.pop(client, None):
            performer.leave()

    def _submit(self, client: Client, request: int | None, job: Job) -> object:
        """Let the engine do a job; the request is answered when it is finished."""

        def finished(take: int | None, problem: str | None) -> None:
            if problem is not None:
                client.send({"type": "error", "message": plain(problem), "request": request})
            elif request is not None:
                client.send({"type": "done", "request": request, "take": take})
            if take is not None:
                self.engine.prepare(Prepare(take))  # so that it can be continued at once

        self._end_listening()
        self.engine.submit(job, finished)
        return LATER

    # Music that is made

    def _on_continue(self, client, request, take, at, seconds, count, seed) -> object:
        if take is not None:
            self.session.get(take)
        return self._submit(client, request, Continue(take, at, seconds, count, self._seed(seed)))

    def _on_replace(self, client, request, take, start, end, count, seed) -> object:
        return self._fill(client, request, "replace", take, count, seed, start=start, end=end)

    def _on_insert(self, client, request, take, at, seconds, count, seed) -> object:
        return self._fill(client, request, "insert", take, count, seed, at=at, seconds=seconds)

    def _on_lead(self, client, request, take, at, to, seconds, count, seed) -> object:
        self.session.get(to)
        return self._fill(client, request, "lead", take, count, seed, at=at, to=to, seconds=seconds)

    def _fill(self, client, request, kind, take, count, seed, **fields) -> object:
        self.session.get(take)
        return self._submit(client, request, Fill(kind, take, count, self._seed(seed), fields))

    def _seed(self, seed: int | None) -> int:
        """The seed of a request, else that of the settings, else a new one."""
        seed = self.session.settings["seed"] if seed is None else seed
        return secrets.randbelow(MAX_SEED + 1) if seed is None else seed

    def _on_stop(self, client, request) -> None:
        self.engine.stop()

    # Music that comes from elsewhere

    def _on_import(self, client, request, name, data) -> int:
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{name}: not base64, expected the bytes of a MIDI file in base64") from None
        try:
            notes, repairs = read_midi(content, limits=CORPUS_LIMITS)
            lost = read_midi(content, programs=True).notes.lost_as_piano
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pedal = sustain_pedal(content, end := ms(notes.duration))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        rows = rows_of(notes)
        title = re.sub(r"\.(midi?|kar)$", "", Path(name).name.strip(), flags=re.IGNORECASE).strip() or "File"
        (take,) = self.session.add("file", name=title, rows=rows, pedal=pedal, end=end)
        self.engine.prepare(Prepare(take))
        if remarks := [remark for remark in (lost, repair_remark(repairs)) if remark]:
            self._tell_problem(f"{name}: {', '.join(remarks)}")
        return take

    def _on_listen(self, client, request, on) -> int | None:
        if not on:
            return self._end_listening()
        if isinstance(self.engine.job, Duet):
            raise UserError("`listen`: the duet listens already")
        if self.recorder is None:
            self._recorder_clock = RealClock()
            told = {"tell": self._tell, "tell_pedal": self._tell_pedal, "failed": self._tell_problem}
            self.recorder = TakeRecorder(self.session, "played", **told)
            self._recorder_clock.schedule(self.recorder)
            self.work.recording = True
            self.work.show_status()
        return None

    def _end_listening(self) -> int | None:
        """Complete the take of the recording, and return it."""
        recorder, clock = self.recorder, self._recorder_clock
        if recorder is None:
            return None
        kept = True
        try:
            recorder.close(clock.now())
        except UserError:
            kept = recorder.take is not None  # else nothing of it is in memory: it can be ended again
            raise
        finally:
            if kept:
                self.recorder = self._recorder_clock = None
                self.work.recording = False
                clock.close()
                self.work.show_status()
        return recorder.take

    def _on_duet(self, client, request, on, take, pause, max_turn) -> object | None:
        if not on:
            if isinstance(self.engine.job, Duet):
                self.engine.stop()
            return None
        if take is not None:
            self.session.get(take)
        through = self.devices.output is not None and self.devices.input is None
        self.through.silence()  # from now on the duet has the keys
        options = LiveOptions(pause=pause, max_turn=max_turn, thru=through)
        told = (self._tell, self._tell_pedal)
        return self._submit(client, request, Duet(take, options, self._seed(None), self.devices.send, *told))

    def _on_turn(self, client, request) -> None:
        if isinstance(job := self.engine.job, Duet):
            job.pass_turn()

    def _on_key(self, client, request, pitch, velocity) -> None:
        kind = "note_on" if velocity else "note_off"
        self._from_page(client, MidiMessage(kind, note=pitch, velocity=velocity))

    def _on_pedal(self, client, request, value) -> None:
        self._from_page(client, MidiMessage("control_change", control=SUSTAIN, value=value))

    def _from_page(self, client: Client, message: MidiMessage) -> None:
        if client not in self._performers:
            self._performers[client] = Performer(lambda message: self._play_of(client, message))
        self._performers[client].receive(message)

    def _play_of(self, client: Client, message: MidiMessage) -> None:
        self._sender.client = client
        try:
            self._play(message)
            if not isinstance(self.engine.job, Duet):
                self.through.play(Voice.HUMAN, message)
        finally:
            self._sender.client = None

    def _play(self, message: MidiMessage) -> None:
        """Pass what a person plays to the duet or the recorder; not a clock or drums."""
        if not is_music(message):
            return
        job, recorder, clock = self.engine.job, self.recorder, self._recorder_clock
        if isinstance(job, Duet):
            job.receive(message)
        elif recorder is not None and clock is not None:
            recorder.add(Voice.HUMAN, clock.now(), message)

    def _tell(self, pitch: int, velocity: int, voice: int, time: float) -> None:
        """Tell of a key at once, except the client that has pressed it."""
        sender = getattr(self._sender, "client", None) if voice == 0 else None
        self._publish({"type": "key", "pitch": pitch, "velocity": velocity, "voice": voice, "time": time}, sender)

    def _tell_pedal(self, value: int) -> None:
        """Tell of the sustain pedal at once, except the client that has moved it."""
        self._publish({"type": "pedal", "value": value}, getattr(self._sender, "client", None))

    # Takes and settings

    def _on_keep(self, client, request, take, kept) -> None:
        self.session.edit(take, "kept", kept)

    def _on_rename(self, client, request, take, name) -> None:
        self.session.edit(take, "name", name)

    def _on_select(self, client, request, take) -> None:
        self.session.select(take)
        self.engine.prepare(Prepare(take))

    def _on_undo(self, client, request) -> None:
        with self.session.lock:
            if self.engine.cancel():  # what was prepared is what is undone
                return
        if any(self.session.tree.takes[take].growing for take in self.session.next_undone):
            self._stop_growing()
        self.session.undo()

    def _on_redo(self, client, request) -> None:
        self.session.redo()

    def _stop_growing(self) -> None:
        self.engine.stop()
        self._end_listening()

    def _on_settings(self, client, request, settings, at) -> None:
        before = self.session.settings
        if settings.get("model") is not None:
            self.models.check(settings["model"])
        self.session.set(settings)
        changed = {name for name in settings if settings[name] != before[name]}
        job = self.engine.job
        if isinstance(job, Continue) and changed - {"best_of", "seed"}:
            job.steer(at)
        elif job is None and "model" in changed:
            self.engine.prepare(Prepare(self.session.tree.selected))

    # MIDI ports

    def _on_midi(self, client, request, input, output) -> None:
        self._stop_playing()
        try:
            self.devices.choose(input, output)
        finally:
            self._tell_ports()

    def _tell_problem(self, reason: str) -> None:
        """Tell all clients what went wrong, from any thread."""
        self.publish({"type": "error", "message": plain(reason), "request": None})

    def _tell_ports(self) -> None:
        """Tell all clients of the MIDI ports, from any thread."""
        self.publish({"type": "midi"} | self.devices.message())

    def _on_play(self, client, request, take, at) -> None:
        self.session.get(take)
        if self.devices.output is None:
            raise UserError("`play`: no MIDI output is chosen, expected one of `midi` first")
        self._end_playback()  # clients see the new one only
        clock = RealClock()
        session = self.session

        def music():
            with session.lock:
                played = session.tree.takes[take]
                return session.tree.music(take), played.end if played.growing else math.inf

        def resumed(at: float) -> None:
            with self._playback_lock:
                if self._playback_clock is clock:
                    self.publish({"type": "playing", "take": take, "at": ms(at)})

        playback = Playback(music, at, clock.now(), self.devices.send, lambda: self._played(clock), resumed)
        with self._playback_lock:
            self.playback, self._playback_clock, self._playing = playback, clock, take
            self.publish({"type": "playing", "take": take, "at": at})
        clock.schedule(playback)

    def _played(self, clock: RealClock) -> None:
        """Tell that a playback has ended by itself, in its own thread."""
        close_later(clock)
        with self._playback_lock:
            if self._playback_clock is clock:
                self.playback = self._playback_clock = self._playing = None
                self.publish(NOT_PLAYING)

    def _end_playback(self) -> bool:
        """End a playback without telling of it. Return whether there was one."""
        with self._playback_lock:
            playback, clock = self.playback, self._playback_clock
            self.playback = self._playback_clock = self._playing = None
        if playback is not None:
            playback.close()
            close_later(clock)
        return playback is not None

    def _stop_playing(self) -> None:
        if self._end_playback():
            self.publish(NOT_PLAYING)

    def _on_stop_playing(self, client, request) -> None:
        self._stop_playing()

    # Sessions

    def _on_sessions(self, client, request) -> None:
        known = {self.session.path: len(self.session.tree.takes)}
        client.send({"type": "sessions", "sessions": folder.describe_sessions(self.home, known)})

    def _on_new(self, client, request, name) -> None:
        self._switch(folder.new_path(self.home, name))

    def _on_open(self, client, request, name) -> None:
        path = folder.session_path(self.home, name)
        if not path.exists():
            raise UserError(f"`name` {name}: no such session")
        if path != self.session.path:
            self._switch(path)

    def _switch(self, path: Path) -> None:
        """Open another session; if that fails, this one stays open."""
        self._end_listening()  # may fail if the disk is full; then the other one must not be open
        new = Session(path, self.publish)
        self._stop_playing()
        self.engine.drain()
        old, self.session, self.work.session = self.session, new, new
        try:
            old.close()
        finally:
            self.publish(self.welcome())
            self.engine.prepare(Prepare(new.tree.selected))

    def _on_save_as(self, client, request, name) -> None:
        self.session.copy_to(folder.new_path(self.home, name))

    def _on_ping(self, client, request) -> object:
        client.send({"type": "pong", "request": request})
        return LATER

    def close(self) -> None:
        """End everything, whatever fails: keys up, takes complete, the file closed."""
        with ExitStack() as closing:  # called from the last to the first, even if one raises
            closing.callback(self.session.close)
            closing.callback(self.devices.close)
            closing.callback(self.through.close)
            closing.callback(self.engine.close)
            closing.callback(self._end_listening)
            closing.callback(self._stop_playing)


def sustain_pedal(content: bytes, end: float) -> list[tuple[float, int]]:
    """Return the sustain pedal of a MIDI file, as pairs (time, value), of all channels but drums together.

    It is up from the `end` of the notes on: drums may sound for days after that.
    """
    pedal: list[tuple[float, int]] = []
    down: dict[int, int] = {}  # channel → value
    for time, message in read_performance(content):
        if ms(time) >= end:
            break
        kind, channel = message[0] & 0xF0, message[0] & 0x0F
        if kind == 0xB0 and message[1] == SUSTAIN and channel != DRUM_CHANNEL:
            down[channel] = message[2]
            value = max(down.values())
            if not pedal or pedal[-1][1] != value:
                pedal.append((ms(time), value))
    if pedal and pedal[-1][1]:
        pedal.append((end, 0))
    return pedal


def plain(message: str) -> str:
    """Return an error message without the backquotes around the names of fields."""
    return message.replace("`", "")
