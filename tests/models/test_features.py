from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from nightstream.errors import ArtifactError
from nightstream.models.features import (
    CLIP,
    MAX_VALUES,
    Attributes,
    FeatureStatistics,
    Scale,
    transform_items,
    transform_users,
    words_of,
)
from nightstream.runtime.settings import FeatureSettings
from nightstream.store.tables import EVENTS, ITEMS, USERS
from nightstream.training.feature_statistics import fit

SETTINGS = FeatureSettings(max_words=100, max_tokens=3, max_category_values=2)
CATALOGUE = [
    ("1", "Toy Story", "toy STORY one", {"genre": ["a", "b"]}, {"price": 1.0}, True),
    ("2", "B", "toy story", {"genre": ["a"]}, {"price": 3.0}, True),
    ("3", "Only title", None, {"genre": ["b", "c"]}, {}, True),
    ("4", None, "toy", {}, {"price": 2.0}, True),
]


@pytest.fixture(scope="module")
def statistics(spark) -> FeatureStatistics:
    items = spark.createDataFrame(CATALOGUE, ITEMS.schema)
    users = spark.createDataFrame([("u", {"sex": ["m"]}, {"age": 10.0}), ("v", {}, {})], USERS.schema)
    events = [(None, "u", "1", "view", None, float(v), None, None, None, None) for v in (1, 2, 3)]
    return fit(items, users, spark.createDataFrame(events, EVENTS.schema), ("view", "buy"), SETTINGS)


