"""What comes back: whether a model knows a passage again that it has heard some tokens ago.

A probe is a motif of some 128 tokens, music of another piece as a filler, and the same motif again, id by id. Its
*repeat* is predicted better than its *first* time for two reasons: the model remembers it, or any music is easier to
predict after more music. The *control* tells them apart: the same motif after the same filler, but after another motif
of the same length. What remembering gains is the loss of the control less that of the repeat. Beyond the reach of the
memory there is nothing to gain: both are then the same to a model, whatever it has learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.estimates import Estimate, estimate
from dsmr_mlx.evaluation.losses import check_vocabulary, piece_losses
from dsmr_mlx.evaluation.passages import Passages
from dsmr_mlx.model import horizons
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

MOTIF_TOKENS, PROBES = 128, 32
MOST_TOKENS = 1_000_000  # of a distance: all that is between is held in memory
FARTHEST = 8192  # tokens, unless horizons are longer than half of that
MOST_STARTS = 64  # places that are tried for a motif of exactly the length that is wanted


class NoProbe(UserError):
    """A corpus has no music to make probes from, or a model no positions for them. The message says why."""


@dataclass(frozen=True)
class Motif:
    """A passage of a piece: ids `[M]` int64, silent at both ends."""

    piece: Piece
    ids: np.ndarray


@dataclass(frozen=True)
class Probe:
    """Two sequences of ids that end with the same motif, int64 `[T]`; the repeat begins with it too, the control with
    another one. `tokens`: from the beginning of the motif to that of its repeat.
    """

    motif: Motif
    repeat: np.ndarray
    control: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Returned:
    """What returns after `tokens` tokens on average, from beginning to beginning; `wanted` were asked for.

    first, repeat, control: the loss of the motif; gain: control − repeat. layers: those whose memory goes back so far
    at least for a part of the motif; within_reach: whether what they have heard of can, in the whole stack.
    """

    wanted: int
    tokens: float
    first: Estimate
    repeat: Estimate
    control: Estimate
    gain: Estimate
    layers: list[int]
    within_reach: bool


@dataclass(frozen=True)
class MotifProbe:
    """`probes` motifs of `motif_tokens` tokens on average, from so many `works`: errors are over these. reach: see
    `reach_of`.
    """

    probes: int
    works: int
    motif_tokens: float
    segment_length: int
    horizons: list[int]
    reach: int
    distances: list[Returned]

    def to_dict(self) -> dict[str, Any]:
        """JSON values but for NaN, an error of a single probe."""
        return asdict(self)


def motif_probe(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    distances: Sequence[int] | None = None,
    probes: int = PROBES,
    motif_tokens: int = MOTIF_TOKENS,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> MotifProbe:
    """The loss of motifs that return after each of some `distances`, in tokens; None: `default_distances`.

    The same seed, corpus and split give the same probes, and all distances have the same motifs. `progress(done,
    total)` is called with numbers of tokens. Raises `UserError` for a corpus with another vocabulary, fewer than 2
    probes or motifs without a token, and as `checked_distances` and `make_probes` do.
    """
    check_vocabulary(model, corpus)
    for name, value, least in (("probes", probes, 2), ("motif_tokens", motif_tokens, 1)):
        if value < least:
            raise UserError(f"{name} = {value}: expected at least {least}")
    distances = default_distances(model.config, motif_tokens) if distances is None else distances
    distances = checked_distances(model.config, distances, motif_tokens)
    built = make_probes(corpus, split, distances, probes, motif_tokens, seed)
    total = sum(len(p.repeat) + len(p.control) - 2 for made in built for p in made)
    rows, before = [], 0
    for wanted, made in zip(distances, built, strict=True):

        def step(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        sequences = [p.repeat for p in made] + [p.control for p in made]
        losses = piece_losses(model, sequences, batch_size, step)
        before += sum(map(len, losses))
        rows.append(returned(model.config, wanted, made, losses))
    mean = float(np.mean([len(p.motif.ids) for p in built[0]]))
    works, c = len({p.motif.piece.work for p in built[0]}), model.config
    return MotifProbe(probes, works, mean, c.segment_length, list(c.horizons), reach_of(c), rows)


def default_distances(config: ModelConfig, motif_tokens: int = MOTIF_TOKENS) -> list[int]:
    """The length of the motif and its doubles, to twice the reach of the stack, but as far as is worth while and the
    model's learned positions go.
    """
    farthest = min(2 * reach_of(config), max(FARTHEST, 2 * max(config.horizons)))
    farthest = max(farthest, 2 * (config.segment_length + motif_tokens))
    if (learned := farthest_learned(config, motif_tokens)) is not None:
        farthest = min(farthest, learned)
    distances = [motif_tokens]
    while 2 * distances[-1] <= farthest:
        distances.append(2 * distances[-1])
    return distances


def checked_distances(config: ModelConfig, distances: Sequence[int], motif_tokens: int = MOTIF_TOKENS) -> list[int]:
    """Distances, rising, each once. Raises `UserError` for one that is shorter than a motif or longer than
    `MOST_TOKENS`, and `NoProbe` for one that the model has not enough learned positions for.
    """
    distances, most = sorted(set(distances)), farthest_learned(config, motif_tokens)
    if not distances or distances[0] < motif_tokens:
        found = str(distances[0]) if distances else "none"
        raise UserError(f"distances of motifs: {found}, expected at least {motif_tokens}, the tokens of a motif")
    if distances[-1] > MOST_TOKENS:
        raise UserError(f"distances of motifs: {distances[-1]:,}, expected at most {MOST_TOKENS:,}")
    if most is not None and distances[-1] > most:
        raise NoProbe(
            f"distances of motifs: {distances[-1]}, expected at most {most}: the model has learned "
            f"{config.max_positions} positions"
        )
    return distances


def farthest_learned(config: ModelConfig, motif_tokens: int) -> int | None:
    """The longest distance for which learned positions suffice; fillers and motifs may be a little too long."""
    return None if config.max_positions is None else config.max_positions - 2 * motif_tokens


def reach_of(config: ModelConfig) -> int:
    """How many tokens before the current segment can have an influence on the model's predictions."""
    text = ",".join(map(str, config.horizons))
    return horizons.parse(f"custom:{text}", config.n_layers).reach(config.segment_length)[-1]


