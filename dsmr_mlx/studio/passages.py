"""Takes with new music in a gap: a passage replaced, music put in, a transition into another piece."""

from typing import Any

import numpy as np

from dsmr_mlx.generation.filling import Filled, Reader, fill_gaps
from dsmr_mlx.generation.gap_player import Watch, before_gap, ids_of
from dsmr_mlx.music.gapped import GappedMusic, inserted, led, replaced
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio.models import LoadedModel
from dsmr_mlx.studio.settings import chosen, playing_options
from dsmr_mlx.studio.takes import ms, pedal_between, rows_of, sounding_across
from dsmr_mlx.studio.work import Stop, Work

CANDIDATES = 8  # of models that are not shown what follows a gap


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
        self.work, session = work, work.session
        settings = dict(session.settings)
        loaded = work.load(settings["model"])
        loaded.require_clock()
        parent = session.music(self.take)
        music = self._gapped(parent)
        lanes = candidates(loaded, settings["best_of"], self.count)
        options = playing_options(settings, loaded.recommended)
        reader = self._reader(loaded, music, lanes or self.count, options)
        self.stop.check()
        watch = Watch(self._show, self.stop.is_set)
        self._show(0.0, 1.0)
        filled = fill_gaps(
            loaded.model, loaded.tokenizer, music, n=self.count, best_of=lanes, watch=watch, reader=reader
        )
        takes = self._add(loaded, settings, parent, music, filled)
        return takes[0]

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
        """A reader that has read what is before the gap, from the nearest state on."""
        events = before_gap(loaded.tokenizer, music).events
        ids = loaded.tokenizer.prompt(ids_of(loaded.tokenizer, events))

        def progress(done: int, total: int) -> None:
            self.stop.check()
            self.work.show("reading", "reading the music", progress=done / total)

        plain = self.work.states.player_at(loaded, ids, self.work.session.store, progress)
        return Reader(plain.branch(lanes, self.seed).steered([ids], **options), np.asarray(events))

    def _show(self, done: float, total: float) -> None:
        if done < total:
            self.work.show("making", "filling the gap", progress=done / total)
        else:
            self.work.show("ranking", "choosing what fits best", progress=None)

    def _add(
        self, loaded: LoadedModel, settings: dict[str, Any], parent: Notes, music: GappedMusic, filled: list[Filled]
    ) -> list[int]:
        """Add a take for each version: one group, whose notes differ. All or none of them are added."""
        (begin, end), session = music.gaps[0], self.work.session
        begin, end = ms(begin), ms(end)
        resume = {"replace": end, "insert": begin}.get(self.kind)
        # Notes from before the gap keep their ends; a transition brings the other piece along.
        given = sounding_across(music.before, begin)
        later = music.after if self.kind == "lead" else Notes.empty()
        rows = [rows_of(given) + rows_of(version.passages[0].notes) + rows_of(later) for version in filled]
        last = [max([end, *(row[1] for row in each)]) if self.kind == "lead" else end for each in rows]
        return session.add_group(
            self.kind,
            [{"rows": each, "end": ms(stop)} for each, stop in zip(rows, last, strict=True)],
            parent=self.take,
            begin=begin,
            resume=resume,
            after=None if resume is None else ms(end - resume),
            pedal=pedal_between(session.pedal(self.take), begin, resume, end),
            model=loaded.name,
            seed=self.seed,
            settings=chosen(settings),
        )


def candidates(loaded: LoadedModel, best_of: int | None, count: int) -> int | None:
    """How many candidates are ranked to keep `count`; None: no ranking."""
    if best_of is None:
        return max(CANDIDATES, 2 * count) if loaded.why_no_gaps else None
    return max(best_of, count) if best_of else None
