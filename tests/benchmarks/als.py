"""Spark's ALS for implicit feedback, and the factors of users that it has not met, or not met lately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from baselines import Histories, used_events
from nightstream.models.arrays import Sequences
from pyspark.ml.recommendation import ALS
from pyspark.sql import SparkSession

ITERATIONS = 15


def fold_in(histories: Histories, factors: np.ndarray, regularisation: float, alpha: float) -> np.ndarray:
    """float64 [B, R]: the user factors that minimise implicit ALS' loss for given item factors [M, R].

    Each distinct item counts once. Solves (YᵀY + α YᵤᵀYᵤ + λ n I) x = (1 + α) Σ y over the user's n items with factors
    (Hu et al., ICDM 2008); λ grows with n as in Spark. An item whose factors are all zero was unknown to the training.
    """
    table = np.concatenate([np.zeros((1, factors.shape[1])), factors]).astype(np.float64)
    known = np.asarray((table != 0).any(1))
    gram = table.T @ table
    out = np.zeros((len(histories), factors.shape[1]))
    for user in range(len(histories)):
        items = np.unique(histories.items[histories.offsets[user] : histories.offsets[user + 1]])
        own = table[items[known[items]]]
        if len(own):
            matrix = gram + alpha * own.T @ own + regularisation * len(own) * np.eye(len(gram))
            out[user] = np.linalg.solve(matrix, (1 + alpha) * own.sum(0))
    return out


class SparkALS:
    """rank, regularisation (λ), alpha: as in pyspark.ml.recommendation.ALS with implicitPrefs."""

    name = "als"

    def __init__(
        self, spark: SparkSession, rank: int = 32, regularisation: float = 0.1, alpha: float = 10.0, seed: int = 0
    ) -> None:
        self.spark, self.rank, self.regularisation, self.alpha = spark, rank, regularisation, alpha
        self.seed = seed

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        owner, items = used_events(log, roles)
        pairs = pd.DataFrame({"user": owner, "item": items}).drop_duplicates().astype("int32")
        als = ALS(
            rank=self.rank,
            maxIter=ITERATIONS,
            regParam=self.regularisation,
            alpha=self.alpha,
            implicitPrefs=True,
            userCol="user",
            itemCol="item",
            ratingCol="rating",
            seed=self.seed,
            numUserBlocks=2,
            numItemBlocks=2,
        )
        self.model = als.fit(self.spark.createDataFrame(pairs.assign(rating=1.0)))
        found = self.model.itemFactors.toPandas()
        self.factors = np.zeros((size, self.rank))
        self.factors[found["id"].to_numpy() - 1] = np.stack(found["features"].to_list())

    def scores(self, histories: Histories) -> np.ndarray:
        return np.asarray(fold_in(histories, self.factors, self.regularisation, self.alpha) @ self.factors.T)

    def settled(self) -> dict[str, Any]:
        return {}
