"""One source of music: what it holds down is released when it disappears."""

import threading
from collections.abc import Callable

from mido import Message

from dsmr_mlx.live.hands import Hands


class Performer:
    """A client that plays, or a MIDI input. Thread-safe.

    play(message): called for each message, in the thread of the caller
    """

    def __init__(self, play: Callable[[Message], None]):
        self._play, self._hands, self._lock = play, Hands(), threading.Lock()

    def receive(self, message: Message) -> None:
        """Pass on a message."""
        with self._lock:
            self._hands.update(message)
        self._play(message)

    def leave(self) -> None:
        """Release all keys and pedals. Called when no more messages come."""
        with self._lock:
            messages = self._hands.release_messages()
        for message in messages:
            self.receive(message)
