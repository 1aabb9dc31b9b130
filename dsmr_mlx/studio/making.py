"""Takes that continue from a point: made side by side as lanes of one player, steered while they are made.

A strand is a player with the takes of its lanes. There is one strand, until other settings are to apply from an earlier
time: then the lanes have read different numbers of tokens, and each goes on as a strand of its own, in turn.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import make_limits
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.studio.lanes import Lane
from dsmr_mlx.studio.models import LoadedModel
from dsmr_mlx.studio.prompt import Prompt, prompt_at, with_final_releases
from dsmr_mlx.studio.settings import chosen, playing_options
from dsmr_mlx.studio.states import STORED_STRIDE, STRIDE, Interrupted
from dsmr_mlx.studio.takes import Take, ms, pedal_between, put_together, rows_of, sounding_across
from dsmr_mlx.studio.work import Stop, Work

UPDATE_SECONDS = 0.1  # between two messages with notes
FIRST_SECONDS = 1.0  # of music, after which messages come at that pace
LEAD_SECONDS = 15.0  # of music ahead of the clock on the wall, if no length is given
PACE_SECONDS = 0.05  # between two looks at that clock
MIN_SECONDS = 8.0  # of new music before a model may end a piece: where one has ended, it would end again at once
MAX_SECONDS = 4 * 3600.0  # of a take without a given length
SHORT = 1000  # tokens that are read ahead without a word


@dataclass
class Strand:
    """A player of a model and its lanes' takes; steps: what it plays within its limits."""

    loaded: LoadedModel
    player: Player
    lanes: list[Lane]
    limits: Limits

    def __post_init__(self) -> None:
        self.steps: Iterator[np.ndarray] = self.player.play(self.limits)

    def steer(self, **options: Any) -> None:
        """Go on with other sampling and processors."""
        ids = [np.array(lane.ids, np.int64) for lane in self.lanes]
        shared = len(ids) if self.player.decode_state.lanes > 1 else 1  # one while nothing has been played
        self.player = self.player.steered(ids[:shared], **options)
        self.steps = self.player.play(self.limits)

    def let_end(self) -> None:
        """Let the model end the piece from now on."""
        self.limits = replace(self.limits, may_end=True)
        self.steps = self.player.play(self.limits)

    @property
    def going(self) -> list[Lane]:
        """The lanes that are not finished."""
        return [lane for lane in self.lanes if not lane.finished]

    @property
    def now(self) -> float:
        """The time of the slowest lane that goes on."""
        return min((lane.now for lane in self.going), default=float("inf"))


