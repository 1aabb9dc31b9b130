"""How well a classifier tells generated from real music by their features: a classifier two-sample test.

Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests". Distances compare one feature at a time; a classifier
also sees unusual combinations of features, such as too few voices for the number of notes. Here it is logistic
regression with ridge regularization. If nothing distinguishes the sets, half of its answers are right.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from dsmr_mlx.evaluation.music.distances import FeatureSet
from dsmr_mlx.evaluation.music.features import DISTRIBUTIONS, FIGURES

FOLDS = 10
RIDGE = 1.0  # of the squared weights of standardized features, against the sum of the losses
MAX_DEVIATIONS = 4.0  # standardized features beyond are clipped: one outlier must not dominate
NEWTON_STEPS = 25
NAMED = 4  # features that distinguish most
SHUFFLES = 20  # random assignments of works to the sets


@dataclass(frozen=True)
class Discrimination:
    """The answers of classifiers about pieces that they were not fitted on.

    right: share of right answers, the mean over both sets, 0.5 if they cannot be told apart; chance: the standard
    deviation of that share if works are assigned to the sets at random; by: the features with the largest weights, as
    (title, weight): positive if more of it, the other features being equal, speaks for generated music.
    """

    right: float
    chance: float
    by: list[tuple[str, float]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Restore what `to_dict` returned."""
        return cls(values["right"], values["chance"], [(row["feature"], row["weight"]) for row in values["by"]])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"by": [{"feature": title, "weight": weight} for title, weight in self.by]}

    def __str__(self) -> str:
        return (
            f"a classifier tells generated from real music in {100 * self.right:.0f} % of the cases "
            f"(50 ± {100 * self.chance:.0f} % by luck), most by {'; '.join(title for title, _ in self.by)}"
        )


def tell_apart(generated: FeatureSet, reference: FeatureSet, *, seed: int = 0) -> Discrimination | None:
    """Cross-validate classifiers: fit them on nine tenths of the works, and classify the pieces of the rest.

    Pieces of one origin, such as excerpts of one work, are in one part. Both sets weigh the same, whatever their sizes.
    None if one of them has fewer than `FOLDS` origins.
    """
    titles = {d.key: d.title for d in DISTRIBUTIONS if d.ordered} | FIGURES
    sets = (generated, reference)
    if min(len(set(s.origins)) for s in sets) < FOLDS:
        return None
    values = np.concatenate([np.stack([s.numbers(key) for key in titles], axis=1) for s in sets])  # (n, features)
    new = np.repeat([True, False], [len(s) for s in sets])
    origins = [f"{name} {origin}" for name, s in zip(("generated", "real"), sets, strict=True) for origin in s.origins]
    rng = np.random.default_rng(seed)
    shares_by_chance = [share_right(values, shuffled(new, origins, rng), origins, rng) for _ in range(SHUFFLES)]
    weights, _ = fit(standardize(values, np.full(len(new), True)), new)
    most = np.argsort(-np.abs(weights))[:NAMED]
    return Discrimination(
        right=share_right(values, new, origins, rng),
        chance=float(np.std(shares_by_chance)),
        by=[(list(titles.values())[i], float(weights[i])) for i in most],
    )


def share_right(values: np.ndarray, new: np.ndarray, origins: list[str], rng: np.random.Generator) -> float:
    """Return the share of right answers about pieces with features `values` `(n, k)` and labels `new` `(n,)`."""
    folds = np.empty(len(new), np.int64)
    for of in (new, ~new):  # each set is spread over all parts
        folds[of] = fold_of([origin for origin, one in zip(origins, of, strict=True) if one], rng)
    right = np.empty(len(new), bool)
    for fold in range(FOLDS):
        fitted, tested = folds != fold, folds == fold
        standardized = standardize(values, fitted)
        weights, bias = fit(standardized[fitted], new[fitted])
        right[tested] = (standardized[tested] @ weights + bias > 0) == new[tested]
    return float((right[new].mean() + right[~new].mean()) / 2)


def shuffled(new: np.ndarray, origins: list[str], rng: np.random.Generator) -> np.ndarray:
    """Return labels `(n,)` that are assigned at random, the same to all pieces of a work, about as many of each."""
    names, of = np.unique(origins, return_inverse=True)
    order = rng.permutation(len(names))
    before = np.cumsum(np.bincount(of)[order]) - np.bincount(of)[order]  # pieces of works that come before
    chosen = np.empty(len(names), bool)
    chosen[order] = before < new.sum()
    chosen[order[:FOLDS]], chosen[order[-FOLDS:]] = True, False
    return chosen[of]


def fold_of(origins: list[str], rng: np.random.Generator) -> np.ndarray:
    """Return the part `(n,)`, 0 to `FOLDS` − 1, of each piece; pieces of one origin are in one part."""
    names, of = np.unique(origins, return_inverse=True)
    return (rng.permutation(len(names)) % FOLDS)[of]


def standardize(values: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return features `(n, k)` with mean 0 and deviation 1 over the pieces `fitted` `(n,)`; NaN becomes the mean."""
    known = np.where(fitted[:, None], values, np.nan)
    some = ~np.isnan(known).all(axis=0)
    centre, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
    centre[some], scale[some] = np.nanmean(known[:, some], axis=0), np.nanstd(known[:, some], axis=0)
    standardized = (values - centre) / np.where(scale > 1e-12, scale, 1.0)
    return np.clip(np.nan_to_num(standardized), -MAX_DEVIATIONS, MAX_DEVIATIONS)


def fit(values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights `(k,)` and the bias of logistic regression, by Newton's method; both classes weigh the same.

    values: standardized features `(n, k)`; new: the class of each, bool `(n,)`
    """
    inputs = np.append(values, np.ones((len(values), 1)), axis=1)
    ridge = RIDGE * np.append(np.ones(values.shape[1]), 1e-6)
    share = np.where(new, 0.5 / new.mean(), 0.5 / (1 - new.mean()))  # weights of the pieces
    weights = np.zeros(inputs.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (share * (chance - new)) + ridge * weights
        hessian = (inputs.T * (share * chance * (1 - chance))) @ inputs + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights[:-1], float(weights[-1])
