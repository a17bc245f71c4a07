"""Why an item is in a list: the source that moved its score most, and the window item that the source went by."""

from __future__ import annotations

import numpy as np

STRATEGIES = ("sequence", "covisitation", "content", "popular", "trending", "segment_popular")

_SENTENCES = {
    "sequence": ("Goes with “{title}” and what you turned to lately", "Fits what you turned to lately"),
    "covisitation": ("Often taken together with “{title}”", "Often taken together with your latest items"),
    "content": ("New, and similar to “{title}”", "New, and similar to your latest items"),
    "popular": ("Popular with everyone", "Popular with everyone"),
    "trending": ("Much in demand at the moment", "Much in demand at the moment"),
    "segment_popular": ("Popular with people like you", "Popular with people like you"),
}


def reason_text(strategy: str, title: str = "") -> str:
    """One sentence for a reader. title: of the window item that the reason names, empty where there is none.

    ValueError for a name that is not in STRATEGIES.
    """
    if strategy not in _SENTENCES:
        raise ValueError(f"unknown strategy {strategy!r}; known are {', '.join(STRATEGIES)}")
    named, bare = _SENTENCES[strategy]
    return named.format(title=title) if title else bare


def strongest_group(contributions: np.ndarray, groups: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """int64 [N]: the strategy whose features added most to a score.

    contributions: float32 [N, F], what each feature added. groups: int [F], index into STRATEGIES, −1 for features
    that are nobody's reason. allowed: bool [N, len(STRATEGIES)]: a strategy that does not know the item is no reason.
    """
    totals = np.full((len(contributions), len(STRATEGIES)), -np.inf, np.float64)
    for strategy in range(len(STRATEGIES)):
        columns = groups == strategy
        if columns.any():
            totals[:, strategy] = contributions[:, columns].sum(1)
    return np.asarray(np.where(allowed, totals, -np.inf).argmax(1))


def strongest_event(weights: np.ndarray) -> np.ndarray:
    """int64 [N]: the place in the window whose event weighs most, the newest of equals; −1 where none weighs anything.

    weights: float32 [N, L], what each window event adds to an item's score.
    """
    length = weights.shape[1]
    if not length:
        return np.full(len(weights), -1)
    newest_first = weights[:, ::-1]
    place = length - 1 - newest_first.argmax(1)
    return np.where(weights.max(1) > 0, place, -1)