class Continue:
    """A job: `count` takes that go on from a point in a take, or from nothing.

    take: None to begin a piece; at: None for its end; seconds: of new music, None until it is stopped or the model ends
    the piece; seed: None for the one of the settings, or a new one.
    """

    def __init__(self, take: int | None, at: float | None, seconds: float | None, count: int, seed: int):
        self.take, self.at, self.seconds, self.count, self.seed = take, at, seconds, count, seed
        self.stop = Stop()
        self._lock = threading.Lock()
        self._wanted: list[float | None] = []  # times from which new settings apply

    def steer(self, at: float | None) -> None:
        """Go on with the session's settings: from a time, or from what has been made. Thread-safe."""
        with self._lock:
            self._wanted = [at]

    def run(self, work: Work) -> int | None:
        """See `Job`."""
        self.work = work
        settings = dict(work.session.settings)
        self.loaded = loaded = work.load(settings["model"])
        loaded.require_clock()
        music = work.session.music(self.take)
        at = ms(max(music.duration, 0.0) if self.at is None else min(self.at, music.duration))
        self.begin = at
        options = self._options(settings, loaded, at)
        prompt = prompt_at(loaded.tokenizer, music, at, work.session.tokens(self.take, loaded.tokenizer))
        plain = work.player_at(loaded, prompt.ids, self.stop)
        player = plain.branch(self.count, self.seed).steered([prompt.ids], **options)
        held = rows_of(sounding_across(music, at))
        lanes = [Lane(0, player, prompt, list(held)) for _ in range(self.count)]
        first = lanes[0].update()
        self.music = music
        pedal = pedal_between(work.session.pedal(self.take), at)
        fields = {"parent": self.take, "begin": at, "end": max(at, ms(first.end)), "rows": lanes[0].rows}
        fields |= {"pedal": pedal, "model": loaded.name, "seed": self.seed, "settings": chosen(settings)}
        takes = work.session.add("continue", self.count, stop=self.stop, growing=True, **fields)
        self.growing = set(takes)
        for lane, take in zip(lanes, takes, strict=True):
            lane.take = take
        self.strands = [Strand(loaded, player, lanes, self._limits(loaded, prompt))]
        try:
            self._play()
        finally:
            self._complete()
        return takes[0]

    def _limits(self, loaded: LoadedModel, prompt: Prompt) -> Limits:
        """The limits of a player that has read a prompt: no key moves before its point."""
        tokenizer = loaded.tokenizer
        if self.seconds is None:
            ends = tokenizer.eos_id is not None
            limits = Limits() if ends else make_limits(tokenizer, MAX_SECONDS, None, False)
        else:
            limits = make_limits(tokenizer, self.seconds, None, False)
            end = (self.begin + self.seconds - prompt.start) / tokenizer.event_grammar().seconds_per_tick
            limits = replace(limits, ticks=max(round(end) - prompt.ticks, 1))
        return replace(limits, since=(prompt.ticks,), silent=prompt.silent)

    def _options(self, settings: dict[str, Any], loaded: LoadedModel, at: float) -> dict[str, Any]:
        """The sampling and processors of music that goes on from a time."""
        left = None if self.seconds is None else max(self.begin + self.seconds - at, 0.1)
        return playing_options(settings, loaded.recommended, left)

    def _resteer(self, at: float | None) -> None:
        """Go on with the session's settings, from a time or from what has been made.

        If they fail or the job is stopped first, it keeps its strands, model and settings.
        """
        self._update()
        settings = dict(self.work.session.settings)
        try:
            loaded = self.work.load(settings["model"])
            loaded.require_clock()
            if at is None and loaded is self.loaded:
                for strand in self.strands:
                    strand.steer(**self._options(settings, loaded, strand.now))
            else:
                new = [self._strand_from(lane, i, at, settings, loaded) for i, lane in enumerate(self._going())]
                for strand in self.strands:
                    self._keep_end(strand)
                self.strands = new
        except Interrupted:
            return
        except UserError as error:
            self.work.publish({"type": "error", "message": str(error), "request": None})
            return
        self.loaded = loaded
        for take in self.growing:
            self.work.session.change(take, settings=chosen(settings), model=loaded.name)

    def _going(self) -> list[Lane]:
        return [lane for strand in self.strands for lane in strand.going]

    def _strand_from(
        self, lane: Lane, i: int, at: float | None, settings: dict[str, Any], loaded: LoadedModel
    ) -> Strand:
        """A strand that makes a take anew from a time, None for its present end."""
        at = ms(lane.now if at is None else min(max(at, self.begin), lane.now))
        lane.update()
        rows = [row for row in lane.rows if row[0] < at]
        music = put_together(self.music, Take(0, None, "continue", "", begin=self.begin, rows=rows))
        known = lane.player.tokenizer.fingerprint == loaded.tokenizer.fingerprint
        ids = np.array(lane.ids, np.int64) if known else None
        prompt = prompt_at(loaded.tokenizer, music, at, ids)
        options = self._options(settings, loaded, at)
        plain = self.work.player_at(loaded, prompt.ids, self.stop)
        player = plain.branch(1, self.seed + i).steered([prompt.ids], **options)
        new = Lane(lane.take, player, prompt, rows)
        new.repeat()
        return Strand(loaded, player, [new], self._limits(loaded, prompt))

    def _play(self) -> None:
        """Play until all lanes are finished or the job is stopped."""
        started, shown, made = time.monotonic(), 0.0, 0.0
        while any(strand.going for strand in self.strands) and not self.stop.is_set():
            with self._lock:
                wanted, self._wanted = self._wanted, []
            if wanted:
                self._resteer(wanted[0])
            strand = min(self.strands, key=lambda each: each.now)
            before = strand.now
            if self._may_end(strand):
                strand.let_end()
            self._step(strand)
            made += max(min(strand.now, 1e9) - before, 0.0) if strand.going else 0.0
            now = time.monotonic()
            new = max(lane.now for each in self.strands for lane in each.lanes) - self.begin
            if now - shown >= UPDATE_SECONDS or (new < FIRST_SECONDS and strand.player.position % 8 == 0):
                shown = now
                self._update()
                self._show(made / max(now - started, 1e-3) / len(self.strands))
            self._keep_pace(started)

    def _may_end(self, strand: Strand) -> bool:
        """Whether a strand without a given length has played enough for the model to end the piece, and may not yet."""
        ends = self.seconds is None and strand.loaded.tokenizer.eos_id is not None
        return ends and not strand.limits.may_end and strand.now - self.begin >= MIN_SECONDS

    def _keep_pace(self, started: float) -> None:
        """Wait while music without a given length, in its slowest take, is far ahead of who listens."""
        made = min(strand.now for strand in self.strands) - self.begin
        while self.seconds is None and LEAD_SECONDS < made - (time.monotonic() - started) < math.inf:
            if self.stop.is_set() or self._wanted:
                return
            time.sleep(PACE_SECONDS)

    def _step(self, strand: Strand) -> None:
        """Play one token in each lane of a strand."""
        step = next(strand.steps, None)
        if step is None:
            for lane in strand.going:
                lane.finish()
            return
        ended = np.isin(step, strand.player.walk.ending)
        for lane, token, end in zip(strand.lanes, step.tolist(), ended.tolist(), strict=True):
            lane.play(token)
            if end or lane.now - self.begin > MAX_SECONDS:
                lane.finish()
        if strand.player.position % STRIDE == 0:
            for i, lane in enumerate(strand.lanes):
                if not lane.finished:
                    self._keep(strand, i, lane, stored=strand.player.position % STORED_STRIDE == 0)

    def _keep(self, strand: Strand, i: int, lane: Lane, stored: bool) -> None:
        """Keep the state of a lane that has read and played the ids of its take."""
        ids = np.array(lane.ids, np.int64)
        plain = strand.player.branch(1, lane=i).steered([ids])
        self.work.states.keep(strand.loaded, plain, ids, self.work.session.store if stored else None)

    def _update(self) -> None:
        """Write and publish the notes that have come."""
        with ExitStack() as writing:  # all of them, even if one raises
            for lane in (lane for strand in self.strands for lane in strand.lanes):
                if lane.take in self.growing:
                    update, extend = lane.update(), self.work.session.extend
                    writing.callback(
                        extend, lane.take, update.first, update.rows, update.end, growing=not lane.finished
                    )
                    if lane.finished:
                        self.growing.discard(lane.take)

    def _show(self, speed: float) -> None:
        new = max(lane.now for strand in self.strands for lane in strand.lanes) - self.begin
        done = None if self.seconds is None else min(new / self.seconds, 1.0)
        text = f"{self.loaded.name} plays"
        self.work.show("making", text, progress=done, takes=sorted(self.growing), speed=round(speed, 2))

    def _complete(self) -> None:
        """End all lanes where they are, and keep their states."""
        for strand in self.strands:
            for lane in strand.lanes:
                if lane.take in self.growing:
                    lane.finish()
        self._update()
        for strand in self.strands:
            self._keep_end(strand)

    def _keep_end(self, strand: Strand) -> None:
        """Keep the ids of each take that is finished, and the state after them."""
        tokenizer, session = strand.loaded.tokenizer, self.work.session
        for i, lane in enumerate(strand.lanes):
            if not lane.finished:
                continue
            ids = np.array(lane.ids, np.int64)
            final = with_final_releases(tokenizer, session.music_made(lane.take), ids)
            if final is None:
                continue
            session.keep_tokens(lane.take, tokenizer.fingerprint, final)
            same = ids[: len(final)] == final[: len(ids)]
            kept = len(same) if same.all() else int(same.argmin())
            player = strand.player.branch(1, lane=i)
            if 0 <= player.position - kept <= player.rewindable:
                player.rewind(player.position - kept)
                plain = player.steered([ids[:kept]])
                plain.read(final[kept:])
                self.work.states.keep(strand.loaded, plain, final, session.store)


class Prepare:
    """A job in the background: read the music of a take, so that it can be continued at once from anywhere in it.

    take: None only loads the model and begins a piece. If it is interrupted and run again, what was read since then is
    kept before its own states.
    """

    def __init__(self, take: int | None):
        self.take = take
        self.stop = Stop()
        self.begun: int | None = None  # on the clock of the states

    def run(self, work: Work) -> None:
        """See `Job`."""
        loaded = work.load(work.session.settings["model"])
        try:
            loaded.require_clock()
            music = work.session.music(self.take)
        except UserError:  # whoever continues it will be told
            return
        prompt = prompt_at(loaded.tokenizer, music, music.duration, work.session.tokens(self.take, loaded.tokenizer))

        def progress(done: int, total: int) -> None:
            self.stop.check()
            if total > SHORT:
                work.show("reading", "reading the music ahead", progress=done / total)

        if self.begun is None:
            self.begun = work.states.now()
        work.states.player_at(loaded, prompt.ids, work.session.store, progress, ahead=True, time=self.begun)
