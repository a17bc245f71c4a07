"""Lists of one of RecBole's sequential models, for the interpreter of an environment that has RecBole.

    PYTHON recbole_lists.py FOLDER MODEL SEED

Reads from FOLDER, all items as 1-based catalogue rows (0 would be padding) and users as numbers from 1:
    log.parquet        user, item, role (0 to 2, 2 = validation); each user's events together and in their order
    queries.parquet    user, items (the known ones, oldest first, which are also those not to recommend)
    about.json         size (items), users, length (of a list)
and writes FOLDER/lists.parquet, one row per query: rows and scores, best first.
The network is RecBole's; the loop around it is plain, since RecBole's own data sets keep times as float32, and its
trainer runs with autograd's anomaly mode on.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model

VALID = 2
WINDOWS = {"GRU4Rec": 50, "Caser": 5, "SASRec": 20}
BATCH = 2048
BLOCK = 256
LEARNING_RATE = 1e-3
EPOCHS = 100
PATIENCE = 5


class Counts:
    """What the models ask a RecBole data set for."""

    def __init__(self, users: int, items: int) -> None:
        self.user_num, self.item_num = users + 1, items + 1

    def num(self, name: str) -> int:
        return self.user_num if name == "user_id" else self.item_num


def network(name: str, users: int, items: int, seed: int) -> Any:
    """The model with RecBole's defaults, cross-entropy, and the window of WINDOWS."""
    options = {
        "MAX_ITEM_LIST_LENGTH": WINDOWS[name],
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "use_gpu": False,
        "seed": seed,
    }
    config = Config(model=name, dataset="none", config_dict=options)
    torch.manual_seed(seed)
    return get_model(name)(config, Counts(users, items))


def samples(log: pd.DataFrame, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows int64 [E, window] before each event of the log, padded behind as RecBole wants it, and their lengths."""
    items = log["item"].to_numpy(np.int64)
    place = log.groupby("user", sort=False).cumcount().to_numpy()
    sizes = np.minimum(place, window)
    index = np.arange(len(items))[:, None] - sizes[:, None] + np.arange(window)
    held = np.arange(window) < sizes[:, None]
    return np.where(held, items[np.where(held, index, 0)], 0), sizes


def batch(user: np.ndarray, window: np.ndarray, size: np.ndarray, item: np.ndarray | None = None) -> Interaction:
    columns = {"user_id": user, "item_id_list": window, "item_length": np.maximum(size, 1)}
    if item is not None:
        columns["item_id"] = item
    return Interaction({name: torch.from_numpy(np.ascontiguousarray(c, np.int64)) for name, c in columns.items()})


def score(model: Any, user: np.ndarray, window: np.ndarray, size: np.ndarray) -> np.ndarray:
    """float32 [B, items]."""
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(user), BLOCK):
            rows = slice(start, start + BLOCK)
            parts.append(model.full_sort_predict(batch(user[rows], window[rows], size[rows]))[:, 1:].numpy())
    return np.concatenate(parts)


def validation(model: Any, log: pd.DataFrame, window: np.ndarray, size: np.ndarray, rows: np.ndarray) -> float:
    """NDCG@10 of the events at these places of the log, the user's earlier items taken out."""
    users, items = log["user"].to_numpy(), log["item"].to_numpy(np.int64)
    first = np.searchsorted(users, users, side="left")
    gains = 0.0
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        scores = score(model, users[part], window[part], size[part])
        for found, row in zip(scores, part, strict=True):
            own = found[items[row] - 1]
            found[items[first[row] : row] - 1] = -np.inf
            rank = 1 + int((found > own).sum())
            gains += 1 / np.log2(1 + rank) if rank <= 10 else 0.0
    return gains / max(len(rows), 1)


def train(name: str, log: pd.DataFrame, about: dict[str, int], seed: int, epochs: int | None) -> tuple[Any, int]:
    """The model, and its epochs: the given ones over all events, else early stopping on those of validation."""
    model = network(name, about["users"], about["size"], seed)
    window, size = samples(log, WINDOWS[name])
    roles, users, items = log["role"].to_numpy(), log["user"].to_numpy(), log["item"].to_numpy(np.int64)
    targets = np.flatnonzero((size > 0) & ((roles != VALID) | (epochs is not None)))
    valid = np.flatnonzero((size > 0) & (roles == VALID))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    rng = np.random.default_rng(seed)
    best, kept, best_epoch = -1.0, model.state_dict(), 0
    for epoch in range(1, (epochs or EPOCHS) + 1):
        model.train()
        order = rng.permutation(targets)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            optimizer.zero_grad()
            model.calculate_loss(batch(users[part], window[part], size[part], items[part])).backward()
            optimizer.step()
        if epochs is not None:
            continue
        reached = validation(model, log, window, size, valid)
        if reached > best:
            best, kept, best_epoch = reached, copy.deepcopy(model.state_dict()), epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    if epochs is None:
        model.load_state_dict(kept)
        print(f"{name}: validation NDCG@10 {best:.4f} after {best_epoch} epochs", file=sys.stderr, flush=True)
    return model, epochs or best_epoch


def lists(model: Any, name: str, queries: pd.DataFrame, length: int) -> pd.DataFrame:
    """rows and scores of each query."""
    window, size = np.zeros((len(queries), WINDOWS[name]), np.int64), np.zeros(len(queries), np.int64)
    for row, items in enumerate(queries["items"]):
        size[row] = min(len(items), WINDOWS[name])
        window[row, : size[row]] = items[len(items) - size[row] :]
    users, out = queries["user"].to_numpy(), []
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        found = score(model, users[block], window[block], size[block])
        for scores, items in zip(found, queries["items"][block], strict=True):
            scores[items - 1] = -np.inf
            best = np.argsort(-scores, kind="stable")[:length]
            best = best[~np.isneginf(scores[best])]
            out.append((best + 1, scores[best]))
    return pd.DataFrame(out, columns=["rows", "scores"])


def main() -> None:
    folder, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # RecBole reads the command line by itself.
    sys.argv = sys.argv[:1]
    about = json.loads((folder / "about.json").read_text())
    log, queries = pd.read_parquet(folder / "log.parquet"), pd.read_parquet(folder / "queries.parquet")
    _, epochs = train(name, log, about, seed, None)
    model, _ = train(name, log, about, seed, epochs)
    lists(model, name, queries, about["length"]).to_parquet(folder / "lists.parquet")


if __name__ == "__main__":
    main()
