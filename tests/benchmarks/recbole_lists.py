"""Lists of one of RecBole's sequential models, for the interpreter of an environment that has RecBole.

    PYTHON recbole_lists.py FOLDER MODEL SEED

Reads from FOLDER, all items as 1-based catalogue rows (0 would be padding) and users as numbers from 1:
    log.npz        user, item, role [events] (0 to 2, 2 = validation); a user's events together and in their order
    queries.npz    user [queries], items, offsets [queries + 1]: query q knows items[offsets[q]:offsets[q + 1]], oldest
                   first, and wants none of them
    about.json     size (items), users, length (of a list)
and writes FOLDER/lists.npz: rows and scores [queries, length], best first, rows 0 behind the last one.
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
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model

Arrays = dict[str, np.ndarray]

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


def samples(log: Arrays, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows int64 [E, window] before each event of the log, padded behind as RecBole wants it, and their lengths."""
    items = log["item"]
    place = np.arange(len(items)) - np.searchsorted(log["user"], log["user"], side="left")
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


def validation(model: Any, log: Arrays, window: np.ndarray, size: np.ndarray, rows: np.ndarray) -> float:
    """NDCG@10 of the events at these places of the log, the user's earlier items taken out."""
    users, items = log["user"], log["item"]
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


def train(name: str, log: Arrays, about: dict[str, int], seed: int, epochs: int | None) -> tuple[Any, int]:
    """The model, and its epochs: the given ones over all events, else early stopping on those of validation."""
    model = network(name, about["users"], about["size"], seed)
    window, size = samples(log, WINDOWS[name])
    roles, users, items = log["role"], log["user"], log["item"]
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


def lists(model: Any, name: str, queries: Arrays, length: int) -> tuple[np.ndarray, np.ndarray]:
    """rows int64 and scores float32, [queries, length] each."""
    users, offsets = queries["user"], queries["offsets"]
    known = np.split(queries["items"], offsets[1:-1])
    size = np.minimum(np.diff(offsets), WINDOWS[name])
    window = np.zeros((len(users), WINDOWS[name]), np.int64)
    for row, items in enumerate(known):
        window[row, : size[row]] = items[len(items) - size[row] :]
    rows, scores = np.zeros((len(users), length), np.int64), np.zeros((len(users), length), np.float32)
    for start in range(0, len(users), BLOCK):
        block = slice(start, start + BLOCK)
        for row, found in enumerate(score(model, users[block], window[block], size[block]), start):
            found[known[row] - 1] = -np.inf
            best = np.argsort(-found, kind="stable")[:length]
            best = best[~np.isneginf(found[best])]
            rows[row, : len(best)], scores[row, : len(best)] = best + 1, found[best]
    return rows, scores


def read(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: np.asarray(file[name], np.int64) for name in file.files}


def main() -> None:
    folder, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # RecBole reads the command line by itself.
    sys.argv = sys.argv[:1]
    about = json.loads((folder / "about.json").read_text())
    log, queries = read(folder / "log.npz"), read(folder / "queries.npz")
    _, epochs = train(name, log, about, seed, None)
    model, _ = train(name, log, about, seed, epochs)
    rows, scores = lists(model, name, queries, about["length"])
    np.savez(folder / "lists.npz", rows=rows, scores=scores)


if __name__ == "__main__":
    main()
