"""The sides of a comparison that use DSMR: player, network and trainer."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
from measuring import music, random_model, take

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.compiled import Compiled
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.device import on_gpu
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.trainer import Trainer


def playing(
    config: ModelConfig, dtype: str, position: int, tokens: int, compile: bool | None = None
) -> Callable[[], None]:
    """A turn generates some tokens with the player, starting after `position` tokens."""
    player = Player(random_model(config, dtype), PerformanceTokenizer(), compile=compile)
    player.read(music(position))
    return partial(take, player.play(Limits()), tokens)


def stepping(config: ModelConfig, dtype: str, position: int, tokens: int) -> Callable[[], None]:
    """A turn samples some tokens with the network alone, without grammar and rewinding, after `position` tokens."""
    model = random_model(config, dtype)
    gpu = on_gpu()
    step = Compiled(model.step, gpu, inputs=[model], lazy=True)
    evaluate = mx.async_eval if gpu else mx.eval

    def steps() -> Iterator[int]:
        logits, state = model(mx.array(music(position)[None]))
        logits, segment = logits[:, -1], None
        while True:
            token = mx.random.categorical(logits)
            if state.is_full or segment is None:
                state = state.opened()
                segment = state.segment(compiled=gpu)
            slot = mx.array(state.filled, mx.int32) if gpu else state.filled
            logits, layers = step(token, state.layers, slot, segment)
            state = state.advanced(layers, 1)
            del layers  # arrays without references are updated in place
            evaluate(token, logits, state.arrays)
            yield token.item()

    return partial(take, steps(), tokens)


def reading(config: ModelConfig, dtype: str, tokens: int) -> Callable[[], None]:
    """A turn reads `tokens` tokens."""
    model, tokenizer, ids = random_model(config, dtype), PerformanceTokenizer(), music(tokens)
    return lambda: Player(model, tokenizer).read(ids)


def training(config: TrainConfig, corpus: str) -> Callable[[], float]:
    """A turn takes a training step and returns its loss."""
    trainer = Trainer(config, Corpus.load(corpus))

    def step() -> float:
        while (record := trainer.train_segment()) is None:
            pass
        mx.synchronize()  # the update of the weights
        return record.loss

    return step


def write_corpus(path: Path, pieces: int, tokens: int) -> str:
    """Write a corpus of random pieces; returns its path."""
    tokenizer = PerformanceTokenizer()
    with CorpusWriter(path, tokenizer) as writer:
        for i in range(pieces):
            ids = music(tokens + 1, seed=i).astype(tokenizer.dtype)
            writer.add(ids, source=f"{i}.mid", split="train", duration=0.0, notes=0)
        writer.commit({})
    return str(path)
