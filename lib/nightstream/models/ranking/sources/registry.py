"""The sources that a new model is trained with. A new source is one file, and one line here."""

from __future__ import annotations

from nightstream.models.ranking.sources.base import CandidateSource
from nightstream.models.ranking.sources.neighbours import Covisitation, ItemKnn
from nightstream.models.ranking.sources.segments import Segments
from nightstream.models.ranking.sources.shares import Popularity, Trend

# The order is that of the ranker's columns: a new source goes to the end. A model keeps the sources that it was trained
# with, so one that was trained before a source came still reads and ranks.
SOURCES: dict[str, type[CandidateSource]] = {
    "covisitation": Covisitation,
    "knn": ItemKnn,
    "popularity": Popularity,
    "trend": Trend,
    "segments": Segments,
}