def arrow(rows, spec) -> pa.Table:
    kinds = {
        "categories": pa.map_(pa.string(), pa.list_(pa.string())),
        "numbers": pa.map_(pa.string(), pa.float64()),
        "available": pa.bool_(),
    }
    columns = dict(zip(spec.schema.names, zip(*rows, strict=True), strict=True))
    return pa.table(
        {
            name: pa.array(
                [list(v.items()) if isinstance(v, dict) else v for v in values], kinds.get(name, pa.string())
            )
            for name, values in columns.items()
        }
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Toy-Story, (1995)!", ["toy", "story", "1995"]),
        ("ＦＵＬＬ width", ["full", "width"]),
        ("速度与激情 fast9", ["速", "度", "与", "激", "情", "fast9"]),
        ("Äpfel_und", ["äpfel", "und"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_statistics_survive_the_journey(statistics):
    assert FeatureStatistics.from_json(statistics.to_json()) == statistics
    with pytest.raises(ArtifactError):
        FeatureStatistics.from_json("{}")


def test_vocabularies_go_by_frequency_then_value(statistics):
    assert statistics.items.categories == {"genre": ("a", "b")}
    assert statistics.words[:2] == ("toy", "story")
    assert statistics.words[2:] == tuple(sorted(statistics.words[2:]))
    assert statistics.event_types == ("view", "buy")


def test_items_are_scaled_and_indexed(statistics):
    found = transform_items(arrow(CATALOGUE, ITEMS), statistics)
    assert found.numbers.shape == (4, 2)
    np.testing.assert_allclose(found.numbers[:, 0], [-1.2247449, 1.2247449, 0, 0], rtol=1e-5)
    assert found.numbers[:, 1].tolist() == [0, 0, 1, 0]
    (genre,) = found.categories
    assert [[v for v in row if v] for row in genre.tolist()] == [[2, 3], [2], [3, 1], []]
    assert found.category_sizes == (4,)
    assert found.tokens.shape == (4, 3)
    assert found.tokens[1].tolist() == [2, 3, 0]
    assert found.tokens[2].tolist() == [statistics.words.index(w) + 2 for w in ("only", "title")] + [0]
    assert found.vocabulary_size == len(statistics.words) + 2


def test_what_training_never_saw_has_a_place(statistics):
    strange = [("9", None, "zzz toy", {"genre": ["new"], "other": ["x"]}, {"price": 1e3, "weight": 1.0}, True)]
    found = transform_items(arrow(strange, ITEMS), statistics)
    assert found.numbers.tolist() == [[CLIP, 0.0]]
    assert found.categories[0][0, 0] == 1
    assert found.tokens[0].tolist() == [1, 2, 0]
    nothing = arrow([("9", None, None, None, None, None)], ITEMS)
    empty = transform_items(nothing, statistics)
    assert empty.numbers.tolist() == [[0.0, 1.0]]
    assert not empty.categories[0].any()
    assert not empty.tokens.any()


def test_one_row_alone_equals_the_row_among_others(statistics):
    together = transform_items(arrow(CATALOGUE, ITEMS), statistics)
    for n, row in enumerate(CATALOGUE):
        alone = transform_items(arrow([row], ITEMS), statistics)
        np.testing.assert_array_equal(alone.numbers[0], together.numbers[n])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[n])
        np.testing.assert_array_equal(alone.categories[0][0], together.categories[0][n])


def test_users_without_attributes(statistics):
    found = transform_users(arrow([("x", None, None), ("u", {"sex": ["m"]}, {"age": 10.0})], USERS), statistics)
    assert found.numbers.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert found.categories[0][:, 0].tolist() == [0, 2]


def test_event_values_are_standardised(statistics):
    scaled = statistics.scale_values(pa.array([1.0, 2.0, None], pa.float64()))
    np.testing.assert_allclose(scaled, [-1.2247449, 0, 0], rtol=1e-5)


def test_a_number_that_stands_for_none_is_none(spark, caplog):
    signs = [-1.797e308, 1.7e308, -1e155, 3.4e38, -9.2e18, -2147483648.0, 2147483647.0, -1e7]
    rows = [(f"u{n}", {}, {name: float(20 + n % 40) for name in ("age", *map(str, signs))}) for n in range(80)]
    rows.append(("v", {}, {str(sign): sign for sign in signs}))
    nothing = [spark.createDataFrame([], s.schema) for s in (ITEMS, EVENTS)]
    fitted = fit(nothing[0], spark.createDataFrame(rows, USERS.schema), nothing[1], ("view",), SETTINGS)
    statistics = FeatureStatistics.from_json(fitted.to_json())
    scales = statistics.users.numbers
    numbers = transform_users(arrow(rows, USERS), statistics).numbers
    scaled, are_missing = (dict(zip(scales, columns.T, strict=True)) for columns in np.split(numbers, 2, axis=1))
    for name in map(str, signs):
        assert f"{name}: 1 of 81 values are left out" in caplog.text
        assert scales[name].deviation == pytest.approx(scales["age"].deviation)
        np.testing.assert_allclose(scaled[name], scaled["age"], rtol=1e-6)
        assert are_missing[name].tolist() == are_missing["age"].tolist() == [0] * 80 + [1]


def test_what_is_far_from_the_others_is_a_value_all_the_same(spark, caplog):
    views = [0.0] * 60 + [float(10**n) for n in range(7)]
    rows = [(f"i{n}", None, None, {}, {"views": x, "price": 0.01 * 4 ** (n % 12)}, True) for n, x in enumerate(views)]
    nothing = [spark.createDataFrame([], s.schema) for s in (USERS, EVENTS)]
    scale = fit(spark.createDataFrame(rows, ITEMS.schema), *nothing, ("view",), SETTINGS).items.numbers
    assert not caplog.text
    assert not np.isnan(scale["views"].usable(np.array(views))).any()
    assert scale["views"].logarithmic


def test_an_attribute_of_nothing_but_signs_for_none_is_none(spark, caplog):
    rows = [(f"u{n}", {}, {"age": -1.8e308, "income": 1.0}) for n in range(5)]
    nothing = [spark.createDataFrame([], s.schema) for s in (ITEMS, EVENTS)]
    found = fit(nothing[0], spark.createDataFrame(rows, USERS.schema), nothing[1], ("view",), SETTINGS)
    assert list(found.users.numbers) == ["income"]
    assert "age: 5 of 5 values are left out" in caplog.text


def test_nothing_to_learn_from(spark):
    empty = [spark.createDataFrame([], s.schema) for s in (ITEMS, USERS, EVENTS)]
    found = fit(*empty, ("view",), SETTINGS)
    blank = transform_items(arrow(CATALOGUE, ITEMS), found)
    assert not blank.has_content
    assert np.isfinite(found.scale_values(pa.array([5.0]))).all()


def test_a_skewed_number_is_scaled_by_its_logarithm():
    found = Scale(mean=np.log1p(9.0), deviation=2.0, logarithmic=True).apply(np.array([9.0, 0.0, -3.0, np.nan]))
    np.testing.assert_allclose(found, [0, -np.log1p(9.0) / 2, -np.log1p(9.0) / 2, 0], rtol=1e-6)
    assert found.dtype == np.float32


def test_a_number_is_clipped_on_both_sides():
    found = Scale(mean=1.0, deviation=0.5).apply(np.array([1e9, -1e9, 3.25, 3.75, -1.25]))
    assert found.tolist() == [CLIP, -CLIP, 4.5, CLIP, -4.5]


def test_of_many_values_the_first_stay_and_of_an_empty_text_the_title():
    values = tuple(f"v{n}" for n in range(MAX_VALUES + 3))
    known = FeatureStatistics(
        event_types=("view",),
        value=Scale(mean=0.0, deviation=1.0),
        items=Attributes(numbers={}, categories={"genre": values, "maker": ("m",)}),
        users=Attributes(numbers={}, categories={}),
        words=("a", "b"),
        max_tokens=2,
    )
    rows = [("1", "b", "", {"genre": list(values)}, {}, True), ("2", "b", "a", {"maker": ["m"]}, {}, True)]
    found = transform_items(arrow(rows, ITEMS), known)
    genre, maker = found.categories
    assert genre.tolist() == [list(range(2, MAX_VALUES + 2)), [0] * MAX_VALUES]
    assert maker[:, 0].tolist() == [0, 2]
    assert found.category_sizes == (len(values) + 2, 3)
    assert found.tokens.tolist() == [[3, 0], [2, 0]]
    assert found.vocabulary_size == 4
    assert found.numbers.shape == (2, 0)
