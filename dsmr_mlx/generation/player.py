"""Generate music in n lanes from any prompt, in constant memory.

The state of a player has a fixed size: the recurrent state, the logits of the next token, the decoding state (keys
that are down, velocity, processors' states) and the last one or two segments token by token, to rewind. Reading,
playing, rewinding, branching and saving can be mixed freely.

The path of one token, from logits to MIDI:

    Player.play → _tokens        the loop
    Player._draw                 next_token.NextToken.step, compiled:
        GrammarWalk.allowed        mask ids that may not come next
        Sampler.sample             processors, temperature, filters, random draw
        GrammarWalk.advance        the grammar state after the token; Sampler.advance the same for processors
    Player._feed                 one step of the model: new recurrent state, new logits; `History` keeps the token
    recording.Recording.play     token → events → key presses → the growing MIDI file

The clock counts ticks. It starts with the piece, runs through all that is read and played, and is rewound with the
music. New music starts where the first reading ends, the prompt.
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
from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.gaps import MAX_EXCERPT
from dsmr_mlx.generation import player_check, player_file
from dsmr_mlx.generation.foresight import between_moments, shown_ids, why_no_gaps
from dsmr_mlx.generation.grammar import Bounds, GrammarState, GrammarWalk, Limits
from dsmr_mlx.generation.history import History, Snapshot
from dsmr_mlx.generation.next_token import NO_TOKEN, DecodeState, NextToken, TokenOrigin
from dsmr_mlx.generation.player_check import NO_PAUSE
from dsmr_mlx.generation.prompts import checked_ids, prompt_ids
from dsmr_mlx.generation.sampling import Processor, Sampling, lane_keys
from dsmr_mlx.generation.warm_up import warm_up_reading
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.device import on_gpu
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.prefill import prefill
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment

# Bytes that are copied for each token if it is played ahead. An estimate: at 68 GB/s, an M1's, this takes 0.25 ms,
# which must be less than the host's work on a token, which playing ahead hides.
MAX_AHEAD = 8 << 20


class Player:
    """n lanes of music, computed as one lane until they play: B below is 1 at first, then n.

    sampling, processors: how tokens are drawn and steered, see `dsmr_mlx.generation.sampling`
    seed: the same calls with the same seed give the same music, lane by lane
    compile: compile the steps, one graph each; None: only on a GPU. Also faster on a CPU, after a C++ compiler has run
    ahead: start the next step before the current token reaches the host, which hides the host's work. A state that a
        running step still reads is copied instead of written in place, so this may take the memory of a second state.
        None: on a GPU, if the slots of all lanes have at most `MAX_AHEAD` bytes

    Raises `UserError` if the arguments do not fit together.
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
            raise UserError(
                f"`tokenizer` {tokenizer.label}: {tokenizer.vocab_size} tokens, expected the {model.config.vocab_size} "
                "of the model"
            )
        if n < 1:
            raise UserError(f"`n` {n}: expected at least 1")
        self.compiled = on_gpu() if compile is None else compile
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.processors = sampling or Sampling(), list(processors)
        self.walk = GrammarWalk(tokenizer)
        self.next_token = NextToken(self.walk, self.sampling, self.processors, self.compiled)
        self.keys = lane_keys(seed, n)  # (B, 2)
        self.pause_ticks: tuple[int, ...] | None = None  # of a player that was paused and loaded, see `save`
        self._step = Compiled(model.step, self.compiled, inputs=[model], lazy=True)
        self._edits, self._ahead = 0, ahead  # edits: readings and rewindings
        self._reset()

    def _reset(self) -> None:
        """Become one empty lane."""
        self.state = self.model.new_state(1, rewindable=True)
        self.logits: mx.array | None = None  # (1, V) or (B, V), None before the first token and after the last position
        self.decode_state = self.next_token.begin(np.empty(0, np.int64))
        self.history = History([Snapshot(0, self.decode_state)])
        self._segment = (-1, None)  # where the current segment begins, and its `model.state.Segment`

    @property
    def ahead(self) -> bool:
        """Whether the next step starts before the current token reaches the host."""
        if self._ahead is not None:
            return self._ahead
        slots = sum(array.nbytes for _, array in tree_flatten(self.state.layers)) // self.state.batch_size
        return on_gpu() and self.lanes * slots <= MAX_AHEAD

    @property
    def lanes(self) -> int:
        """The number of lanes, n."""
        return len(self.keys)

    @property
    def position(self) -> int:
        """The number of tokens that have been read and played."""
        return self.history.position

    @property
    def held(self) -> list[list[int]]:
        """The keys that are down in each lane, as rising MIDI pitches; none if the vocabulary gives notes a length."""
        return [np.flatnonzero(moment.sounding).tolist() for moment in self.moments]

    @property
    def moments(self) -> list[Moment]:
        """The current `event_grammar.Moment` of each lane."""
        return self._of_each_lane(self.decode_state.music.moments())

    @property
    def ticks(self) -> tuple[int, ...]:
        """The clock of each lane."""
        return tuple(self._of_each_lane(self.decode_state.music.ticks.tolist()))

    @property
    def ended(self) -> list[bool]:
        """Whether each lane has ended. Reading reopens it."""
        return self._of_each_lane(self.walk.has_ended[self.decode_state.music.state].tolist())

    def _of_each_lane(self, values: list) -> list:
        """n values, given n, or a single one while all lanes are one."""
        return values if len(values) == self.lanes else values * self.lanes

    @property
    def recent(self) -> list[list[int]]:
        """The last ids of each lane: the one or two segments that the player keeps."""
        lanes = [np.broadcast_to(np.array(token), self.lanes) for token in self.history.tokens]
        return np.stack(lanes, axis=1).tolist() if lanes else [[]] * self.lanes

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent state and what rewinding needs: constant once the lanes play."""
        return self.state.nbytes

    @property
    def rewindable(self) -> int:
        """How many tokens `rewind` can take back: all, or at least the S of a segment before the farthest position."""
        earliest = self.state.earliest
        return self.history.position - earliest - (earliest > 0)  # one token is fed again, for its logits

    def play(self, limits: Limits | None = None) -> Iterator[np.ndarray]:
        """Yield the next token of each lane, int64 `(B,)`, until the limits, counted from here, end every lane.

        Without limits the stream ends only if the model ends the piece. After the EOS of a lane comes PAD. The stream
        also ends with the learned positions.

        The player is always just after the last token that was yielded, even if the next one is being computed. The
        iterator can be left at any time; if the player reads, rewinds or plays in between, it goes on from there.
        Raises `UserError` for invalid limits, and while it runs if logits are NaN.
        """
        limits = limits or Limits(may_end=self.tokenizer.eos_id is not None)
        self.walk.check(limits)
        self._split_lanes()
        max_tokens = limits.tokens if self.tokenizer.eos_id is None else math.inf
        return self._tokens(self.bounds(limits, self.decode_state.music), max_tokens)

    def bounds(self, limits: Limits, music: GrammarState) -> Bounds:
        """The limits counted from `music`, within the learned positions that are left."""
        if (table := self.model.config.max_positions) is not None:
            limits = replace(limits, room=table - self.history.position + 1)  # the last token drawn is not read
        return self.walk.bounds(limits, music)

    def _split_lanes(self) -> None:
        """Make n lanes of one."""
        self.read(np.empty(0, np.int64))  # BOS, if nothing was read yet
        if self.state.batch_size == self.lanes:
            return
        same, self._segment = [0] * self.lanes, (-1, None)
        self.state, self.decode_state = self.state.take(same), self.decode_state.take(same)
        self.history = self.history.take(0, self.lanes)
        if self.logits is not None:
            self.logits = mx.take(self.logits, mx.array(same), axis=0)

    def _tokens(self, bounds: Bounds, max_tokens: float) -> Iterator[np.ndarray]:
        version, ended, following, ahead = None, None, None, self.ahead
        for done in count():
            if version != self._version:  # at the start, and if the player was moved since the last token
                self._split_lanes()
                following, ended = None, np.array(self.ended)
            if ended.all() or done >= max_tokens or self.logits is None:
                return
            token, state = following or self._draw(bounds)
            self._feed(token, state)
            version, following = self._version, None
            if not ahead:
                mx.eval(token)
            if self.logits is not None:
                # The network first: on a CPU this returns shortly before its end, and `_draw` works meanwhile.
                mx.async_eval(self.logits, self.state.arrays)
                if done + 1 < max_tokens:
                    following = self._draw(bounds)
                    mx.async_eval(following)
            ids = np.array(token, np.int64)
            if (ids == NO_TOKEN).any():
                raise UserError("`model`: its logits are NaN, expected finite weights and activations")
            ended |= (ids[:, None] == self.walk.ending).any(axis=1)  # `np.isin` takes ten times as long
            yield ids

    @property
    def _version(self) -> tuple[int, int]:
        """Differs whenever the player has moved."""
        return self.history.position, self._edits

    def _draw(self, bounds: Bounds) -> tuple[mx.array, DecodeState]:
        """The next token of each lane and the decoding state after it; changes nothing."""
        position = mx.array(self.history.position % 2**32, mx.uint32)
        return self.next_token.step(self.logits, self.decode_state, self.keys, position, bounds)

    def _feed(self, token: mx.array, after: DecodeState, origin: TokenOrigin = TokenOrigin.DRAWN) -> None:
        """Step the model by one token `(B,)`, lazily. After the last learned position the token is not read."""
        state, logits = self.state, None
        if state.has_room:
            if state.is_full:
                self.history.add_snapshot(self.decode_state)
                state = state.opened()
            begin = state.steps - state.filled
            if self._segment[0] != begin:
                self._segment = (begin, state.segment(self._step.compiled is not None))
            slot = state.filled if self._step.compiled is None else mx.array(state.filled, mx.int32)
            logits, layers = self._step(token, state.layers, slot, self._segment[1])
            state = state.advanced(layers, 1)
        self.state, self.logits, self.decode_state = state, logits, after
        self.history.append(token, origin)

    def read(
        self, ids: np.ndarray | Notes, progress: Callable[[int, int], None] | None = None, *, prompt: bool = False
    ) -> None:
        """Read `ids` `(T,)` in all lanes, segment by segment, in the memory of one segment.

        Layers skip past music that they do not need, see `model.prefill`: the work of the network is bounded for any T,
        with the same result. After other music this takes the memory of a second state.

        The first read is the prompt: BOS is prepended, and it may be empty. Later reads leave out PAD, BOS and EOS, and
        music that had ended goes on. prompt: they belong to the prompt: times of steering and temperature count from
        their end. After what is shown, from FILL to PLAY, the music goes on as before it.
        `progress(done, total)` is called after each segment that is read; skipped tokens count at once.

        Raises `UserError` for invalid ids, for music that nothing may follow, and at the end of learned positions. If
        it is interrupted, the player is after the segments that all layers have read, or where it was.
        """
        ids = self._readable(ids)
        if not len(ids):
            return
        table = self.model.config.max_positions
        if table is not None and self.history.position + len(ids) > table:
            raise UserError(
                f"`prompt`: {self.history.position + len(ids)} tokens, the model has {table} learned positions"
            )
        self.walk.check_open(self.walk.read(self.decode_state.music, ids), ids)
        begin, chunks = self.state.steps, prefill(self.model, ids, self.state)
        if begin == 0:
            self.state = None  # an empty one can be made again: hold its arrays only once
        try:
            for state, hidden in chunks:
                if hidden is not None:
                    self.state, self.logits = state, self.model.logits(hidden[:, -1])  # both or none, if interrupted
                mx.eval(self.logits, state.arrays)
                if progress:
                    progress(state.steps - begin, len(ids))
        finally:
            if self.state is None:
                self._reset()
            self._remember(ids[: self.state.steps - begin], prompt)

    def foresee(self, notes: Notes, gap: float, events: int = MAX_EXCERPT) -> int:
        """Show the model what follows a gap that it is about to fill. Return the number of tokens that this takes.

        notes: what follows, in seconds from the end of the gap. At most `events` of its beginning are shown; without
            notes the model learns that nothing follows
        gap: seconds from the clock to the end of the gap

        The model reads FILL, the length, an excerpt and PLAY, see `data.gaps`. The music goes on as if they were not
        there: clock, keys and processors stay as they are. What is shown can be rewound, branched and saved like
        anything else. Raises `UserError` if the model was not trained with gaps, for an invalid gap, and unless all
        lanes have just pressed or released a key, or have not begun.
        """
        if reason := why_no_gaps(self.model, self.tokenizer):
            raise UserError(f"`model`: {reason}")
        ids = shown_ids(self.tokenizer, notes, gap, events)
        self.read(np.empty(0, np.int64))  # BOS, if nothing was read yet
        for moment in self.moments:
            if not between_moments(self.walk.tables, moment):
                raise UserError("`foresee`: the last token is a pause or part of a note, expected a complete moment")
        self.read(ids)
        return len(ids)

    def _readable(self, ids: np.ndarray | Notes) -> np.ndarray:
        """The ids that the model reads, int64 `(T,)`."""
        if self.history.position == 0:
            return prompt_ids(self.tokenizer, ids)
        ids = checked_ids(self.tokenizer, ids)
        return ids[~np.isin(ids, self.walk.specials) | self.tokenizer.shown_mask(ids)].astype(np.int64)

    def _remember(self, ids: np.ndarray, prompt: bool) -> None:
        """Update the decoding state and the history after the model has read `ids` `(T,)`."""
        self._edits, self._segment = self._edits + 1, (-1, None)
        begin, segment = self.history.position, self.state.steps - self.state.filled
        # Of the last two segments, those that begin among the ids. Position 0 already has a snapshot.
        starts = [s for s in (segment - self.model.config.segment_length, segment) if s >= max(begin, 1)]
        origin = TokenOrigin.READ if begin and not prompt else TokenOrigin.PROMPT
        *states, self.decode_state = self._states_after(ids, [*(s - begin for s in starts), len(ids)], origin)
        origins = [TokenOrigin.SHOWN if shown else origin for shown in self.tokenizer.shown_mask(ids).tolist()]
        self.history.extend(ids, origins, [Snapshot(*pair) for pair in zip(starts, states, strict=True)])

    def _states_after(self, ids: np.ndarray, counts: Sequence[int], origin: TokenOrigin) -> list[DecodeState]:
        """The decoding state after the first n of `ids` `(T,)`, for each n of `counts`, which rise."""
        if self.history.position == 0:
            return [self.next_token.begin(ids[:n]) for n in counts]
        states, music = [self.decode_state], ~self.tokenizer.shown_mask(ids)
        for start, end in pairwise([0, *counts]):
            states.append(self.next_token.read(states[-1], ids[start:end][music[start:end]], origin))
        return states[1:]

    def rewind(self, k: int) -> None:
        """Undo the last k tokens; generation then continues with the same random draws.

        Bitwise on a CPU for tokens that were played; to rounding for tokens that were read, in larger chunks, and if
        rotary positions were re-based since. Raises `UserError` for more than `rewindable`.
        """
        if not 0 <= k <= self.rewindable:
            raise UserError(f"`k` {k}: expected 0 to {self.rewindable}, the tokens that the player keeps")
        target = self.history.position - k
        if k == 0:
            return
        self._edits, self._segment = self._edits + 1, (-1, None)
        if target == 0:
            self._reset()
            return
        # The logits were not kept: go back one token further and feed that one again. Its slot already holds it.
        self.decode_state = self.history.state_at(target - 1, self.next_token)
        self.state = self.state.rewound(self.state.steps - (target - 1))
        token, origin = self.history.truncate(target - 1)
        after = self.next_token.follow(self.decode_state, token, origin)
        self._feed(mx.broadcast_to(token, (self.state.batch_size,)), after, origin)
        mx.eval(self.logits, self.state.arrays, self.decode_state)

    def warm_up(self) -> None:
        """Compile what a session needs: read, play a few tokens and rewind. An empty player reads BOS."""
        self.read(np.empty(0, np.int64))
        warm_up_reading(self.model, self.state)
        steps = self.play()
        n = sum(1 for _ in zip(range(4), steps, strict=False))
        steps.close()
        self.rewind(n)

    def branch(self, n: int, seed: int = 0, lane: int = 0) -> "Player":
        """Return a player of n lanes that all continue this `lane`, with new random keys.

        The keys depend on the lane's key, the position and the seed. This player is not changed. Raises `UserError`
        for an invalid n, seed or lane.
        """
        if n < 1:
            raise UserError(f"`n` {n}: expected at least 1")
        if not 0 <= lane < self.lanes:
            raise UserError(f"`lane` {lane}: expected 0 to {self.lanes - 1}")
        if seed < 0:
            raise UserError(f"`seed` {seed}: expected 0 or more")
        child, row = copy(self), min(lane, self.state.batch_size - 1)  # row 0 while all lanes are one
        entropy = [*np.array(self.keys)[lane].tolist(), self.history.position, seed]
        child.keys = mx.array(np.stack([np.random.SeedSequence([*entropy, i]).generate_state(2) for i in range(n)]))
        child.state, child.decode_state = self.state.take([row]), self.decode_state.take([row])
        child.history = self.history.take(row, 1)
        child.logits = None if self.logits is None else self.logits[row : row + 1]
        child.pause_ticks = self.pause_ticks and (self.pause_ticks[lane],) * n
        child._segment = (-1, None)
        return child

    def copy(self) -> "Player":
        """Return an independent player that goes on in the same way, with the same random keys."""
        child = copy(self)
        child.history, child._segment = self.history.copy(), (-1, None)
        return child

    def steered(
        self,
        ids: Sequence[np.ndarray],
        *,
        sampling: Sampling | None = None,
        processors: Sequence[Processor | Callable] = (),
    ) -> "Player":
        """Return an independent player that goes on from here with other sampling and processors.

        It equals a new player with these options and the same random keys that has read the same music as its prompt:
        times of steering and temperature count from here.

        ids: all that has been read and played, BOS included, an array `(T,)` for each lane, or one while all lanes are
            one; the player itself remembers only the last of them. Raises `UserError` if they are not what it remembers
        """
        child, lanes = copy(self), [np.asarray(lane, np.int64) for lane in ids]
        if not self.history.ends(lanes):
            raise UserError(f"`ids`: not the {self.history.position} tokens that the player has read and played")
        child.sampling, child.processors = sampling or Sampling(), list(processors)
        child.next_token = NextToken(self.walk, child.sampling, child.processors, self.compiled)
        child.history = self.history.begun_with(lanes, child.next_token)
        child._segment, child.pause_ticks = (-1, None), None
        child.decode_state = DecodeState.joined([child.next_token.begin(lane) for lane in lanes])
        return child

    def restarted(self) -> "Player":
        """Return an independent player with the same random keys that has read nothing."""
        child = copy(self)
        child._reset()
        return child

    def save(self, path: str | os.PathLike, pause_ticks: Sequence[int] | None = None) -> None:
        """Write all that the music depends on into one safetensors file of constant size, atomically.

        `load` returns a player that goes on as this one would, bitwise on a CPU.

        pause_ticks: requested pause time per lane, in ticks. Music stops at the end of the token that passes it; a
        loaded player's `play(Limits(ticks, since=player.pause_ticks))` counts from there. Raises `UserError` if the
        file cannot be written.
        """
        player_file.write(path, self.arrays(pause_ticks), self.model, self.tokenizer, self.sampling, self.processors)

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
        """Read a saved player. processors: all of them, required if some are not built in.

        Raises `UserError` that names the file if it is not a saved player, or one of another model or vocabulary.
        """
        arrays, sampling, stored = player_file.read(path, model, tokenizer, processors)
        player = cls(model, tokenizer, sampling=sampling, processors=stored, compile=compile, ahead=ahead)
        try:
            player.restore(arrays)
        except ValueError as error:
            raise UserError(f"{path}: not a player of this model ({error})") from None
        return player

    def arrays(self, pause_ticks: Sequence[int] | None = None) -> dict[str, mx.array]:
        """All that the music depends on, as arrays whose shapes follow from the model, the lanes and the processors."""
        config, lanes = self.model.config, self.state.batch_size
        blank = mx.zeros((lanes, config.vocab_size))
        arrays = {
            "logits": blank if self.logits is None else self.logits,
            "has_logits": mx.array(self.logits is not None),
            "keys": self.keys,
            "pause_ticks": mx.array(np.full(self.lanes, NO_PAUSE if pause_ticks is None else pause_ticks, np.int64)),
        }
        arrays |= {f"state.{name}": array for name, array in self.state.to_arrays().items()}
        arrays |= {f"now.{place}": leaf for place, leaf in tree_flatten(self.decode_state)}
        # two segments, and one token after the last learned position
        return arrays | self.history.to_arrays(2 * config.segment_length + 1, lanes)

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Restore the state that `arrays` of another player hold in a new player.

        Raises `ValueError` for arrays of another model, vocabulary or other processors, and for values out of range.
        """
        player_check.check_arrays(arrays, self.arrays())
        state = {name.removeprefix("state."): array for name, array in arrays.items() if name.startswith("state.")}
        self.state = RecurrentState.from_arrays(self.model.config, state)
        self.logits = arrays["logits"] if arrays["has_logits"].item() else None
        pause_ticks = tuple(arrays["pause_ticks"].tolist())
        self.keys, self.pause_ticks = arrays["keys"], None if NO_PAUSE in pause_ticks else pause_ticks
        blank = self.decode_state
        restored = [player_file.unflatten(blank, arrays, name) for name in ("now", "first", "last")]
        for each in restored:
            player_check.check_decode_state(each, blank, self.next_token, self.model.config.vocab_size)
        self.decode_state, *states = restored
        player_check.check_pauses(arrays["pause_ticks"], self.decode_state.music.ticks)
        player_check.check_counts(arrays, self.model.config, self.state.steps, self.state.earliest)
        self.history = History.from_arrays(arrays, states)
