"""Settings reach the learner: each of them, and nothing else changes."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from nightstream.errors import SettingsError
from nightstream.models.ranking.ranker import RankerSizes
from nightstream.models.ranking.sources.base import SourceSizes
from nightstream.runtime import settings
from nightstream.training.spark_job import learn_spec

BASE = Path(__file__).parents[2] / "conf" / "base.yaml"
SECTIONS = {"retrieval": ("sources", SourceSizes), "ranking": ("ranker", RankerSizes)}
KEYS = [(section, field.name) for section, (_, sizes) in SECTIONS.items() for field in fields(sizes)]


def test_the_values_in_base_are_those_that_the_library_takes_by_itself() -> None:
    spec = learn_spec(settings.load([BASE]))
    assert (spec.sources, spec.ranker) == (SourceSizes(), RankerSizes())


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_each_size_reaches_the_learner_under_its_name(section: str, key: str) -> None:
    part, _ = SECTIONS[section]
    plain = asdict(learn_spec(settings.load([BASE])))
    value = 12 if isinstance(plain[part][key], int) else 1.0
    changed = asdict(learn_spec(settings.load([BASE], [f"{section}.{key}={value}"])))
    assert changed[part].pop(key) == value
    plain[part].pop(key)
    assert changed == plain


def test_auto_is_derived_and_a_number_is_not() -> None:
    loaded = settings.load([BASE], ["retrieval.half_life_days=30", "retrieval.trend_half_life_days=auto"])
    spec = learn_spec(loaded)
    assert (spec.sources.half_life_days, spec.sources.trend_half_life_days) == (30.0, None)


def test_an_encoder_that_nobody_registered_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"training\.encoders: lstm not known; choose among gru, cnn, transformer"):
        learn_spec(settings.load([BASE], ["training.encoders=[gru, lstm]"]))
