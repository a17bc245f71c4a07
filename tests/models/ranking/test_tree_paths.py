from __future__ import annotations

import numpy as np
import pytest
import xgboost as xgb
from nightstream.models.ranking.tree_paths import TreePaths

FEATURES = 7


def trained(rounds: int, depth: int) -> xgb.Booster:
    rng = np.random.default_rng(rounds)
    values = rng.random((400, FEATURES)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    wanted = np.nan_to_num(values[:, 1]) * 3 + np.nan_to_num(values[:, 4]) ** 2 + rng.normal(0, 0.1, 400)
    parameters = {"max_depth": depth, "min_child_weight": 3.0, "gamma": 0.02, "lambda": 2.0, "nthread": 1, "seed": 0}
    return xgb.train(parameters, xgb.DMatrix(values, label=wanted, nthread=1), rounds)


@pytest.mark.parametrize(("rounds", "depth"), [(40, 3), (1, 3), (12, 6), (3, 1)])
def test_they_add_up_as_those_of_xgboost(rounds: int, depth: int) -> None:
    """In trees of different sizes, some of them cut back, and where a value is missing."""
    booster = trained(rounds, depth)
    values = np.random.default_rng(9).normal(0.5, 1, (50, FEATURES)).astype(np.float32)
    values[::7, 4] = np.nan
    expected = booster.predict(xgb.DMatrix(values, nthread=1), pred_contribs=True, approx_contribs=True)[:, :-1]
    found = TreePaths(booster).contributions(values)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_rows_have_none() -> None:
    assert TreePaths(trained(5, 3)).contributions(np.zeros((0, FEATURES), np.float32)).shape == (0, FEATURES)
