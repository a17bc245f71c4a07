"""A linear listwise ranker: the few numbers that a small set of labels can settle, for the trees to start from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from nightstream.errors import ArtifactError

LOG_FLOOR = 1e-3
# Standard deviations. What serves may lie further from what was learnt from than a weight was learnt for.
FURTHEST = 8.0
STILL = 1e-5  # standard deviation below which a term says nothing: what moves it is rounding


@dataclass(frozen=True)
class Linear:
    """score = Σ weights · (term − mean) / scale over T terms, each standardised term within ±FURTHEST; a term is a
    column of the features, or its logarithm.

    columns: int [T]. logs: bool [T]. mean, scale, weights: float64 [T].
    """

    columns: np.ndarray
    logs: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray

    def terms(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, T] standardised terms of features [N, F]."""
        terms = (_raw_terms(features, self.columns, self.logs) - self.mean) / self.scale
        return np.asarray(np.clip(terms, -FURTHEST, FURTHEST))

    def score(self, features: np.ndarray) -> np.ndarray:
        """float32 [N]. Summed term by term, since a matrix product's last bits depend on the number of rows."""
        total = np.zeros(len(features))
        for term, weight in zip(self.terms(features).T, self.weights, strict=True):
            total += weight * term
        return total.astype(np.float32)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, F]: what each column added, against an average candidate."""
        out = np.zeros(features.shape, np.float64)
        for column, part in zip(self.columns, (self.terms(features) * self.weights).T, strict=True):
            out[:, column] += part
        return out.astype(np.float32)

    def to_json(self) -> str:
        return json.dumps({name: np.asarray(value).tolist() for name, value in vars(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Linear:
        """ArtifactError for anything but to_json's text."""
        try:
            about = json.loads(text)
            return cls(
                np.asarray(about["columns"], np.int64),
                np.asarray(about["logs"], bool),
                *(np.asarray(about[name], np.float64) for name in ("mean", "scale", "weights")),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the linear part of the ranker can't be read: {error}") from error


def _raw_terms(features: np.ndarray, columns: np.ndarray, logs: np.ndarray) -> np.ndarray:
    terms = features[:, columns].astype(np.float64)
    terms[:, logs] = np.log(np.maximum(terms[:, logs], 0) + LOG_FLOOR)
    return terms


def fit_linear(
    features: np.ndarray, labels: np.ndarray, sizes: np.ndarray, columns: np.ndarray, logs: np.ndarray, l2: float = 1e-3
) -> Linear:
    """The weights of highest likelihood under a softmax over each group (ListNet's top-one model; Cao et al., 2007).

    features: [N, F]; labels: [N], exactly one 1 per group; sizes: int [G], none of them 0, groups one after another.
    A term that stands still in all of them has no weight.
    """
    raw = _raw_terms(features, columns, logs)
    mean, scale = raw.mean(0), raw.std(0)
    still = scale < STILL
    unweighted = Linear(columns, logs, mean, np.where(still, 1.0, scale), np.zeros(len(columns)))
    terms = np.where(still, 0.0, unweighted.terms(features))
    starts = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(sizes)), sizes)
    wanted = terms[labels > 0].mean(0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = terms @ weights
        top = np.maximum.reduceat(scores, starts)
        share = np.exp(scores - top[owner])
        mass = np.add.reduceat(share, starts)
        share /= mass[owner]
        value = float((np.log(mass) + top).mean() - wanted @ weights + l2 * weights @ weights)
        return value, terms.T @ share / len(sizes) - wanted + 2 * l2 * weights

    solution = minimize(loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return replace(unweighted, weights=np.asarray(solution.x))
