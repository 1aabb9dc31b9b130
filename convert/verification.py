"""Verify a conversion: run the original and the MLX model on the same random tokens and compare.

Both compute in float32 on the CPU, so that only rounding differs. The MLX model reads the tokens as a stream, segment
by segment, as in generation; the original reads them at once.

If the original program is not available, its logits can be stored and compared. For any PyTorch model:

    tokens = numpy.random.default_rng(0).integers(0, vocab_size, (2, 256))
    with torch.no_grad():
        logits = model.float().eval()(torch.from_numpy(tokens))  # (2, 256, V), for transformers: (…).logits
    numpy.savez("reference.npz", tokens=tokens, logits=logits.numpy())

Optional, to find the layer where a difference begins: `hidden` `(L, B, T, d_model)`, the states after each block.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular
from dsmr_mlx.convert.originals import Activations, Original, original_of, within
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR, Block

if TYPE_CHECKING:
    from dsmr_mlx.convert.importing import Conversion

# Relative to the largest value of a layer. Rounding in another order causes 4e-7 to 8e-6 at any depth, the wrong GELU
# 1.2e-4 and more, an eps ten times as large 1e-3, a wrong base of RoPE 5e-3.
TOLERANCE = 1e-4
MIN_TOKENS, MAX_TOKENS = 256, 2048  # default length, unless fewer tokens are exact
ARRAYS = {"tokens": "integers (B, T)", "logits": "float32 (B, T, V)", "hidden": "float32 (L, B, T, d_model)"}


class Difference(NamedTuple):
    """The largest absolute difference in a tensor, and its ratio to the largest absolute value in the original."""

    what: str
    max_absolute: float
    max_relative: float


@dataclass(frozen=True)
class Verification:
    """The result of a comparison.

    against    name of the original, or of the file with its logits
    tokens     shape of the tokens, `(B, T)`
    rows       differences after each layer, after the final norm if known, and of the logits
    agreement  fraction of positions where both have the same most likely next token
    tolerance  the largest relative difference that passes
    """

    against: str
    tokens: tuple[int, int]
    rows: list[Difference]
    agreement: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether all rows are within the tolerance; false for values that are not finite."""
        return all(row.max_relative <= self.tolerance for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; None for numbers that are not finite."""
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


def verify(
    conversion: "Conversion", logits_file: str | Path | None = None, tolerance: float = TOLERANCE
) -> Verification:
    """Compare a conversion with its original or with stored logits.

    The weights are those before heads are averaged and weights are cast or quantized.

    Raises `UserError` as `original_of` and `compare_with_file` do.
    """
    config, original = conversion.unchanged, None
    if logits_file is None:  # before weights are loaded: it may be impossible
        original = original_of(conversion.family, conversion.source, conversion.prefix, config)
    model = DSMR(config)
    model.load_weights(list(conversion.float32_weights()))
    if original is None:
        return compare_with_file(model, logits_file, conversion.exactness.tokens, tolerance)
    tokens = random_tokens(config, default_length(config, conversion.exactness.tokens))
    return compare_with_original(model, original, tokens, tolerance)


def default_length(config: ModelConfig, exact: int | None = None) -> int:
    """Return how many tokens to compare: two and a half segments, from 256 to 2,048 tokens, but at most `exact`.

    exact: up to how many tokens of a piece the model should equal the original; None: any number
    """
    wanted = min(max(config.segment_length * 5 // 2, MIN_TOKENS), MAX_TOKENS)
    return min(n for n in (wanted, exact, config.max_positions) if n is not None)


def random_tokens(config: ModelConfig, length: int, lanes: int = 2, seed: int = 0) -> np.ndarray:
    """Return random ids of the whole vocabulary, int64 `(lanes, length)`."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (lanes, length))


def compare_with_original(
    model: DSMR, original: Original, tokens: np.ndarray, tolerance: float = TOLERANCE
) -> Verification:
    """Run both models on tokens, integers `(B, T)`, and compare.

    Raises `UserError` if the tokens exceed the learned positions, or if the models differ in number or size of layers.
    """
    expected, found = original(tokens), activations(model, tokens)
    shapes = [f"{(len(a.hidden), *a.hidden[0].shape)}, logits {a.logits.shape}" for a in (found, expected)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{original.name}: hidden states {shapes[1]}; expected {shapes[0]}")
    return _verification(original.name, tokens, found, expected, tolerance, model.config.never_predicted)


def compare_with_file(
    model: DSMR, path: str | Path, exact: int | None = None, tolerance: float = TOLERANCE
) -> Verification:
    """Compare a model with the logits in a .npz file (see the module docstring), for at most `exact` tokens.

    Raises `UserError` if the file cannot be read, if an array is missing, unknown or has an invalid shape or type, if
    ids are outside the vocabulary, and if there are more tokens than learned positions.
    """
    arrays = _read_logits(Path(path), model.config)
    tokens = arrays["tokens"][:, :exact]
    hidden = [layer[:, :exact] for layer in arrays.get("hidden", [])]
    expected = Activations(hidden, arrays["logits"][:, :exact])
    found = activations(model, tokens)
    return _verification(Path(path).name, tokens, found, expected, tolerance, model.config.never_predicted)


def activations(model: DSMR, tokens: np.ndarray) -> Activations:
    """Return the float32 activations of a model for tokens, integers `(B, T)`, read segment by segment.

    Raises `UserError` for tokens that exceed the learned positions.
    """
    with _float32_on_cpu():
        (B, T), done, logits, normed = tokens.shape, 0, [], []
        copy, outputs = _with_recorded_outputs(model, T)
        state = copy.new_state(B, mx.float32)
        while done < T:
            n = min(state.segment_room, T - done)
            hidden, state = copy.advance(mx.array(tokens[:, done : done + n]), state)
            normed.append(hidden)
            logits.append(copy.logits(hidden))
            mx.eval(outputs, normed, logits, state.arrays)
            done += n
        parts_of = (*outputs, logits, normed)
        *hidden, logits, normed = (np.concatenate([np.array(part) for part in parts], axis=1) for parts in parts_of)
    return Activations(hidden, logits, normed)


@contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Run on the CPU: GPUs round the factors of float32 products to 10 bits (TF32)."""
    # Compiled functions would need a C++ compiler at run time.
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def _with_recorded_outputs(model: DSMR, length: int) -> tuple[DSMR, list[list[mx.array]]]:
    """Return a float32 copy of a model for at most `length` tokens, and a list for each layer that records outputs."""
    copy = DSMR(within(model.config, length)).eval()
    copy.update(tree_map(_as_float32, model.parameters()))
    outputs: list[list[mx.array]] = [[] for _ in copy.layers]

    def recording(block: Block, to: list[mx.array]) -> Callable[..., tuple]:
        def record(*args: Any, **kwargs: Any) -> tuple:
            x, *others = block(*args, **kwargs)
            to.append(x)
            return x, *others

        return record

    copy.layers = [recording(block, to) for block, to in zip(copy.layers, outputs, strict=True)]
    return copy, outputs


def _as_float32(parameter: mx.array) -> mx.array:
    """Cast floats; quantized weights are integers."""
    return parameter.astype(mx.float32) if mx.issubdtype(parameter.dtype, mx.floating) else parameter


def _verification(
    against: str,
    tokens: np.ndarray,
    found: Activations,
    expected: Activations,
    tolerance: float,
    never_predicted: list[int],
) -> Verification:
    pairs = [(f"layer {i}", found.hidden[i], hidden) for i, hidden in enumerate(expected.hidden)]
    if expected.normed is not None:
        pairs.append(("final norm", found.normed, expected.normed))
    # Differences are relative to the largest logit, so the constant ones of `never_predicted` are left out.
    logits = [np.delete(each.logits, never_predicted, axis=-1) for each in (found, expected)]
    pairs.append(("logits", *logits))
    same = logits[0].argmax(-1) == logits[1].argmax(-1)
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


def _read_logits(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the checked arrays of a .npz file, with the shapes in `ARRAYS`."""
    arrays = _load_arrays(path)
    tokens = arrays["tokens"] = np.atleast_2d(arrays["tokens"])
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: tokens: found {tokens.dtype} {tokens.shape}, expected {ARRAYS['tokens']}")
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
            found, expected = f"{array.dtype} {array.shape}", f"{ARRAYS[name]}, here {shapes[name]}"
            raise UserError(f"{path}: {name}: found {found}, expected {expected}")
        arrays[name] = array.reshape(shapes[name])
    return arrays


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return name → array; tokens and logits are present, other names are known."""
    try:
        with open_regular(path) as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected a .npz file") from None
    except Exception as error:
        # Damaged (NumPy parses headers as Python), a single array, or pickled objects, which are not loaded.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a .npz file of arrays ({reason}), expected tokens and logits") from None
    if unknown := sorted(arrays.keys() - ARRAYS.keys()):
        raise UserError(f"{path}: unknown array {', '.join(unknown)}; known are {', '.join(ARRAYS)}")
    for name in ("tokens", "logits"):
        if name not in arrays:
            raise UserError(f"{path}: has no {name}, expected {ARRAYS[name]}")
    return arrays
