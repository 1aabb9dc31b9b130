"""Call and response: a live session whose keyboard is the page and the MIDI ports, and whose music becomes a take."""

import threading
from collections import deque
from collections.abc import Callable

from mido import Message

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.clock import RealClock
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.session import Session as LiveSession
from dsmr_mlx.live.session import Turn
from dsmr_mlx.studio.prompt import prompt_at
from dsmr_mlx.studio.recording import TakeRecorder
from dsmr_mlx.studio.settings import chosen, playing_options
from dsmr_mlx.studio.takes import ms, pedal_between
from dsmr_mlx.studio.work import Stop, Work

Tell = Callable[[int, int, int, float], None]
MAX_EARLY = 1000  # messages


class DuetStop(Stop):
    """A stop that also ends the live session."""

    def __init__(self) -> None:
        super().__init__()
        self.live: LiveSession | None = None

    def set(self) -> None:
        """See `Stop`."""
        super().set()
        if self.live is not None:
            self.live.stop("stopped")


class Duet:
    """A job: human and model take turns after the music of a take (None: after nothing), until it is stopped.

    send(message): to the MIDI output; returns whether that worked. tell, tell_pedal: see `TakeRecorder`; thru: whether
    the human's keys go to the output
    """

    is_input = True

    def __init__(
        self,
        take: int | None,
        options: LiveOptions,
        seed: int,
        send: Callable[[Message], bool],
        tell: Tell,
        tell_pedal: Callable[[int], None] = lambda value: None,
    ):
        self.take, self.options, self.seed = take, options, seed
        self.tell, self.tell_pedal = tell, tell_pedal
        self.name, self._send = "the page", send
        self.stop = DuetStop()
        self._lock = threading.Lock()
        self.live: LiveSession | None = None
        self.clock = RealClock()
        self._early: deque[tuple[float, Message]] = deque(maxlen=MAX_EARLY)  # played before the model was ready

    def run(self, work: Work) -> int | None:
        """See `Job`."""
        self.work, session = work, work.session
        settings = dict(session.settings)
        loaded = work.load(settings["model"])
        if loaded.why_not_live:
            raise UserError(f"model {loaded.name}: {loaded.why_not_live}")
        music = session.music(self.take)
        begin = ms(music.duration)
        prompt = prompt_at(loaded.tokenizer, music, begin, session.tokens(self.take, loaded.tokenizer))
        plain = work.player_at(loaded, prompt.ids, self.stop)
        options = playing_options(settings, loaded.recommended)
        player = plain.branch(1, self.seed).steered([prompt.ids], **options)
        pedal = pedal_between(session.pedal(self.take), begin)
        fields = {"parent": self.take, "model": loaded.name, "seed": self.seed, "settings": chosen(settings)}
        told = (self._tell, self._tell_pedal)
        recorder = TakeRecorder(session, "duet", begin, *told, pedal=pedal, stop=self.stop, **fields)
        live = LiveSession(player, self.clock, self, self.options, recorder, self._turned)
        self.stop.live = live
        self.stop.check()
        live.run([self])
        return recorder.take

    def start(self, listener: LiveSession) -> None:
        """Accept messages for the session, after those that were played earlier; see `live.ports.Endpoint`."""
        with self._lock:
            if self._early:
                listener.begin(self._early[0][0])
            for time, message in self._early:
                listener.receive(message, time)
            self.live = listener
        self.work.show("duet", "your turn", turn=Voice.HUMAN.value)

    def receive(self, message: Message) -> None:
        """Pass on a message of the human; dropped while more wait than anybody plays. Thread-safe."""
        with self._lock:
            if self.live is None:
                self._early.append((self.clock.now(), message))
                return
        if not self.live.clock.is_crowded:
            self.live.receive(message)

    def pass_turn(self) -> None:
        """Pass the turn."""
        if self.live is not None:
            self.live.pass_turn()

    def send(self, message: Message) -> None:
        """Send a message to the MIDI output: see `live.session.Output`. A lost port does not end the duet."""
        self._send(message)

    def _tell(self, pitch: int, velocity: int, voice: int, time: float) -> None:
        """Tell of a key, unless it was played before the model was ready: it would sound late."""
        if self.live is not None:
            self.tell(pitch, velocity, voice, time)

    def _tell_pedal(self, value: int) -> None:
        """Tell of the pedal; like the keys, not before the model is ready."""
        if self.live is not None:
            self.tell_pedal(value)

    def _turned(self, turn: Turn) -> None:
        """Tell whose turn it is: the other's, if one has ended."""
        human = turn.voice is Voice.MODEL
        slow = f"; it fell behind {turn.behind} times" if turn.behind else ""
        text = f"your turn{slow}" if human else "the model plays"
        self.work.show("duet", text, turn=(Voice.HUMAN if human else Voice.MODEL).value)
