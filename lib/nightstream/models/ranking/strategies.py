"""The strategies that put an item into a list, and the sentence that each of them says to a reader."""

from __future__ import annotations

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
