"""The cost side of the schedules: time of training and of decoding, peak memory and recurrent state.

Each schedule has a process of its own, so that its peak memory is its own, and takes turns with that of the first one,
which stays: ratios are of the same moments, and no more than two models are in memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from measuring import Worker, in_turn, random_model, ratios, spread
from schedule_setting import Setting

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.training.config import TrainConfig

Report = Callable[[str], None]


def training(config: TrainConfig, data: str) -> Callable[[], int]:
    """A training run that takes a step each turn and gives the bytes of its recurrent state."""
    from dsmr_mlx.training.trainer import Trainer

    trainer = Trainer(config, Corpus.load(data))

    def step() -> int:
        while trainer.train_segment() is None:
            pass
        return trainer.memory.nbytes

    return step


def decoding(config: TrainConfig, data: str, tokens: int) -> Callable[[], None]:
    """A player with random weights whose memory is full, where there is a piece to fill it; it plays some tokens."""
    from dsmr_mlx.generation.grammar import Limits
    from dsmr_mlx.generation.player import Player

    corpus = Corpus.load(data)
    longest = corpus.tokens(max(corpus.pieces("train"), key=lambda piece: piece.length))
    player = Player(random_model(config.model_config(corpus.vocab_size), config.dtype), corpus.tokenizer)
    player.read(longest[: min(len(longest) - 1, max(config.schedule.horizons) + config.segment_length)])
    steps = player.play(Limits())

    def play() -> None:
        for _ in islice(steps, tokens):
            pass

    return play


def measure(setting: Setting, data: str, rounds: int, decoded: int, report: Report) -> dict[str, dict[str, Any]]:
    """For each schedule its `training` and its `decoding`, see `against_first`; `decoded`: tokens in a turn."""
    configs = {name: setting.config(spec) for name, spec in setting.specs.items()}
    # Segments until the longest memory is full, beside what every measurement warms up.
    fill = max(-(-max(c.schedule.horizons) // (c.segment_length * c.accumulate)) for c in configs.values())
    first = next(iter(configs.values()))
    sides = [partial(Worker, training, config, data) for config in configs.values()]
    report("training steps")
    trained = against_first(sides, rounds, fill, first.tokens_per_step, report)
    sides = [partial(Worker, decoding, config, data, decoded) for config in configs.values()]
    report("decoding")
    played = against_first(sides, rounds, 1, decoded, report)
    return {name: {"training": trained[i], "decoding": played[i]} for i, name in enumerate(configs)}


def against_first(
    starts: Sequence[Callable[[], Worker]], rounds: int, fill: int, tokens: int, report: Report
) -> list[dict[str, Any]]:
    """What the turns of each side cost, where the first side takes turns with one of the others after the other.

    fill: turns before anything is measured; tokens: in a turn. tokens_per_second and ratio (to the first, round by
    round) have a median and quartiles; peak_bytes is of MLX's allocations.
    """
    first = starts[0]()
    for _ in range(fill):
        first()
    times, results = [], []
    for start in starts[1:]:
        other = start()
        for _ in range(fill):
            other()
        reference, seconds = in_turn([first, other], rounds)
        results.append(result(other, seconds, tokens) | {"ratio": ratios(reference, seconds)})
        other.close()
        times += reference
        report(f"{len(results) + 1} of {len(starts)} schedules")
    if not times:
        (times,) = in_turn([first], rounds)
    results.insert(0, result(first, times, tokens) | {"ratio": spread([1.0])})
    first.close()
    return results


def result(side: Worker, seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """What one side cost; `state_bytes` is what its turns give."""
    rate = spread([tokens / each for each in seconds])
    return {"tokens_per_second": rate, "peak_bytes": side.memory()["peak"], "state_bytes": side()}
