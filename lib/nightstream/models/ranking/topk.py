"""Cosine similarity, and the exact choice of the highest scores.

The cosine of x and y is x·y / (|x| |y|): for (1, 2, 3) and (4, 5, 6) it is 32 / √(14 · 77) = 0.9746.
(The article that this project follows prints 0.732 for these two vectors, which is a slip.)
"""

from __future__ import annotations

import numpy as np
import torch

# Floating-point sums depend on the shape of an operation, so users are computed in blocks of one shape.
BLOCK = 64
_CHUNK = 16


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [..., D] scaled to length 1; a zero vector stays zero, so that it is equally far from everything."""
    vectors = np.asarray(vectors, np.float32)
    length = np.sqrt((vectors * vectors).sum(-1, keepdims=True))
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 [A, B]: the cosine of each row of a [A, D] with each row of b [B, D]; 0 where either is all zero."""
    return np.asarray(unit(np.atleast_2d(a)) @ unit(np.atleast_2d(b)).T)


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 [B, min(k, M)]: columns of the k highest scores [B, M], best first; of equals the lower column first."""
    k = min(k, scores.shape[1])
    if k == scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    if k == 0:
        return np.zeros((len(scores), 0), np.int64)
    cut = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
    above = scores > cut
    # argpartition picks among equals as it likes; the k-th score is unambiguous, so ties are filled up by column.
    tie = scores == cut
    room = k - above.sum(1, keepdims=True)
    above |= tie & (np.cumsum(tie, axis=1, dtype=np.int32) <= room)
    columns = np.nonzero(above)[1].reshape(len(scores), k)
    order = np.argsort(-np.take_along_axis(scores, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def best_unordered(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 [B, k]: columns of the k highest scores [B, M], in any order; of equals some, the same ones for equal rows.

    The highest scores lie in the k chunks of highest maxima, so most scores are looked at by that maximum alone.
    """
    values = torch.from_numpy(scores)
    chunks = scores.shape[1] // _CHUNK
    if chunks <= k:
        # Where many are equal, as −inf is, numpy's partition is fifty times slower.
        return values.topk(k, dim=1, sorted=False).indices.numpy()
    inside = chunks * _CHUNK
    # Chunk c is the columns c, c + chunks, c + 2 · chunks …: maxima of whole runs are found fastest.
    highest = values[:, :inside].unflatten(1, (_CHUNK, chunks)).amax(1)
    chosen = highest.topk(k, dim=1, sorted=False).indices
    columns = (chosen.unsqueeze(2) + chunks * torch.arange(_CHUNK)).flatten(1)
    rest = torch.arange(inside, scores.shape[1]).expand(len(scores), -1)
    columns = torch.cat([columns, rest], 1)
    best = values.gather(1, columns).topk(k, dim=1, sorted=False).indices
    return columns.gather(1, best).numpy()


def exclude(scores: np.ndarray, rows: np.ndarray, offsets: np.ndarray) -> None:
    """Sets scores [B, M] to −inf at 1-based rows[offsets[b]:offsets[b + 1]] of each b in place; row 0 is skipped."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    known = (rows > 0) & (rows <= scores.shape[1])
    scores[users[known], rows[known] - 1] = -np.inf
