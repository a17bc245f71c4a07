"""Our top-k and item-kNN beside faiss and implicit: seconds, CPU seconds, ties, and whether a batch's size matters.

Wants two packages that nightstream itself does not need: pip install implicit faiss-cpu. Then, from the repository:

    PYTHONPATH=lib python tests/benchmarks/topk.py --runs 7

All engines get the same arrays, the same number of threads, and take turns within each run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# Before torch and faiss come: threads that spin at barriers disturb whoever's turn it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from nightstream.models.ranking.sources.neighbours import item_knn
from nightstream.models.ranking.topk import best_columns, best_unordered, unit
from scipy import sparse

try:
    import faiss
    from implicit.cpu.topk import topk as implicit_topk
    from implicit.nearest_neighbours import CosineRecommender
except ImportError as missing:
    raise SystemExit(f"{missing}: this comparison needs both packages; pip install implicit faiss-cpu") from missing

ML100K = Path(__file__).parents[2] / "data" / "ml-100k" / "ml-100k.inter"
CANDIDATES, NEIGHBOURS, SHRINK = 60, 200, 10.0
Search = Callable[[np.ndarray], np.ndarray]


def searches(items: np.ndarray, k: int, threads: int) -> dict[str, Search]:
    """By name: users float32 [B, D] to int64 [B, k], columns of the k greatest products with items [M, D]."""
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    table = torch.from_numpy(items).T

    def scores(users: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(users) @ table).numpy()

    return {
        "ours, unordered": lambda users: best_unordered(scores(users), k),
        "ours, ordered, ties to the lower column": lambda users: best_columns(scores(users), k),
        "faiss IndexFlatIP": lambda users: index.search(users, k)[1],
        "implicit topk": lambda users: implicit_topk(items, users, k, num_threads=threads)[0],
    }


def in_blocks(search: Search, users: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([search(users[start : start + size]) for start in range(0, len(users), size)])


def take_turns(engines: dict[str, Callable[[], object]], runs: int) -> None:
    """Prints seconds and CPU seconds of each engine, minimum and median; one untimed run goes before."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for run in range(runs + 1):
        for name, work in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if run:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, pairs in taken.items():
        wall, cpu = zip(*pairs, strict=True)
        print(
            f"  {name:40} {min(wall):7.3f} s ({statistics.median(wall):.3f})"
            f"   CPU {min(cpu):7.3f} s ({statistics.median(cpu):.3f})",
            flush=True,
        )


def compare_topk(count: int, width: int, runs: int, threads: int) -> None:
    rng = np.random.default_rng(0)
    users, items = (unit(rng.normal(size=(count, width)).astype(np.float32)) for _ in range(2))
    engines = searches(items, CANDIDATES, threads)
    for size in (64, 256, 1024):
        print(f"top {CANDIDATES} of {count} items × {width} for {count} users in blocks of {size}: min (median)")
        take_turns({n: lambda s=s, size=size: in_blocks(s, users, size) for n, s in engines.items()}, runs)
    few = users[:256]
    wanted = np.sort(best_columns(few @ items.T, CANDIDATES), 1)
    twins = searches(np.repeat(items[: count // 2], 2, axis=0), CANDIDATES + 1, threads)
    print("the same items as a sort by numpy; of equal items the lower column; alone the same as in a block of 64")
    for name, search in engines.items():
        right = (np.sort(search(few), 1) == wanted).all(1).mean()
        # Items come in equal pairs and an odd number is asked for: the last one must be the first of its pair.
        pairs = np.sort(twins[name](few), 1)
        lower = np.mean([all(c % 2 == 0 or c - 1 in row for c in row) for row in map(set, pairs.tolist())])
        alone = np.concatenate([search(user[None, :]) for user in few])
        same = (np.sort(alone, 1) == np.sort(in_blocks(search, few, 64), 1)).all(1).mean()
        print(f"  {name:40} {right:6.1%} {lower:6.1%} {same:6.1%}")


def compare_knn(runs: int, threads: int) -> None:
    if not ML100K.exists():
        raise SystemExit(f"{ML100K} is missing: make data")
    pairs = np.loadtxt(ML100K, np.int64, skiprows=1, usecols=(0, 1), delimiter="\t")
    order = np.argsort(pairs[:, 0], kind="stable")
    owner, items = pairs[order].T
    owner, rows = owner - 1, int(items.max()) + 1
    used = sparse.csr_matrix((np.ones(len(items), np.float32), (owner, items)))

    def theirs() -> CosineRecommender:
        warnings.filterwarnings("ignore", module="implicit")  # of its own conversion from COO to CSR
        model = CosineRecommender(K=NEIGHBOURS, num_threads=threads)
        model.fit(used, show_progress=False)
        return model

    print(f"item-kNN, {NEIGHBOURS} neighbours, MovieLens-100k ({used.shape[0]} users × {rows - 1} items): min (median)")
    take_turns({"ours": lambda: item_knn(owner, items, rows, NEIGHBOURS, SHRINK), "implicit Cosine": theirs}, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each engine")
    parser.add_argument("--count", type=int, default=20_000, help="users, and items")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    compare_knn(given.runs, given.threads)
    compare_topk(given.count, 64, given.runs, given.threads)


if __name__ == "__main__":
    main()
