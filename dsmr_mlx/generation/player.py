"""A player: lanes of music that read what they are given and play on, for ever, in constant memory.

Everything that a player knows of the music has a fixed size: the recurrent state, the logits of the next token, what
has been heard (keys down, velocity, processors' states), and the last one or two segments token by token, to go back.
Reading, playing, going back, branching and saving can be mixed freely.

There is one clock, in ticks: it begins with the piece, runs through all that is read and played, and goes back with the
music. New music begins where the first reading ends, the prompt; see `grammar.Played`.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import count, pairwise
from typing import Self

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import Bounds, GrammarWalk, Limits
from dsmr_mlx.generation.history import Past
from dsmr_mlx.generation.next_token import NO_TOKEN, Choice, Heard, Source
from dsmr_mlx.generation.sampling import Processor, Sampling, lane_keys
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment


class Player:
    """n lanes of music. They are one, in memory and in time, until they play.

    sampling, processors: how tokens are drawn and steered, see `dsmr_mlx.generation.sampling`; seed: the same calls with the same
    seed give the same music, lane by lane. compile: the steps, as one graph each. ahead: a step is begun before the
    one that draws its token is done, which hides the host's work; but what a step in flight still reads cannot be
    written in place, so that it may take the memory of a second state. Both None: on a GPU. Raises `UserError` for what
    does not fit together.
    """

    def __init__(
        self,
        model: DSMR,
        tokenizer: Tokenizer,
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        processors: Sequence[Processor | Callable] = (),
        seed: int = 0,
        compile: bool | None = None,
        ahead: bool | None = None,
    ):
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(f"tokenizer: {tokenizer.vocab_size} tokens, the model has {model.config.vocab_size}")
        if n < 1:
            raise UserError(f"n = {n}: expected at least 1")
        gpu = mx.default_device().type == mx.DeviceType.gpu
        compiled = gpu if compile is None else compile
        self.ahead = gpu if ahead is None else ahead
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.processors = sampling or Sampling(), list(processors)
        self.walk = GrammarWalk(tokenizer)
        self.choice = Choice(self.walk, self.sampling, self.processors, compiled)
        self.keys = lane_keys(seed, n)  # (n, 2)
        self.asked: tuple[int, ...] | None = None  # see `save`
        self._step = Compiled(model.step, compiled, inputs=[model], lazy=True)
        self._moves = 0  # how often the player has been moved by anything but playing
        self._begin()

    def _begin(self) -> None:
        """Be one lane that has heard nothing."""
        self.state = self.model.new_state(1, rewindable=True)
        self.logits: mx.array | None = None  # (1, V) or (n, V), None before the first token and after the last position
        self.heard = self.choice.begin(np.empty(0, np.int64))
        self.past = Past([(0, self.heard)])
        self._segment = (-1, None)

    @property
    def lanes(self) -> int:
        """n."""
        return len(self.keys)

    @property
    def position(self) -> int:
        """Tokens that have been read and played."""
        return self.past.clock

    @property
    def held(self) -> list[list[int]]:
        """The keys that are held in each lane, MIDI pitches from the lowest; none that are told with their lengths."""
        return [np.flatnonzero(moment.sounding).tolist() for moment in self.moments]

    @property
    def moments(self) -> list[Moment]:
        """Where the music is in each lane, see `event_grammar.Moment`."""
        return self._of_each_lane(self.walk.moments(self.heard.played))

    @property
    def ticks(self) -> tuple[int, ...]:
        """What the clock shows in each lane."""
        return tuple(self._of_each_lane(self.heard.played.ticks.tolist()))

    @property
    def ended(self) -> list[bool]:
        """Which lanes have come to an end; music that is read wakes them up."""
        return self._of_each_lane(self.walk.has_ended[self.heard.played.state].tolist())

    def _of_each_lane(self, values: list) -> list:
        """n values, from n or, while all lanes are one, from one."""
        return values if len(values) == self.lanes else values * self.lanes

    @property
    def recent(self) -> list[list[int]]:
        """The last ids that each lane has heard, as many as the player remembers: those of one or two segments."""
        lanes = [np.broadcast_to(np.array(token), self.lanes) for token in self.past.tokens]
        return np.stack(lanes, axis=1).tolist() if lanes else [[]] * self.lanes

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent state with what it takes to go back: constant once the lanes have begun to play."""
        return self.state.nbytes

    @property
    def rewindable(self) -> int:
        """How many tokens `rewind` can take back: at least the S of a segment before the farthest point reached, or
        all there are.
        """
        earliest = self.state.earliest
        return self.past.clock - earliest - (earliest > 0)

    def read(self, ids: np.ndarray | Notes, progress: Callable[[int, int], None] | None = None) -> None:
        """All lanes read `ids` `[T]`, segment by segment, in the memory of one segment.

        At first it is the prompt as the tokenizer would have it, BOS before it, and nothing is a prompt too; later PAD,
        BOS and EOS are left out, and music goes on where it had ended. `progress(done, total)` is told of each segment.
        Raises `UserError` for what are no ids, for music that cannot go on, and at the end of learned positions; after
        an interruption what has been read so far is heard.
        """
        ids = self._readable(ids)
        if not len(ids):
            return
        table = self.model.config.max_positions
        if table is not None and self.past.clock + len(ids) > table:
            raise UserError(f"prompt: {self.past.clock + len(ids)} tokens, the model has {table} learned positions")
        begun, done = self.state.clock, 0
        self.walk.check_open(self.walk.read(self.heard.played, ids), ids)
        try:
            while done < len(ids):
                n = min(self.state.segment_room, len(ids) - done)
                chunk = mx.broadcast_to(mx.array(ids[None, done : done + n]), (self.state.batch_size, n))
                hidden, state = self.model.advance(chunk, self.state)
                self.state, self.logits = state, self.model.logits(hidden[:, -1])  # both or none, if interrupted
                mx.eval(self.logits, self.state.arrays)
                done += n
                if progress:
                    progress(done, len(ids))
        finally:
            self._remember(ids[: self.state.clock - begun])

    def play(self, limits: Limits | None = None) -> Iterator[np.ndarray]:
        """Yield the next token of each lane, int64 `[n]`, until the limits, counted from here, have ended every lane;
        without limits until the model ends, for it may, and else for ever. After a lane's EOS comes PAD.

        The next token is under way while the caller looks at one, and still the player is always exactly after the last
        one that was given: the iterator can be left at any time, and a player that has read, gone back or been played
        otherwise in between goes on from there. Where learned positions end so does the stream. Raises `UserError` for
        limits that cannot be, and while it runs when a prediction is NaN.
        """
        limits = limits or Limits(may_end=self.tokenizer.eos_id is not None)
        self.walk.check(limits)
        if self.past.clock == 0:
            self.read(np.empty(0, np.int64))
        self._part()
        most = limits.tokens if self.tokenizer.eos_id is None else math.inf
        return self._tokens(self.walk.bounds(self.within_positions(limits), self.heard.played), most)

    def within_positions(self, limits: Limits) -> Limits:
        """The limits from here on, with the room that learned positions leave."""
        table = self.model.config.max_positions
        return limits if table is None else replace(limits, room=table - self.past.clock + 1)  # the last is not read

    def _tokens(self, bounds: Bounds, most: float) -> Iterator[np.ndarray]:
        place, ended, following = None, None, None
        for done in count():
            if place != self._place:
                following, ended = None, np.array(self.ended)
            if ended.all() or done >= most or self.logits is None:
                return
            token, heard = following or self._draw(bounds)
            self._feed(token, heard)
            place = self._place
            following = self._draw(bounds) if self.logits is not None and done + 1 < most else None
            if not self.ahead:
                mx.eval(token)
            mx.async_eval(*[tree for tree in (following, self.logits, self.state.arrays) if tree is not None])
            given = np.array(token, np.int64)
            if (given == NO_TOKEN).any():
                raise UserError("model: its prediction is not a number, expected finite weights and activations")
            for end in self.walk.ending:
                ended |= given == end
            yield given

    @property
    def _place(self) -> tuple[int, int]:
        """What differs wherever something else has been heard."""
        return self.past.clock, self._moves

    def rewind(self, k: int) -> None:
        """Take the last k tokens back, as if they had never been read or played; what comes then is the same again.

        Exact to the last bit where the tokens were played; to rounding where they were read, in larger chunks, and
        where rotary positions were re-based since. Raises `UserError` for more than `rewindable`.
        """
        if not 0 <= k <= self.rewindable:
            raise UserError(f"rewind({k}): expected at most {self.rewindable} tokens, what the player still remembers")
        target = self.past.clock - k
        if k == 0:
            return
        self._moves += 1
        if target == 0:
            self._begin()
            return
        self.heard = self.past.heard_at(target - 1, self.choice)
        # The logits were not kept: the token before is fed once more, and writes what its slot held already.
        self.state = self.state.rewound(self.state.clock - (target - 1))
        token, source = self.past.pop_after(target - 1)
        heard = self.choice.follow(self.heard, token, source)
        self._feed(mx.broadcast_to(token, (self.state.batch_size,)), heard, source)
        mx.eval(self.logits, self.state.arrays, self.heard)

    def branch(self, n: int, seed: int = 0, lane: int = 0) -> "Player":
        """A player of n lanes, each at the point where that `lane` is, with random keys of their own.

        They depend on the lane's key, the position and the seed. This player is not changed. Raises `UserError` for a
        lane that is not there.
        """
        if n < 1:
            raise UserError(f"n = {n}: expected at least 1")
        if not 0 <= lane < self.lanes:
            raise UserError(f"lane = {lane}: expected 0 to {self.lanes - 1}")
        if seed < 0:
            raise UserError(f"seed = {seed}: expected 0 or more")
        child, one = copy(self), [min(lane, self.state.batch_size - 1)]
        entropy = [*np.array(self.keys)[lane].tolist(), self.past.clock, seed]
        child.keys = mx.array(np.stack([np.random.SeedSequence([*entropy, i]).generate_state(2) for i in range(n)]))
        child.state, child.heard, child.past = self.state.take(one), self.heard.take(one), self.past.of_lane(*one, 1)
        child.logits = None if self.logits is None else mx.take(self.logits, mx.array(one), axis=0)
        child.asked = self.asked and tuple(self.asked[min(lane, len(self.asked) - 1)] for _ in range(n))
        child._segment = (-1, None)
        return child

    def save(self, path: str | os.PathLike, asked: Sequence[int] | None = None) -> None:
        """Write everything that the music depends on into one safetensors file, atomically; its size is always the
        same. `load` gives a player that goes on as this one would, to the byte.

        asked: what the clock shows in each lane at the moment for which a pause was asked. Music stops behind it, at
        the end of a token, and a loaded player's `play(Limits(ticks, since=player.asked))` counts from there. Raises
        `UserError` for processors that cannot be stored, and if the file cannot be written.
        """
        from dsmr_mlx.generation.player_file import save_player

        save_player(self, path, asked)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: DSMR,
        tokenizer: Tokenizer,
        *,
        processors: Sequence[Processor | Callable] | None = None,
        compile: bool | None = None,
        ahead: bool | None = None,
    ) -> Self:
        """The player that was saved in a file. `processors`: those of its processors that the file cannot describe.

        Raises `UserError` that names the file, for what is no saved player, and for one of another model or vocabulary.
        """
        from dsmr_mlx.generation.player_file import load_player

        return load_player(cls, path, model, tokenizer, processors, {"compile": compile, "ahead": ahead})

    def _part(self) -> None:
        """Make n lanes of what has been one."""
        if self.state.batch_size == self.lanes:
            return
        same, self._segment = [0] * self.lanes, (-1, None)
        self.state, self.heard = self.state.take(same), self.heard.take(same)
        self.past = self.past.of_lane(0, self.lanes)
        if self.logits is not None:
            self.logits = mx.take(self.logits, mx.array(same), axis=0)

    def _draw(self, bounds: Bounds) -> tuple[mx.array, Heard]:
        """The next token of each lane, and what is heard with it; changes nothing."""
        time = mx.array(self.past.clock % 2**32, mx.uint32)
        return self.choice(self.logits, self.heard, self.keys, time, bounds)

    def _feed(self, token: mx.array, heard: Heard, source: Source = Source.DRAWN) -> None:
        """Go one token `[B]` further, without waiting for it; at the end of learned positions without reading it."""
        state, logits = self.state, None
        if state.has_room:
            if state.is_full:
                self.past.mark(self.heard)
                state = state.opened()
            begins = state.clock - state.filled
            if self._segment[0] != begins:
                self._segment = (begins, state.segment())
            slot = mx.array(state.filled, mx.int32)
            logits, layers = self._step(token, state.layers, slot, self._segment[1])
            state = state.advanced(layers, 1)
        self.state, self.logits, self.heard = state, logits, heard
        self.past.add(token, source)

    def _readable(self, ids: np.ndarray | Notes) -> np.ndarray:
        """What the model reads of `ids`: int64 `[T]`."""
        if self.past.clock == 0:
            return prompt_ids(self.tokenizer, ids)
        ids = checked_ids(self.tokenizer, ids)
        return ids[~np.isin(ids, self.walk.specials)].astype(np.int64)

    def _heard_after(self, ids: np.ndarray, counts: Sequence[int]) -> list[Heard]:
        """What is heard after the first so many, rising, of the ids that have just been read."""
        if self.past.clock == 0:
            return [self.choice.begin(ids[:n]) for n in counts]
        found = [self.heard]
        for start, end in pairwise([0, *counts]):
            found.append(self.choice.read(found[-1], ids[start:end]))
        return found[1:]

    def _remember(self, ids: np.ndarray) -> None:
        """Take note of the ids that the model has just read."""
        self._moves += 1
        begun, end = self.past.clock, self.state.clock
        start = end - self.state.filled
        starts = [s for s in (start - self.model.config.segment_length, start) if s > begun or s == begun > 0]
        *marks, heard = self._heard_after(ids, [*(s - begun for s in starts), len(ids)])
        known = [mark for mark in self.past.marks if mark[0] not in starts]
        marks = [*known, *zip(starts, marks, strict=True)][-2:]
        first = marks[0][0]
        new = [mx.array([token]) for token in ids[max(first - begun, 0) :].tolist()]
        sources = [Source.READ if begun else Source.PROMPT] * len(new)
        old = max(first - self.past.marks[0][0], 0)
        self.past = Past(marks, end, self.past.tokens[old:] + new, self.past.sources[old:] + sources)
        self.heard = heard


def prompt_ids(tokenizer: Tokenizer, prompt: np.ndarray | Notes | None) -> np.ndarray:
    """What the model reads of a prompt, see `Tokenizer.prompt`: int64 `[T]`, T ≥ 1."""
    return tokenizer.prompt(checked_ids(tokenizer, [] if prompt is None else prompt))


def checked_ids(tokenizer: Tokenizer, ids: np.ndarray | Notes) -> np.ndarray:
    """Ids or notes as ids `[T]`. Raises `UserError` for what are none in this vocabulary."""
    ids = np.ravel(tokenizer.encode_notes(ids) if isinstance(ids, Notes) else ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"prompt: an array of {ids.dtype}, expected Notes or integer ids")
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise UserError(f"prompt: ids from {ids.min()} to {ids.max()}, expected 0 to {tokenizer.vocab_size - 1}")
    return ids
