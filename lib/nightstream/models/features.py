"""Normalisation whose statistics travel with the model, so that serving reads content exactly as training did.

Pure numpy and pyarrow, because it runs in Spark's Python workers; the statistics come from
training.feature_statistics.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from nightstream.errors import ArtifactError
from nightstream.models.arrays import ItemFeatures, UserFeatures

FIRST_INDEX = 2  # 0 is padding, 1 is out-of-vocabulary
MAX_VALUES = 8  # values that one attribute of one item or user may have at once
CLIP = 5.0  # standard deviations

# A run of word characters; CJK characters stand for themselves, because no space parts their words.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


class Scale(BaseModel):
    """A number's normalisation: (x - mean) / deviation, of log1p(x) where `logarithmic`.

    low, high: what lies outside of them is no value but a sign for none, such as -1.8e308; None for no bound.
    """

    model_config = ConfigDict(frozen=True)

    mean: float
    deviation: float
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None

    def usable(self, values: np.ndarray) -> np.ndarray:
        """The values, NaN in place of those out of bounds."""
        low, high = (-np.inf if self.low is None else self.low), (np.inf if self.high is None else self.high)
        return np.where((values >= low) & (values <= high), values, np.nan)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """float64 with NaN for missing -> float32, 0 for missing, clipped to CLIP deviations."""
        if self.logarithmic:
            values = np.log1p(np.maximum(values, 0.0))
        scaled = (values - self.mean) / self.deviation
        return np.nan_to_num(np.clip(scaled, -CLIP, CLIP), nan=0.0).astype(np.float32)


class Attributes(BaseModel):
    """Numbers by name, and the kept values of each category in the order of their indices (from FIRST_INDEX)."""

    model_config = ConfigDict(frozen=True)

    numbers: dict[str, Scale]
    categories: dict[str, tuple[str, ...]]

    @cached_property
    def places(self) -> dict[str, dict[str, int]]:
        return {c: {v: n for n, v in enumerate(values, FIRST_INDEX)} for c, values in self.categories.items()}


class FeatureStatistics(BaseModel):
    """All that normalisation needs to know; see training.feature_statistics.fit."""

    model_config = ConfigDict(frozen=True)

    event_types: tuple[str, ...]
    value: Scale
    items: Attributes
    users: Attributes
    words: tuple[str, ...]
    max_tokens: int

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> FeatureStatistics:
        """Raises ArtifactError for anything but the output of to_json."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError("the model's feature statistics cannot be read; publish another version") from error

    @cached_property
    def word_places(self) -> dict[str, int]:
        return {w: n for n, w in enumerate(self.words, FIRST_INDEX)}

    def scale_values(self, values: pa.Array) -> np.ndarray:
        """Event values -> float32, 0 where absent."""
        return self.value.apply(np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan)))


def words_of(text: str) -> list[str]:
    """Words in order, after NFKC and lower-casing; each CJK character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def transform_items(rows: pa.Table, statistics: FeatureStatistics) -> ItemFeatures:
    """Rows with title, text, categories and numbers -> ItemFeatures of the same M items."""
    text = zip(rows["title"].to_pylist(), rows["text"].to_pylist(), strict=True)
    numbers, categories, sizes = _attributes(rows, statistics.items)
    length = statistics.max_tokens if statistics.words else 0
    tokens = np.zeros((rows.num_rows, length), np.int32)
    for row, (title, body) in enumerate(text):
        places = [statistics.word_places.get(w, 1) for w in words_of(body or title or "")[:length]]
        tokens[row, : len(places)] = places
    return ItemFeatures(numbers, categories, sizes, tokens, len(statistics.words) + FIRST_INDEX)


def transform_users(rows: pa.Table, statistics: FeatureStatistics) -> UserFeatures:
    """Rows with categories and numbers (null for a user without attributes) -> UserFeatures of the same B users."""
    return UserFeatures(*_attributes(rows, statistics.users))


def _attributes(rows: pa.Table, known: Attributes) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[int, ...]]:
    count = rows.num_rows
    number_maps = [dict(m or ()) for m in rows["numbers"].to_pylist()] if known.numbers else []
    columns, missing = [], []
    for name, scale in known.numbers.items():
        raw = scale.usable(np.array([m.get(name, np.nan) for m in number_maps], np.float64))
        columns.append(scale.apply(raw))
        missing.append(np.isnan(raw).astype(np.float32))
    numbers = np.stack(columns + missing, 1) if columns else np.zeros((count, 0), np.float32)
    category_maps = [dict(m or ()) for m in rows["categories"].to_pylist()] if known.categories else []
    categories = []
    for name in known.categories:
        places = known.places[name]
        values = [[places.get(v, 1) for v in (m.get(name) or ())[:MAX_VALUES]] for m in category_maps]
        table = np.zeros((count, MAX_VALUES), np.int32)
        for row, indices in enumerate(values):
            table[row, : len(indices)] = indices
        categories.append(table)
    sizes = tuple(len(values) + FIRST_INDEX for values in known.categories.values())
    return numbers, tuple(categories), sizes
