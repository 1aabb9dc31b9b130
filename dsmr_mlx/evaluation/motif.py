"""Repeated motifs: whether a model predicts a passage better because it has read the same ids some tokens ago.

A probe is a motif of about 128 tokens, filler music of another piece, and the same ids of the motif again. The *repeat*
is predicted better than the *first* occurrence for two reasons: the model remembers it, or any music is easier to
predict after more music. The *control* separates the two: the same motif and filler, preceded by another motif of the
same length. The gain from memory is the loss of the control minus that of the repeat. Beyond the reach of the memory
the gain is 0, because both sequences are then the same to the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.estimates import Estimate, Result, estimate
from dsmr_mlx.evaluation.losses import Progress, check_vocabulary, last_losses, piece_losses
from dsmr_mlx.evaluation.passages import Passages
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import model_reach

MOTIF_TOKENS, PROBES = 128, 32
MAX_DISTANCE = 1_000_000  # tokens: a probe is held in memory
DEFAULT_MAX_DISTANCE = 8192  # tokens, unless a horizon is longer than half of it
MAX_STARTS = 64  # tried for a motif of exactly the given length


class NoProbe(UserError):
    """Raised if a corpus has too little music for probes, or a model too few positions."""


@dataclass(frozen=True)
class Motif:
    """A passage of a piece: ids `(M,)` int64; no note sounds across its ends."""

    piece: Piece
    ids: np.ndarray


@dataclass(frozen=True)
class Probe:
    """Two sequences of ids `(T,)` int64 that end with the same motif.

    The repeat also begins with it, the control begins with another motif. tokens: from the start of the motif to the
    start of its repeat.
    """

    motif: Motif
    repeat: np.ndarray
    control: np.ndarray
    tokens: int


@dataclass(frozen=True)
class DistanceResult:
    """Losses of motifs repeated after `tokens` tokens on average, from start to start; `wanted` were requested.

    first, repeat, control: the loss of the motif; gain: control − repeat. layers: those whose own memory still holds a
    part of the motif at its repeat; within_reach: whether the whole stack can carry information that far.
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
class MotifProbe(Result):
    """Results for `probes` motifs of `motif_tokens` tokens on average, at several distances.

    works: number of compositions that the motifs are from, over which errors are computed; reach: see `model_reach`.
    """

    probes: int
    works: int
    motif_tokens: float
    segment_length: int
    horizons: list[int]
    reach: int
    distances: list[DistanceResult]


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
    progress: Progress | None = None,
) -> MotifProbe:
    """Return the loss of motifs that are repeated after each of `distances` tokens; None: `default_distances`.

    The same seed, corpus and split give the same probes; all distances use the same motifs. `progress(done, total)`
    counts sequences. Raises `UserError` if the vocabulary differs from the model's, for fewer than 2 probes or motifs
    without tokens, and as `check_distances` and `make_probes` do.
    """
    check_vocabulary(model, corpus)
    for name, value, minimum in (("probes", probes, 2), ("motif_tokens", motif_tokens, 1)):
        if value < minimum:
            raise UserError(f"`{name}` {value}: expected at least {minimum}")
    distances = default_distances(model.config, motif_tokens) if distances is None else distances
    distances = check_distances(model.config, distances, motif_tokens)
    built = make_probes(corpus, split, distances, probes, motif_tokens, seed)
    begin = len(built[0][0].repeat) - len(built[0][0].motif.ids) - built[0][0].tokens  # of the motif: 1 after a BOS
    beginnings = [p.repeat[: begin + len(p.motif.ids)] for p in built[0]]  # the same at all distances
    firsts = [nats[max(begin - 1, 0) :] for nats in piece_losses(model, beginnings, batch_size)]
    rows, done, total = [], 0, 2 * len(built) * probes
    for wanted, made in zip(distances, built, strict=True):
        sequences = [p.repeat for p in made] + [p.control for p in made]
        counts = [len(p.motif.ids) for p in made] * 2
        if wanted < model_reach(model.config):  # all of it is needed, and several lanes at once are faster
            losses = piece_losses(model, sequences, batch_size)
            losses = [nats[-n:] for nats, n in zip(losses, counts, strict=True)]
        else:
            losses = [last_losses(model, ids, n) for ids, n in zip(sequences, counts, strict=True)]
        done += len(sequences)
        if progress:
            progress(done, total)
        rows.append(distance_result(model.config, wanted, made, firsts, losses[:probes], losses[probes:]))
    mean = float(np.mean([len(p.motif.ids) for p in built[0]]))
    works, c = len({p.motif.piece.work for p in built[0]}), model.config
    return MotifProbe(probes, works, mean, c.segment_length, list(c.horizons), model_reach(c), rows)


