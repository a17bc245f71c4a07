"""The ranker: what every source says about a candidate, weighed by a linear model, and corrected by boosted trees.

The trees are LambdaMART (Burges, 2010). They start from the linear scores, because a thousand label groups settle a
dozen weights well and a forest badly: with few labels the trees stop early and the linear part remains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xgboost as xgb

from nightstream.errors import ArtifactError
from nightstream.models.ranking.linear_ranker import Linear, fit_linear
from nightstream.models.ranking.rank_features import RankerFeatures
from nightstream.models.ranking.tree_paths import TreePaths


@dataclass(frozen=True)
class RankerSizes:
    """depth, learning_rate, trees (at most), min_child_weight, column_share, row_share, l2: of XGBoost.
    patience: trees without a better NDCG@10 before stopping. label_limit: label groups, sampled by seed."""

    depth: int = 3
    learning_rate: float = 0.05
    trees: int = 200
    min_child_weight: float = 5.0
    column_share: float = 0.5
    row_share: float = 0.8
    l2: float = 20.0
    patience: int = 30
    label_limit: int = 10_000
    threads: int = 2


@dataclass(frozen=True)
class LabelledGroups:
    """G groups of N candidates in all. features: float32 [N, F]; labels: float32 [N], 1 = target; sizes: int [G]."""

    features: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray

    def with_target(self) -> LabelledGroups:
        """The groups that hold their target: the others teach nothing."""
        owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        has_target = np.bincount(owner, self.labels, minlength=len(self.sizes)) > 0
        kept = has_target[owner]
        return LabelledGroups(self.features[kept], self.labels[kept], self.sizes[has_target])


class Ranker:
    """A linear part and a booster; both look at each row alone, so the split into batches does not matter."""

    def __init__(self, booster: xgb.Booster, linear: Linear, columns: Sequence[str] = ()) -> None:
        """columns: names of the F features in order; empty for a ranker whose file does not have them."""
        self.booster = booster
        self.linear = linear
        self.columns = list(columns)
        self.booster.set_param({"nthread": 1})

    def score(self, features: np.ndarray) -> np.ndarray:
        """float32 [N] from features [N, F]; higher is better."""
        if not len(features):
            return np.zeros(0, np.float32)
        return np.asarray(self.booster.inplace_predict(features), np.float32) + self.linear.score(features)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, F]: what each feature added to the score, against an average candidate."""
        return self._paths.contributions(features) + self.linear.contributions(features)

    @cached_property
    def _paths(self) -> TreePaths:
        return TreePaths(self.booster)

    def to_bytes(self) -> bytes:
        """UBJ; the linear part and the names of the columns are attributes of the booster."""
        # Not feature_names: from then on XGBoost refuses every matrix that does not repeat them.
        self.booster.set_attr(linear=self.linear.to_json(), columns=json.dumps(self.columns))
        return bytes(self.booster.save_raw("ubj"))

    @classmethod
    def from_bytes(cls, data: bytes, reads: RankerFeatures) -> Ranker:
        """ArtifactError for anything but a booster of these features, in this order."""
        try:
            booster = xgb.Booster(model_file=bytearray(data))
            count = booster.num_features()
        except xgb.core.XGBoostError as error:
            raise ArtifactError("the ranker is not a readable XGBoost model") from error
        if count != len(reads.names):
            raise ArtifactError(f"the ranker has {count} features, its model {len(reads.names)}")
        columns = json.loads(booster.attr("columns") or "[]")
        for learnt, given in zip(columns, reads.names, strict=False):
            if learnt != given:
                raise ArtifactError(
                    f"the ranker has learnt from the feature {learnt} where its model gives {given}; train anew"
                )
        return cls(booster, Linear.from_json(booster.attr("linear") or ""), columns)


def train_ranker(
    train: LabelledGroups, valid: LabelledGroups, reads: RankerFeatures, sizes: RankerSizes, seed: int
) -> Ranker | None:
    """A ranker for NDCG@10, its trees stopped early on `valid`; None if there is no group to learn or stop by.

    Args:
        train: What it learns from.
        valid: What stops the trees.
        reads: The features of both, in order.
        sizes: Of the trees.
        seed: Of the sampling of rows and columns.
    """
    train, valid = train.with_target(), valid.with_target()
    if not len(train.sizes) or not len(valid.sizes):
        return None

    linear = fit_linear(train.features, train.labels, train.sizes, *reads.linear_terms())

    def matrix(groups: LabelledGroups) -> xgb.DMatrix:
        margin = linear.score(groups.features)
        data = xgb.DMatrix(groups.features, label=groups.labels, base_margin=margin, nthread=sizes.threads)
        data.set_group(groups.sizes)
        return data

    parameters = {
        "objective": "rank:ndcg",
        "eval_metric": "ndcg@10",
        "max_depth": sizes.depth,
        "eta": sizes.learning_rate,
        "min_child_weight": sizes.min_child_weight,
        "colsample_bynode": sizes.column_share,
        "subsample": sizes.row_share,
        "lambda": sizes.l2,
        "tree_method": "hist",
        "nthread": sizes.threads,
        "seed": seed,
    }
    booster = xgb.train(
        parameters,
        matrix(train),
        sizes.trees,
        evals=[(matrix(valid), "valid")],
        early_stopping_rounds=sizes.patience,
        verbose_eval=False,
    )
    return Ranker(booster[: booster.best_iteration + 1], linear, reads.names)
