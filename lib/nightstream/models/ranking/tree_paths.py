"""What each feature adds to a score on its way down boosted trees (Saabas, 2014), looked up by the leaves it ends in.

The sums are those of XGBoost's approximate contributions, which walks every path anew and takes twice as long.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import xgboost as xgb


class TreePaths:
    """The trees of one booster of F features."""

    def __init__(self, booster: xgb.Booster) -> None:
        self.booster, self.features = booster, booster.num_features()
        trees = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"]
        most = max(len(tree["left_children"]) for tree in trees)
        self._first = np.arange(len(trees), dtype=np.int32) * most
        table = np.zeros((len(trees), most, self.features), np.float32)
        for place, tree in enumerate(trees):
            paths = _paths(tree, self.features)
            table[place, : len(paths)] = paths
        self._table = torch.from_numpy(table.reshape(-1, self.features))

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, F] from features [N, F]: what each added, against an average row."""
        if not len(features):
            return np.zeros((0, self.features), np.float32)
        leaves = self.booster.predict(xgb.DMatrix(features, nthread=1), pred_leaf=True)
        rows = leaves.reshape(len(features), -1).astype(np.int32) + self._first
        summed = torch.nn.functional.embedding_bag(torch.from_numpy(rows), self._table, mode="sum")
        return np.asarray(summed.numpy())


def _paths(tree: dict[str, list[float]], features: int) -> np.ndarray:
    """float32 [nodes, F]: what the splits from the root to a node add, each to its feature, by the means below them.

    tree: as XGBoost saves it; children come behind their parents.
    """
    left, right, split = (tree[name] for name in ("left_children", "right_children", "split_indices"))
    covers = np.asarray(tree["sum_hessian"], np.float32)
    means = np.asarray(tree["split_conditions"], np.float32)
    inner = [node for node, child in enumerate(left) if child >= 0]
    for node in reversed(inner):
        children = [int(left[node]), int(right[node])]
        means[node] = np.sum(means[children] * covers[children], dtype=np.float32) / covers[node]
    paths = np.zeros((len(left), features), np.float32)
    for node in inner:
        for child in (int(left[node]), int(right[node])):
            paths[child] = paths[node]
            paths[child, int(split[node])] += means[child] - means[node]
    return paths