def make_probes(
    corpus: Corpus,
    split: str,
    distances: Sequence[int],
    probes: int = PROBES,
    motif_tokens: int = MOTIF_TOKENS,
    seed: int = 0,
) -> list[list[Probe]]:
    """For each distance probes with the same motifs, which return after about so many tokens.

    Raises `NoProbe` if the split has no notes, or not two compositions of more tokens than a motif.
    """
    passages = Passages(corpus, corpus.pieces(split))
    motifs = choose_motifs(passages, split, probes, motif_tokens, np.random.default_rng(seed))
    return [[make_probe(passages, motifs, i, distance, seed) for i in range(probes)] for distance in distances]


def make_probe(passages: Passages, motifs: Sequence[Motif], i: int, distance: int, seed: int) -> Probe:
    """Motif i, and the same again after about `distance` tokens; between them music of another composition."""
    motif, rng = motifs[i], np.random.default_rng([seed, i])
    other = choose_other(motif, motifs, rng)
    strange = {motif.piece.work, other.piece.work}
    pieces = [piece for piece in passages.pieces if piece.work not in strange]
    pieces = pieces or [piece for piece in passages.pieces if piece.work != motif.piece.work]
    filler = passages.filler(pieces, distance - len(motif.ids), rng)
    bos = passages.corpus.tokenizer.bos_id
    begin = np.array([] if bos is None else [bos], np.int64)
    repeat, control = (np.concatenate([begin, first.ids, filler, motif.ids]) for first in (motif, other))
    return Probe(motif, repeat, control, len(motif.ids) + len(filler))


def choose_motifs(passages: Passages, split: str, n: int, tokens: int, rng: np.random.Generator) -> list[Motif]:
    """n passages of `tokens` ids, or as near to that as passages come, of as many compositions as there are."""
    path, tokenizer = passages.corpus.path, passages.corpus.tokenizer
    if tokenizer.no_notes is not None:
        raise NoProbe(f"{path}: motifs are made of notes, and the tokenizer {tokenizer.label!r} knows none")
    works: dict[tuple[str, ...], list[Piece]] = {}
    for piece in passages.pieces:
        if piece.length > tokens:
            works.setdefault(piece.work, []).append(piece)
    if len(works) < 2:
        raise NoProbe(
            f"{path}: a motif and what is heard before it returns are of different compositions; of those of more than "
            f"{tokens} tokens split {split!r} has {len(works)}, expected at least 2"
        )
    order = [list(works.values())[i] for i in rng.permutation(len(works))]
    motifs = []
    for i in range(n):
        pieces = order[i % len(order)]
        piece = pieces[rng.integers(len(pieces))]
        music, found = passages.of(piece), []
        if not music.moments:
            raise NoProbe(f"{path}: the tokens of {piece.source} mean no notes, expected {piece.notes:,}")
        while len(found) < MOST_STARTS and (not found or len(found[-1]) != tokens):
            found.append(music.passage(int(rng.integers(music.moments)), tokens)[0])
        motifs.append(Motif(piece, min(found, key=lambda ids: abs(len(ids) - tokens))))
    return motifs


def choose_other(motif: Motif, motifs: Sequence[Motif], rng: np.random.Generator) -> Motif:
    """A motif of another composition, if possible of the same length: what follows is then at the same place."""
    others = [other for other in motifs if other.piece.work != motif.piece.work]
    differences = np.array([abs(len(other.ids) - len(motif.ids)) for other in others])
    return others[rng.choice(np.flatnonzero(differences == differences.min()))]


def returned(config: ModelConfig, wanted: int, probes: Sequence[Probe], losses: Sequence[np.ndarray]) -> Returned:
    """What the losses of all repeats, and then of all controls, say of a distance."""
    counts = np.array([len(p.motif.ids) for p in probes])
    firsts, repeats, controls = np.zeros((3, len(probes)))
    for i, (probe, n) in enumerate(zip(probes, counts, strict=True)):
        begin = len(probe.repeat) - n - probe.tokens  # 1 after a BOS; without one the first id is not predicted
        first = losses[i][max(begin - 1, 0) : begin - 1 + n]
        firsts[i] = first.sum(dtype=np.float64) * n / len(first)
        repeats[i] = losses[i][-n:].sum(dtype=np.float64)
        controls[i] = losses[len(probes) + i][-n:].sum(dtype=np.float64)
    S = config.segment_length
    tokens = float(np.mean([p.tokens for p in probes]))
    works = [p.motif.piece.work for p in probes]
    of_work = np.array([[own == each for own in works] for each in sorted(set(works))])  # (W, P) bool
    first, repeat, control, gain = (
        estimate(of_work @ sums, of_work @ counts) for sums in (firsts, repeats, controls, controls - repeats)
    )
    return Returned(
        wanted,
        tokens,
        first,
        repeat,
        control,
        gain,
        layers=[layer for layer, horizon in enumerate(config.horizons) if tokens < horizon + S],
        within_reach=tokens < reach_of(config) + S,
    )
