"""Takes with new music in a gap: a passage replaced, music put in, a transition into another piece.

They grow while they are made, unless more candidates are made than takes are kept: then nobody knows yet which.
"""

import time
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

from dsmr_mlx.generation.filling import candidates_for, fill_gaps
from dsmr_mlx.generation.gap_player import Reader, Watch, before_gap, ids_of, place_to_show
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.gapped import GappedMusic, inserted, led, replaced
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio.models import LoadedModel
from dsmr_mlx.studio.settings import chosen, playing_options
from dsmr_mlx.studio.takes import Row, key_of, ms, pedal_between, rows_of, sounding_across
from dsmr_mlx.studio.work import Stop, Work

UPDATE_SECONDS = 0.2  # between two messages with notes


class Fill:
    """A job: `count` takes with other music in a gap of a take.

    kind: "replace" (start, end), "insert" (at, seconds) or "lead" (at, to, seconds); fields: those in brackets, of the
    message
    """

    def __init__(self, kind: str, take: int, count: int, seed: int, fields: dict[str, Any]):
        self.kind, self.take, self.count, self.seed, self.fields = kind, take, count, seed, fields
        self.stop = Stop()

    def run(self, work: Work) -> int | None:
        """See `Job`."""
        self.work = work
        settings = dict(work.session.settings)
        loaded = work.load(settings["model"])
        loaded.require_clock()
        music = self._gapped(work.session.music(self.take))
        lanes = candidates(loaded, settings["best_of"], self.count)
        options = playing_options(settings, loaded.recommended)
        reader = self._reader(loaded, music, lanes or self.count, options)
        self.stop.check()
        self.ranks = lanes is not None
        self.takes = GapTakes(work, self, music, model=loaded.name, settings=chosen(settings))
        self._show(0.0, 1.0)
        watch = Watch(self._show, self.stop.is_set) if self.ranks else Watching(self)
        try:
            filled = fill_gaps(
                loaded.model, loaded.tokenizer, music, n=self.count, best_of=lanes, watch=watch, reader=reader
            )
            self.takes.write([version.passages[0].notes for version in filled], None)
        finally:
            self.takes.complete()
        return self.takes.ids[0]

    def _gapped(self, parent: Notes) -> GappedMusic:
        """The music with a gap. Raises `UserError` for an invalid one."""
        f = self.fields
        if self.kind == "replace":
            return replaced(parent, [(ms(f["start"]), ms(f["end"]))])
        if self.kind == "insert":
            return inserted(parent, ms(f["at"]), ms(f["seconds"]))
        until = None if f["at"] is None else ms(f["at"])
        return led(parent, self.work.session.music(f["to"]), ms(f["seconds"]), until)

    def _reader(self, loaded: LoadedModel, music: GappedMusic, lanes: int, options: dict[str, Any]) -> Reader:
        """A reader that has read up to where the model is shown what follows, from the nearest state on."""
        before = before_gap(loaded.tokenizer, music)
        events = before.events[: place_to_show(loaded.model, loaded.tokenizer, before, music)]
        ids = loaded.tokenizer.prompt(ids_of(loaded.tokenizer, events))
        plain = self.work.player_at(loaded, ids, self.stop)
        return Reader(plain.branch(lanes, self.seed).steered([ids], **options), events)

    def _show(self, done: float, total: float) -> None:
        if done < total or not self.ranks:
            self.work.show("making", "filling the gap", progress=done / total, takes=self.takes.ids)
        else:
            self.work.show("ranking", "choosing what fits best", progress=None)


class Watching(Watch):
    """Looks on while takes grow, and writes what has been played from time to time."""

    def __init__(self, job: Fill):
        super().__init__(job._show, job.stop.is_set)
        self.takes, self.due = job.takes, 0.0

    def step(self, player: Player, lanes: int, seconds: float) -> None:
        """See `Watch`."""
        super().step(player, lanes, seconds)
        now = time.monotonic()
        if now >= self.due:
            lanes = range(len(self.gap.lanes))
            passages = [self.gap.music.fitted(self.gap.notes(i)) for i in lanes]
            self.takes.write(passages, [self.gap.reached(i) for i in lanes])
            self.due = now + UPDATE_SECONDS


class GapTakes:
    """The takes of a job, one for each version: one group, whose passages differ."""

    def __init__(self, work: Work, job: Fill, music: GappedMusic, **fields: Any):
        """fields: of `Take`."""
        self.session, self.job = work.session, job
        self.ids: list[int] = []
        self.growing = False
        self.rows: list[list[Row]] = [[] for _ in range(job.count)]
        self.begin, self.end = map(ms, music.gaps[0])
        # Notes from before the gap keep their ends; a transition brings the other piece along.
        later = music.after if job.kind == "lead" else Notes.empty()
        across = rows_of(sounding_across(music.before, self.begin))
        self.given = across + rows_of(later)
        self.voice = self._voices_of(across) if job.kind == "lead" else None  # of what is given
        resume = {"replace": self.end, "insert": self.begin}.get(job.kind)
        self.fields = fields | {
            "parent": job.take,
            "begin": self.begin,
            "resume": resume,
            "after": None if resume is None else ms(self.end - resume),
            "pedal": pedal_between(self.session.pedal(job.take), self.begin, resume, self.end),
            "seed": job.seed,
        }

    def write(self, passages: list[Notes], known: list[float] | None) -> None:
        """Write the passages so far, known up to these times; None: they are complete."""
        rows = [self.given + rows_of(passage) for passage in passages]
        ends = list(map(self._end, rows)) if known is None else list(map(ms, known))
        if not self.ids:
            own = [{"rows": each, "end": end, "voice": self._voice(each)} for each, end in zip(rows, ends, strict=True)]
            growing = known is not None
            self.ids = self.session.add_group(self.job.kind, own, self.job.stop, growing=growing, **self.fields)
        else:
            for take, before, now, end in zip(self.ids, self.rows, rows, ends, strict=True):
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
                voice = self._voice(now, same)
                self.session.extend(take, same, now[same:], end, voice=voice, growing=known is not None)
        self.rows, self.growing = rows, known is not None

    def complete(self) -> None:
        """End takes that still grow where they are."""
        if self.ids and self.growing:
            with ExitStack() as writing:  # all of them, even if one raises
                for take, rows in zip(self.ids, self.rows, strict=True):
                    writing.callback(self.session.extend, take, len(rows), [], self._end(rows), growing=False)

    def _voices_of(self, across: list[Row]) -> list[int]:
        """Who played the notes across the beginning of a transition, and those of the piece that it leads to."""
        before = self.session.music(self.job.take)
        known = dict(zip(map(key_of, before.rows), self.session.voices(self.job.take), strict=True))
        return [known.get(key_of(row), 1) for row in across] + self.session.voices(self.job.fields["to"])

    def _voice(self, rows: list[Row], first: int = 0) -> list[int] | None:
        """The voices of own notes from index `first` on: the passage is the model's. None: all by the usual rule."""
        return None if self.voice is None else [*self.voice, *[1] * (len(rows) - len(self.voice))][first:]

    def _end(self, rows: list[Row]) -> float:
        """Where a complete take ends: at the end of its gap, or with the piece that it leads to."""
        return max([self.end, *(row[1] for row in rows)]) if self.job.kind == "lead" else self.end


def candidates(loaded: LoadedModel, best_of: int | None, count: int) -> int | None:
    """How many candidates are ranked to keep `count`; None: no ranking."""
    if best_of is None:
        return candidates_for(count) if loaded.why_no_gaps else None
    return max(best_of, count) if best_of else None
