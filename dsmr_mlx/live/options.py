"""The options of a live session."""

from dataclasses import dataclass

from dsmr_mlx.common.config import Config
from dsmr_mlx.common.parsing import is_whole_number
from dsmr_mlx.live.instrument import SUSTAIN

TAKE_OVERS = "pause, pedal, controller:N or enter"


@dataclass(frozen=True, kw_only=True)
class LiveOptions(Config):
    """Times are in seconds. Raises `UserError` for invalid values.

    take_over: what starts the model's turn: a "pause" of the human, the sustain "pedal", a "controller:N" that reaches
        64, or "enter"; the last three also end it
    pause: how long no key may be down before the model takes over
    max_turn: length after which the model ends its turn; None: it plays until the human does
    channel: MIDI channel of the model's notes, 1 to 16; thru: whether the human's messages are sent on
    latency: how much earlier notes are sent, for an instrument that takes that long to sound
    lookahead: how far ahead the model plays
    head_start: time between the take-over and the first note, in which it is computed
    max_late: how late a note may still be played; max_behind: how far the model may fall behind before it skips to now
    """

    take_over: str = "pause"
    pause: float = 1.0
    max_turn: float | None = None
    channel: int = 1
    thru: bool = False
    latency: float = 0.0
    lookahead: float = 0.75
    head_start: float = 0.05
    max_late: float = 0.1
    max_behind: float = 0.3

    def __post_init__(self) -> None:
        self.check_types()
        self.require("take_over", self.take_over in ("pause", "pedal", "enter") or self._is_controller(), TAKE_OVERS)
        for name in ("pause", "lookahead", "head_start", "max_late", "max_behind"):
            self.require(name, getattr(self, name) > 0, "more than 0 seconds")
        self.require("max_turn", self.max_turn is None or self.max_turn > 0, "more than 0 seconds")
        self.require("channel", 1 <= self.channel <= 16, "1 to 16")
        self.require("latency", 0 <= self.latency <= 2, "0 to 2 seconds")

    def _is_controller(self) -> bool:
        kind, _, number = self.take_over.partition(":")
        return kind == "controller" and is_whole_number(number) and int(number) < 120

    @property
    def controller(self) -> int | None:
        """The number of the controller that passes the turn, or None."""
        if self.take_over == "pedal":
            return SUSTAIN
        return int(self.take_over.partition(":")[2]) if self._is_controller() else None
