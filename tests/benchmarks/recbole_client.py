"""RecBole's models as baselines: trained and asked in an environment of their own, which wants another numpy."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from baselines import Histories, popular_rows
from measuring import Log
from nightstream.errors import NightstreamError
from nightstream.evaluation import offline
from nightstream.models.arrow import rows_of

MODELS = {"recbole-gru4rec": "GRU4Rec", "recbole-caser": "Caser", "recbole-sasrec": "SASRec"}
SCRIPT = Path(__file__).with_name("recbole_lists.py")


def best_rows(
    python: str, name: str, seed: int, log: Log, fallback: np.ndarray, user_ids: pa.Array, histories: Histories
) -> tuple[np.ndarray, np.ndarray]:
    """As baselines.best_rows, by the model `name` (a key of MODELS) that the interpreter `python` trains on the log.

    user_ids: [B]; users of whom nothing is known get the fallback's list. Raises NightstreamError where the
    interpreter fails, with the last line that it printed.
    """
    k = min(offline.LIST_LENGTH, log.size)
    rows, scores = popular_rows(histories, fallback, k)
    asked = np.flatnonzero(histories.sizes > 0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        users = np.repeat(np.arange(1, len(log.events) + 1), np.diff(log.events.offsets))
        np.savez(folder / "log.npz", user=users, item=log.events.items, role=log.events.roles)
        # Users of whom nothing is known have no items, so those of the others already lie one after another.
        np.savez(
            folder / "queries.npz",
            user=rows_of(user_ids, log.user_ids)[asked],
            items=histories.items,
            offsets=np.concatenate([[0], histories.offsets[1:][asked]]),
        )
        (folder / "about.json").write_text(json.dumps({"size": log.size, "users": len(log.events), "length": k}))
        done = subprocess.run(
            [python, str(SCRIPT), str(folder), MODELS[name], str(seed)],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        if done.returncode:
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise NightstreamError(f"--recbole {python}: {MODELS[name]} could not be trained: {last}")
        with np.load(folder / "lists.npz") as lists:
            rows[asked], scores[asked] = lists["rows"], lists["scores"]
    return rows, scores
