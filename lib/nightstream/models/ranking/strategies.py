"""The strategies that put an item into a list, and the sentence that each of them says to a reader."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import overload

from nightstream.models.ranking.sources.base import CandidateSource, Strategy
from nightstream.models.ranking.sources.registry import SOURCES

SEQUENCE = Strategy("sequence", "Goes with “{title}” and what you turned to lately", "Fits what you turned to lately")
CONTENT = Strategy("content", "New, and similar to “{title}”", "New, and similar to your latest items")


def known_strategies() -> dict[str, Strategy]:
    """By name: the two of the encoders, then those of the registered sources in the registry's order."""
    return _strategies(tuple(SOURCES.values()))


@lru_cache(maxsize=1)
def _strategies(sources: tuple[type[CandidateSource], ...]) -> dict[str, Strategy]:
    # Kept, because every entry of every list asks for its sentence.
    return {s.name: s for s in (SEQUENCE, CONTENT, *(source.strategy for source in sources))}


class _Names(Sequence[str]):
    """The names of known_strategies: it grows with the registry."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return list(known_strategies())[index]

    def __len__(self) -> int:
        return len(known_strategies())


# What Lists.strategies is an index into.
STRATEGIES: Sequence[str] = _Names()


def reason_text(strategy: str, title: str = "") -> str:
    """One sentence for a reader. title: of the window item that the reason names, empty where there is none.

    ValueError for a name that is not in STRATEGIES.
    """
    known = known_strategies()
    if strategy not in known:
        raise ValueError(f"unknown strategy {strategy!r}; known are {', '.join(known)}")
    return known[strategy].named.format(title=title) if title else known[strategy].bare
