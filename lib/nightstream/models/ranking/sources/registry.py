"""The sources that a new model is trained with. A new source is one file, and one line here."""

from __future__ import annotations

from nightstream.models.ranking.sources.base import CandidateSource
from nightstream.models.ranking.sources.neighbours import Covisitation, ItemKnn
from nightstream.models.ranking.sources.segments import Segments
from nightstream.models.ranking.sources.shares import Popularity, Trend

# A model keeps the sources that it was trained with, in the order that they had then, which is that of its ranker's
# columns. So one that was trained before a source came still reads and ranks.
SOURCES: dict[str, type[CandidateSource]] = {
    "covisitation": Covisitation,
    "knn": ItemKnn,
    "popularity": Popularity,
    "trend": Trend,
    "segments": Segments,
}
