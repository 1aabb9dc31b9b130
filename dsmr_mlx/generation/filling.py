"""Fill the gaps of a piece with new music, from the left; everything outside stays as it is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.gap_player import GapPlayer, Reader, Watch, check_lengths
from dsmr_mlx.generation.generate import Statistics
from dsmr_mlx.generation.joins import JoinScore, rank, score_passage
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Processor, Sampling
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.gapped import GappedMusic, replaced
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Passage:
    """New music in a gap from `start` to `end` seconds: its notes in the time of the piece, the tokens drawn, and its
    score, if candidates were ranked.
    """

    start: float
    end: float
    notes: Notes
    tokens: int
    score: JoinScore | None


@dataclass(frozen=True)
class Filled:
    """A piece whose gaps are filled: all its notes, and the passages from the left. candidate: its number, from 0."""

    notes: Notes
    passages: list[Passage]
    candidate: int = 0

    @property
    def scores(self) -> list[JoinScore]:
        """The scores of all passages."""
        return [passage.score for passage in self.passages if passage.score is not None]


@dataclass
class FillReport(Statistics):
    """Statistics of filling; scores: of each candidate, one for every gap."""

    scores: list[list[JoinScore]] = field(default_factory=list)


def candidates_for(n: int) -> int:
    """Return how many candidates to rank for n versions if the model is not shown what follows a gap."""
    return max(8, 2 * n)


def fill(
    model: DSMR,
    tokenizer: Tokenizer,
    notes: Notes,
    start: float,
    end: float,
    *,
    n: int = 1,
    best_of: int | None = None,
    cut_into_gap: bool = False,
    sampling: Sampling | None = None,
    processors: Sequence[Processor | Callable] = (),
    seed: int = 0,
) -> list[Filled]:
    """Return n versions of a piece with another passage from `start` to `end`, in seconds.

    Notes that begin outside the gap stay unchanged, except by `cut_into_gap`. New notes begin and end in the gap. A
    model that supports gaps is shown what follows; any other only continues the music before the gap, so rank
    candidates with `best_of`.

    notes: the piece. Without notes before the gap the passage is an opening, without notes after it an ending
    best_of: number of candidates, of which the n that join best are kept, best first, see `joins`
    cut_into_gap: end notes that sound into the gap where it begins; otherwise they keep their ends
    sampling, processors: see `dsmr_mlx.generation.sampling`; their times count from the first gap
    seed: the same arguments give the same music; version i depends on the seed and i alone

    Raises `UserError` for invalid arguments, and for a vocabulary whose tokens have no known duration. For other gaps
    use `music.gapped` and `fill_gaps`.
    """
    music = replaced(notes, [(start, end)], cut_into_gap)
    options = {"sampling": sampling, "processors": processors, "seed": seed}
    return fill_gaps(model, tokenizer, music, n=n, best_of=best_of, **options)


def fill_gaps(
    model: DSMR,
    tokenizer: Tokenizer,
    music: GappedMusic,
    *,
    n: int = 1,
    best_of: int | None = None,
    sampling: Sampling | None = None,
    processors: Sequence[Processor | Callable] = (),
    seed: int = 0,
    watch: Watch | None = None,
    reading: Callable[[int, int], None] | None = None,
    report: FillReport | None = None,
    reader: Reader | None = None,
) -> list[Filled]:
    """Return n versions of some music with all its gaps filled; arguments as in `fill`.

    watch: reports progress and may end all passages early; the music after the gaps is kept. If it stops before all
    candidates are scored, the first n are returned. reading: `progress` of `Player.read`, for the music before the
    first gap. report: updated. reader: its player has one lane per candidate, has read none or some of the music before
    the first gap, and determines sampling, processors and seed.
    """
    lanes = n if best_of is None else best_of
    if n < 1 or lanes < n:
        name, value, least = ("n", n, 1) if n < 1 else ("best_of", best_of, n)
        raise UserError(f"`{name}` {value}: expected at least {least}")
    check_lengths(tokenizer, music)
    watch, report = watch or Watch(), report or FillReport()
    watch.total = lanes * sum(end - start for start, end in music.gaps)
    started = time.perf_counter()
    if reader is None:
        reader = Reader(Player(model, tokenizer, n=lanes, sampling=sampling, processors=processors, seed=seed))
    before = reader.read_to(music, reading)
    report.prompt_tokens, report.prefill_seconds = reader.player.position, time.perf_counter() - started
    started = time.perf_counter()
    first = GapPlayer(tokenizer, music, before, watch)
    first.play(reader)
    filled = []
    for i in range(lanes):
        if watch.stop() and len(filled) >= n:
            break
        filled.append(_fill_lane(reader.branch(i), first, i, best_of is not None))
    report.tokens, report.state_bytes = watch.tokens, watch.state_bytes
    report.decode_seconds = time.perf_counter() - started
    if len(filled) < lanes or any(passage.score is None for version in filled for passage in version.passages):
        return filled[:n]
    report.scores = [version.scores for version in filled]
    return [filled[i] for i in rank(report.scores, n)]


def _fill_lane(reader: Reader, gap: GapPlayer, candidate: int, scored: bool) -> Filled:
    """Return the piece with its first gap filled by the passage of a lane, and the other gaps filled one by one.

    reader: one lane, before the first gap; gap: the first gap, filled by lane number `candidate`.
    """
    passages, lane = [], candidate
    while True:
        music = gap.music
        notes = music.fitted(gap.notes(lane))
        scored = scored and not gap.watch.stop()
        score = score_passage(reader.player.copy(), music, gap.before, notes) if scored else None
        passages.append(Passage(*music.gaps[0], notes, len(gap.lanes[lane]), score))
        music = music.filled(notes)
        if not music.gaps or gap.watch.stop():
            empty = music.notes.take(slice(0))
            passages += [Passage(*left, empty, 0, None) for left in music.gaps]
            return Filled(music.notes, passages, candidate)
        gap = GapPlayer(gap.tokenizer, music, reader.read_to(music), gap.watch)
        gap.play(reader)
        lane = 0