def default_distances(config: ModelConfig, motif_tokens: int = MOTIF_TOKENS) -> list[int]:
    """Return `motif_tokens` and its doubles up to twice the reach of the stack.

    They are at most `DEFAULT_MAX_DISTANCE` or twice the longest horizon, and within the model's learned positions.
    """
    longest = min(2 * model_reach(config), max(DEFAULT_MAX_DISTANCE, 2 * max(config.horizons)))
    longest = max(longest, 2 * (config.segment_length + motif_tokens))
    if (learned := max_learned_distance(config, motif_tokens)) is not None:
        longest = min(longest, learned)
    distances = [motif_tokens]
    while 2 * distances[-1] <= longest:
        distances.append(2 * distances[-1])
    return distances


def check_distances(config: ModelConfig, distances: Sequence[int], motif_tokens: int = MOTIF_TOKENS) -> list[int]:
    """Return the distances in ascending order without duplicates.

    Raises `UserError` for one that is shorter than a motif or longer than `MAX_DISTANCE`, and `NoProbe` if the model
    has too few learned positions.
    """
    distances, limit = sorted(set(distances)), max_learned_distance(config, motif_tokens)
    if not distances or distances[0] < motif_tokens:
        found = str(distances[0]) if distances else "none"
        raise UserError(f"`distances` {found}: expected at least {motif_tokens}, the tokens of a motif")
    if distances[-1] > MAX_DISTANCE:
        raise UserError(f"`distances` {distances[-1]:,}: expected at most {MAX_DISTANCE:,}")
    if limit is not None and distances[-1] > limit:
        raise NoProbe(
            f"motifs at distance {distances[-1]}: expected at most {limit}, "
            f"the model has {config.max_positions} learned positions"
        )
    return distances


def max_learned_distance(config: ModelConfig, motif_tokens: int) -> int | None:
    """Return the longest distance within the learned positions, less a margin of one motif; None if there are none."""
    return None if config.max_positions is None else config.max_positions - 2 * motif_tokens


def make_probes(
    corpus: Corpus,
    split: str,
    distances: Sequence[int],
    probes: int = PROBES,
    motif_tokens: int = MOTIF_TOKENS,
    seed: int = 0,
) -> list[list[Probe]]:
    """Return for each distance a list of probes; all distances use the same motifs.

    Raises `NoProbe` if the split has no notes, or fewer than two compositions with more tokens than a motif.
    """
    passages = Passages(corpus, corpus.pieces(split))
    motifs = choose_motifs(passages, split, probes, motif_tokens, np.random.default_rng(seed))
    return [[make_probe(passages, motifs, i, distance, seed) for i in range(probes)] for distance in distances]


