"""The cost part of the schedules: time of training and decoding, peak memory, recurrent state.

Each schedule has its own process, so its peak memory is measured alone. It takes turns with the first schedule, which
stays loaded, so ratios compare the same moments and at most two models are in memory.
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
    """A turn takes a training step and returns the bytes of the recurrent state."""
    from dsmr_mlx.training.trainer import Trainer

    trainer = Trainer(config, Corpus.load(data))

    def step() -> int:
        while trainer.train_segment() is None:
            pass
        return trainer.state.nbytes

    return step


def decoding(config: TrainConfig, data: str, tokens: int) -> Callable[[], None]:
    """A turn generates some tokens with random weights and a full memory."""
    from dsmr_mlx.generation.grammar import Limits
    from dsmr_mlx.generation.player import Player

    corpus = Corpus.load(data)
    longest = corpus.tokens(max(corpus.pieces("train"), key=lambda piece: piece.length))
    player = Player(random_model(config.model_config(corpus.tokenizer), config.dtype), corpus.tokenizer)
    player.read(longest[: min(len(longest) - 1, max(config.schedule.horizons) + config.segment_length)])
    steps = player.play(Limits())

    def play() -> None:
        for _ in islice(steps, tokens):
            pass

    return play


def measure(setting: Setting, data: str, rounds: int, decoded: int, report: Report) -> dict[str, dict[str, Any]]:
    """`training` and `decoding` of each schedule, see `against_first`; `decoded`: tokens per turn."""
    configs = {name: setting.config(spec) for name, spec in setting.specs.items()}
    # Segments until the longest memory is full, in addition to the warm-up.
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
    """The cost of each side, which takes turns with the first.

    fill: turns before anything is measured; tokens: per turn. tokens_per_second and ratio (to the first, per round)
    have median and quartiles; peak_bytes is the peak of MLX's allocations.
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
    """The cost of one side; `state_bytes` is what its turns return."""
    rate = spread([tokens / each for each in seconds])
    return {"tokens_per_second": rate, "peak_bytes": side.memory()["peak"], "state_bytes": side()}
