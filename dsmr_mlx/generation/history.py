"""The last one or two segments of a stream, token by token: what it takes to go back in time."""

from dataclasses import dataclass, field

import mlx.core as mx

from dsmr_mlx.generation.next_token import Choice, Heard, Source


@dataclass
class Past:
    """Tokens since the beginning of the segment before the current one, and what was heard when the segments began.

    marks:   one or two of (clock, what was heard then); the first is where `tokens` begin
    clock:   tokens of the whole stream
    tokens:  the last ones, `[1]` or `[n]` each
    sources: where they came from
    """

    marks: list[tuple[int, Heard]]
    clock: int = 0
    tokens: list[mx.array] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def of_lane(self, lane: int, n: int) -> "Past":
        """That of one lane, n times."""
        marks = [(clock, heard.take([lane] * n)) for clock, heard in self.marks]
        tokens = [token if len(token) == 1 else token[lane : lane + 1] for token in self.tokens]
        return Past(marks, self.clock, tokens, list(self.sources))

    def add(self, token: mx.array, source: Source) -> None:
        """One more token `[1]` or `[n]`."""
        self.tokens.append(token)
        self.sources.append(source)
        self.clock += 1

    def mark(self, heard: Heard) -> None:
        """A segment begins; of the ones before the last is kept."""
        known = [mark for mark in self.marks if mark[0] < self.clock]
        self.marks = [*known, (self.clock, heard)][-2:]
        gone = len(self.tokens) - (self.clock - self.marks[0][0])
        del self.tokens[:gone], self.sources[:gone]

    def heard_at(self, clock: int, choice: Choice) -> Heard:
        """What was heard at an earlier clock, not before the first mark: followed again from the mark before it."""
        start, heard = next(mark for mark in reversed(self.marks) if mark[0] <= clock)
        first = self.marks[0][0]
        for i in range(start - first, clock - first):
            heard = choice.follow(heard, self.tokens[i], self.sources[i])
        return heard

    def pop_after(self, clock: int) -> tuple[mx.array, Source]:
        """Forget all from `clock` on, and give the first token that is forgotten and where it came from."""
        kept = clock - self.marks[0][0]
        token, source = self.tokens[kept], self.sources[kept]
        del self.tokens[kept:], self.sources[kept:]
        self.marks = [mark for mark in self.marks if mark[0] <= clock]
        self.clock = clock
        return token, source