def make_probe(passages: Passages, motifs: Sequence[Motif], i: int, distance: int, seed: int) -> Probe:
    """Make the probe of motif i, repeated after about `distance` tokens of other compositions."""
    motif, rng = motifs[i], np.random.default_rng([seed, i])
    other = choose_other(motif, motifs, rng)
    excluded = {motif.piece.work, other.piece.work}
    pieces = [piece for piece in passages.pieces if piece.work not in excluded]
    pieces = pieces or [piece for piece in passages.pieces if piece.work != motif.piece.work]
    filler = passages.filler(pieces, distance - len(motif.ids), rng)
    bos = passages.corpus.tokenizer.bos_id
    begin = np.array([] if bos is None else [bos], np.int64)
    repeat, control = (np.concatenate([begin, first.ids, filler, motif.ids]) for first in (motif, other))
    return Probe(motif, repeat, control, len(motif.ids) + len(filler))


def choose_motifs(passages: Passages, split: str, n: int, tokens: int, rng: np.random.Generator) -> list[Motif]:
    """Choose n passages of `tokens` ids, or as close to that as possible, spread evenly over the compositions."""
    path, tokenizer = passages.corpus.path, passages.corpus.tokenizer
    if not tokenizer.decodes:
        raise NoProbe(f"{path}: motifs need notes, and tokenizer {tokenizer.label!r} cannot decode any")
    works: dict[tuple[str, ...], list[Piece]] = {}
    for piece in passages.pieces:
        if piece.length > tokens:
            works.setdefault(piece.work, []).append(piece)
    if len(works) < 2:
        raise NoProbe(
            f"{path}: compositions of more than {tokens} tokens in split {split!r}: {len(works)}, expected at least 2, "
            "one for the motif and one for the filler"
        )
    order = [list(works.values())[i] for i in rng.permutation(len(works))]
    motifs = []
    for i in range(n):
        pieces = order[i % len(order)]
        piece = pieces[rng.integers(len(pieces))]
        music, found = passages.decoded(piece), []
        if not music.n_starts:
            raise NoProbe(f"{path}: the tokens of {piece.source} decode to no notes, expected {piece.notes:,}")
        while len(found) < MAX_STARTS and (not found or len(found[-1]) != tokens):
            found.append(music.passage(int(rng.integers(music.n_starts)), tokens)[0])
        motifs.append(Motif(piece, min(found, key=lambda ids: abs(len(ids) - tokens))))
    return motifs


def choose_other(motif: Motif, motifs: Sequence[Motif], rng: np.random.Generator) -> Motif:
    """Choose a motif of another composition with the closest length, so that the filler starts at the same position."""
    others = [other for other in motifs if other.piece.work != motif.piece.work]
    differences = np.array([abs(len(other.ids) - len(motif.ids)) for other in others])
    return others[rng.choice(np.flatnonzero(differences == differences.min()))]


def distance_result(
    config: ModelConfig,
    wanted: int,
    probes: Sequence[Probe],
    firsts: Sequence[np.ndarray],
    repeats: Sequence[np.ndarray],
    controls: Sequence[np.ndarray],
) -> DistanceResult:
    """Summarize one distance, given the losses `(M,)` of each motif's first occurrence, repeat and control.

    Without a BOS, the first id has no loss; the others stand for it.
    """
    counts = np.array([len(p.motif.ids) for p in probes])
    firsts, repeats, controls = (
        counts * np.array([nats.mean(dtype=np.float64) for nats in losses]) for losses in (firsts, repeats, controls)
    )
    S = config.segment_length
    # A repeat is first predicted in the segment at s; a horizon M reaches back to s − M, which must be in the motif.
    needed = 1 + min((len(p.repeat) - len(p.motif.ids) - 1) // S * S - (len(p.repeat) - p.tokens) for p in probes)
    tokens = float(np.mean([p.tokens for p in probes]))
    works = [p.motif.piece.work for p in probes]
    first, repeat, control, gain = (
        estimate(sums, counts, works) for sums in (firsts, repeats, controls, controls - repeats)
    )
    return DistanceResult(
        wanted,
        tokens,
        first,
        repeat,
        control,
        gain,
        layers=[layer for layer, horizon in enumerate(config.horizons) if horizon >= needed],
        within_reach=model_reach(config) >= needed,
    )
