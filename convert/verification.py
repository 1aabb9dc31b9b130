"""The proof of a conversion: the original and the MLX model on the same random tokens.

Both compute in float32 on the CPU, so that what differs is their rounding. The MLX model reads the tokens as a stream,
segment by segment, as in generation; the original all at once.

Without the original's program its logits can be stored and compared. They come from any PyTorch model by

    tokens = numpy.random.default_rng(0).integers(0, vocab_size, (2, 256))
    with torch.no_grad():
        logits = model.float().eval()(torch.from_numpy(tokens))  # (2, 256, V), for transformers: (…).logits
    numpy.savez("reference.npz", tokens=tokens, logits=logits.numpy())

and, to see in which layer a difference begins, `hidden` `[L, B, T, d_model]`, the states after each block.
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.originals import Activations, Original, original_of, within
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

if TYPE_CHECKING:
    from dsmr_mlx.convert.importing import Conversion

# Relative to the largest value of a layer. Rounding in another order makes 4e-7 to 8e-6, whatever the depth; the other
# GELU 1.2e-4 and more, an eps ten times as large 1e-3, another base of RoPE 5e-3.
TOLERANCE = 1e-4
SHORTEST, LONGEST = 256, 2048  # tokens, where the schedule lets choose
ARRAYS = {"tokens": "integers [B, T]", "logits": "float32 [B, T, V]", "hidden": "float32 [L, B, T, d_model]"}


class Difference(NamedTuple):
    """Of one tensor: the largest absolute difference, and that over the largest absolute value of the original."""

    what: str
    max_absolute: float
    max_relative: float


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    against    name of the original, or of the file with its logits
    tokens     lanes and tokens, (B, T)
    rows       after each layer, after the final norm if that is known, and of the logits
    agreement  share of the tokens after which both have the same most likely next token
    tolerance  the largest relative difference that passes
    """

    against: str
    tokens: tuple[int, int]
    rows: list[Difference]
    agreement: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether no row exceeds the tolerance; false for values that are not finite."""
        return all(row.max_relative <= self.tolerance for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for numbers that are not finite."""
        return {
            "against": self.against,
            "tokens": list(self.tokens),
            "differences": [
                {name: value if isinstance(value, str) else _finite(value) for name, value in row._asdict().items()}
                for row in self.rows
            ],
            "argmax_agreement": self.agreement,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


def verify(conversion: "Conversion", stored: str | Path | None = None, tolerance: float = TOLERANCE) -> Verification:
    """Compare a conversion, before its weights are cast or quantized, with its original or with `stored` logits.

    Raises `UserError` as `original_of` and `compare_stored` do.
    """
    config = replace(conversion.config, quantization=None)
    original = None
    if stored is None:
        original = original_of(conversion.family, conversion.source, conversion.prefix, config)
    model = DSMR(config)
    model.load_weights(list(conversion.weights()))
    if original is None:
        return compare_stored(model, stored, conversion.exact_tokens, tolerance)
    tokens = random_tokens(config, usual_length(config, conversion.exact_tokens))
    return compare(model, original, tokens, tolerance)


def usual_length(config: ModelConfig, exact: int | None = None) -> int:
    """How many tokens to compare: two and a half segments, from 256 to 2,048 tokens, but never more than `exact`.

    exact: up to how many tokens of a piece the model should compute what the original does; None: any number.
    """
    wanted = min(max(config.segment_length * 5 // 2, SHORTEST), LONGEST)
    return min(n for n in (wanted, exact, config.max_positions) if n is not None)


def random_tokens(config: ModelConfig, length: int, lanes: int = 2, seed: int = 0) -> np.ndarray:
    """Ids from the whole vocabulary, int64 `[lanes, length]`."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (lanes, length))


def compare(model: DSMR, original: Original, tokens: np.ndarray, tolerance: float = TOLERANCE) -> Verification:
    """Both models on `tokens`, integers `[B, T]` of the vocabulary.

    Raises `UserError` if they go past learned positions, or if the two have another number or size of layers.
    """
    expected, found = original(tokens), activations(model, tokens)
    shapes = [[(len(a.hidden), *a.hidden[0].shape), a.logits.shape] for a in (found, expected)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{original.name}: hidden states and logits of {shapes[1]}, expected {shapes[0]}")
    return _verification(original.name, tokens, found, expected, tolerance)


def compare_stored(
    model: DSMR, path: str | Path, exact: int | None = None, tolerance: float = TOLERANCE
) -> Verification:
    """The model against the logits in a .npz file, as the module explains it; of more than `exact` tokens the first.

    Raises `UserError` for a file that cannot be read, lacks an array or has one of another name, shape or type, for
    ids outside the vocabulary, and for tokens past learned positions.
    """
    arrays = _stored_arrays(Path(path), model.config)
    tokens = arrays["tokens"][:, :exact]
    hidden = [layer[:, :exact] for layer in arrays.get("hidden", [])]
    expected = Activations(hidden, arrays["logits"][:, :exact])
    return _verification(Path(path).name, tokens, activations(model, tokens), expected, tolerance)


def activations(model: DSMR, tokens: np.ndarray) -> Activations:
    """What the model computes for integers `[B, T]`, read segment by segment, in float32.

    Raises `UserError` for tokens past learned positions.
    """
    with _float32_on_cpu():
        (B, T), done, logits, normed = tokens.shape, 0, [], []
        watched, seen = _watched(model, T)
        state = watched.new_state(B, mx.float32)
        while done < T:
            n = min(state.segment_room, T - done)
            hidden, state = watched.advance(mx.array(tokens[:, done : done + n]), state)
            normed.append(hidden)
            logits.append(watched.logits(hidden))
            mx.eval(seen, normed, logits, state.arrays)
            done += n
        # What goes into a layer is what came out of the one before.
        joined = [np.concatenate([np.array(part) for part in parts], axis=1) for parts in (*seen[1:], logits, normed)]
    *after_blocks, all_logits, all_normed = joined
    return Activations(after_blocks, all_logits, all_normed)


@contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Graphics processors round the factors of float32 products to 10 bits (TF32) where they can."""
    # Compiled functions would need a C++ compiler at run time.
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def _watched(model: DSMR, length: int) -> tuple[DSMR, list[list[mx.array]]]:
    """The same model in float32, for streams of no more than `length` tokens, and lists of what goes into its parts.

    There is a list for each layer and one for the final norm.
    """
    watched = DSMR(within(model.config, length)).eval()
    watched.update(tree_map(_as_float32, model.parameters()))
    seen: list[list[mx.array]] = [[] for _ in range(len(watched.layers) + 1)]

    def watching(norm: Callable[[mx.array], mx.array], to: list[mx.array]) -> Callable[[mx.array], mx.array]:
        def watch(x: mx.array) -> mx.array:
            to.append(x)
            return norm(x)

        return watch

    for block, to in zip(watched.layers, seen, strict=False):
        block.attention_norm = watching(block.attention_norm, to)
    watched.norm = watching(watched.norm, seen[-1])
    return watched, seen


def _as_float32(parameter: mx.array) -> mx.array:
    """Quantized weights stay as they are."""
    return parameter.astype(mx.float32) if mx.issubdtype(parameter.dtype, mx.floating) else parameter


def _verification(
    against: str, tokens: np.ndarray, found: Activations, expected: Activations, tolerance: float
) -> Verification:
    pairs = [(f"layer {i}", found.hidden[i], hidden) for i, hidden in enumerate(expected.hidden)]
    if expected.normed is not None:
        pairs.append(("final norm", found.normed, expected.normed))
    pairs.append(("logits", found.logits, expected.logits))
    same = found.logits.argmax(-1) == expected.logits.argmax(-1)
    return Verification(against, tokens.shape, [_difference(*pair) for pair in pairs], float(same.mean()), tolerance)


def _difference(what: str, found: np.ndarray, expected: np.ndarray) -> Difference:
    with np.errstate(invalid="ignore", over="ignore"):
        absolute = float(np.abs(found - expected).max())
    largest = float(np.abs(expected).max())
    if absolute == 0:
        return Difference(what, 0.0, 0.0)
    return Difference(what, absolute, absolute / largest if largest else math.inf)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _stored_arrays(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, checked: tokens `[B, T]`, logits `[B, T, V]`, perhaps hidden `[L, B, T, d_model]`."""
    arrays = _loaded(path)
    tokens = arrays["tokens"] = np.atleast_2d(arrays["tokens"])
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: tokens: found {tokens.dtype} {list(tokens.shape)}, expected {ARRAYS['tokens']}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"{path}: tokens: found ids from {low} to {high}, expected 0 to {config.vocab_size - 1}")
    lanes, T = tokens.shape
    shapes = {"logits": (lanes, T, config.vocab_size), "hidden": (config.n_layers, lanes, T, config.d_model)}
    without_lanes = {"logits": shapes["logits"][1:], "hidden": (config.n_layers, T, config.d_model)}
    for name in arrays.keys() & shapes.keys():
        array = arrays[name]
        fits = array.shape == shapes[name] or (lanes == 1 and array.shape == without_lanes[name])
        if not fits or array.dtype not in (np.float32, np.float64):
            found, expected = f"{array.dtype} {list(array.shape)}", f"{ARRAYS[name]}, here {list(shapes[name])}"
            raise UserError(f"{path}: {name}: found {found}, expected {expected}")
        arrays[name] = array.reshape(shapes[name])
    return arrays


def _loaded(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, with tokens and logits among them."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected a .npz file") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        # Beside damage: a single array, which is not such a file, and pickled objects, which are not loaded.
        raise UserError(f"{path}: not a .npz file of arrays ({error}), expected tokens and logits in it") from None
    if unknown := sorted(arrays.keys() - ARRAYS.keys()):
        raise UserError(f"{path}: unknown array {', '.join(unknown)}; known are {', '.join(ARRAYS)}")
    for name in ("tokens", "logits"):
        if name not in arrays:
            raise UserError(f"{path}: has no {name}, expected {ARRAYS[name]}")
    return arrays
