"""The refresher around a model that lists the first unseen items: what it reads, and what it makes of the answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from nightstream.models.arrays import Catalogue, Lists, Windows
from nightstream.models.bundle import Loaded
from nightstream.models.features import Attributes, FeatureStatistics, Scale
from nightstream.models.ranking.strategies import STRATEGIES
from nightstream.serving.refresh import NO_EVENTS, NOBODY, Refresher, unfolded, unfolded_rows
from nightstream.serving.user_state import STATES, FoldRules, states_of

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LENGTH, TOP_K = 3, 2
ITEMS = ["a", "b", "c", "d", "e"]
SIDES = Attributes(numbers={}, categories={"side": ("left", "right")})
NOTHING = Attributes(numbers={}, categories={})
USERS = pa.schema(
    {
        "user_id": pa.string(),
        "categories": pa.map_(pa.string(), pa.list_(pa.string())),
        "numbers": pa.map_(pa.string(), pa.float64()),
    }
)
OVERFLOW = pa.schema({"user_id": pa.string(), "item_id": pa.string()})


class FirstUnseen:
    """Lists the first unseen items of the catalogue, because of the newest item in the window. Keeps what it reads."""

    window_length = LENGTH
    event_types = ("view", "buy")
    windows: Windows

    def recommend(self, windows: Windows, catalogue: Catalogue, top_k: int, threads: int) -> Lists:
        self.windows = windows
        rows = np.zeros((len(windows), top_k), np.int32)
        for user in range(len(windows)):
            seen = windows.seen[windows.seen_offsets[user] : windows.seen_offsets[user + 1]]
            unseen = [r for r in range(1, len(catalogue) + 1) if r not in seen][:top_k]
            rows[user, : len(unseen)] = unseen
        scores = np.where(rows, 1 / np.arange(1, top_k + 1), 0).astype(np.float32)
        because = np.where(rows, windows.items[:, -1:], 0)
        vectors = np.arange(2 * len(windows), dtype=np.float32).reshape(-1, 2)
        return Lists(rows, scores, np.zeros_like(rows), because, vectors)


def refresher(model: FirstUnseen, seen_limit: int = 3) -> Refresher:
    statistics = FeatureStatistics(
        event_types=model.event_types,
        value=Scale(mean=1.0, deviation=2.0),
        items=NOTHING,
        users=SIDES,
        words=(),
        max_tokens=0,
    )
    titles = [i.upper() for i in ITEMS]
    catalogue = Catalogue(ITEMS, np.ones((len(ITEMS), 2), np.float32), np.ones(len(ITEMS), bool), titles)
    loaded = Loaded(model, statistics, catalogue, pa.array(ITEMS))
    bundle: Any = SimpleNamespace(model_version="m1", catalogue_version="c1", load=lambda: loaded)
    return Refresher(bundle, FoldRules(LENGTH, seen_limit, model.event_types), TOP_K)


def at(second: int) -> datetime:
    return EPOCH + timedelta(seconds=second)


def events(*rows: tuple[str, str, str, int, float | None]) -> pa.Table:
    """EVENTS rows from user, item, type, second and value."""
    entries = [
        {
            "event_id": f"e{n}",
            "user_id": user,
            "item_id": item,
            "event_type": kind,
            "event_time": at(second),
            "value": value,
            "content_hash": "h",
        }
        for n, (user, item, kind, second, value) in enumerate(rows)
    ]
    return pa.Table.from_pylist(entries, schema=NO_EVENTS.schema)


def states(*rows: tuple[str, int, bool]) -> pa.Table:
    """Empty states from user, revision and whether seen has overflowed."""
    names = ("user_id", "revision", "seen_overflowed")
    entries = [{**dict(zip(names, row, strict=True)), "window": [], "seen": []} for row in rows]
    return pa.Table.from_pylist(entries, schema=STATES)


def test_windows_are_padded_on_the_left_and_know_no_foreign_item_or_type() -> None:
    model = FirstUnseen()
    arriving = events(
        *[("u", item, "view", second, 1.0) for second, item in enumerate("abc")],
        ("u", "strange", "buy", 3, 5.0),
        ("v", "d", "buy", 7, None),
    )
    users = pa.Table.from_pylist([{"user_id": "v", "categories": [("side", ["right"])], "numbers": []}], schema=USERS)
    refresher(model)(states(("w", 0, False)), arriving, users, None)
    epoch = round(EPOCH.timestamp() * 1e6)
    assert model.windows.items.tolist() == [[2, 3, 0], [0, 0, 4], [0, 0, 0]]
    assert model.windows.types.tolist() == [[1, 1, 2], [0, 0, 2], [0, 0, 0]]
    assert (model.windows.times - np.where(model.windows.times, epoch, 0)).tolist() == [
        [1_000_000, 2_000_000, 3_000_000],
        [0, 0, 7_000_000],
        [0, 0, 0],
    ]
    assert model.windows.values.tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 0]]
    assert model.windows.users.categories[0][:, 0].tolist() == [0, 3, 0]
    assert model.windows.seen.tolist() == [2, 3, 1, 4]
    assert model.windows.seen_offsets.tolist() == [0, 3, 4, 4]


def test_a_refreshed_row_holds_the_state_the_list_and_the_versions() -> None:
    arriving = events(("u", "b", "view", 4, 1.0), ("u", "d", "view", 9, 1.0))
    found = refresher(FirstUnseen())(states(("u", 7, False), ("w", 3, False)), arriving, USERS.empty_table(), None)
    assert found.schema.names == NOBODY.schema.names
    first, second = found.to_pylist()
    assert (first["user_id"], first["revision"], first["as_of"]) == ("u", 8, at(9))
    assert (first["model_version"], first["catalogue_version"]) == ("m1", "c1")
    assert [e["item_id"] for e in first["window"]] == ["b", "d"]
    sentence = "Goes with “D” and what you turned to lately"
    assert first["items"] == [
        dict(zip(("rank", "item_id", "score", "strategy", "reason", "because_item_id"), entry, strict=True))
        for entry in ((1, "a", 1.0, STRATEGIES[0], sentence, "d"), (2, "c", 0.5, STRATEGIES[0], sentence, "d"))
    ]
    assert (second["user_id"], second["revision"], second["as_of"], second["window"]) == ("w", 4, None, [])
    assert [(e["item_id"], e["because_item_id"]) for e in second["items"]] == [("a", None), ("b", None)]
    assert [first["vector"], second["vector"]] == [[0, 1], [2, 3]]


def test_what_no_longer_fits_into_seen_is_not_recommended_either() -> None:
    """This fold's overflow, and the side table's rows of those users who have overflowed before."""
    arriving = events(*[("u", item, "view", second, None) for second, item in enumerate("abc")])
    side = pa.Table.from_pylist(
        [{"user_id": user, "item_id": item} for user, item in (("w", "a"), ("w", "c"), ("z", "a"), ("other", "b"))],
        schema=OVERFLOW,
    )
    known = states(("w", 1, True), ("z", 1, False))
    found = refresher(FirstUnseen(), seen_limit=1)(known, arriving, USERS.empty_table(), side)
    rows = {r["user_id"]: r for r in found.to_pylist()}
    assert {user: [e["item_id"] for e in row["items"]] for user, row in rows.items()} == {
        "u": ["d", "e"],
        "w": ["b", "d"],
        "z": ["a", "b"],
    }
    assert {user: row["seen_overflowed"] for user, row in rows.items()} == {"u": True, "w": True, "z": False}
    assert [s["item_id"] for s in rows["u"]["seen"]] == ["c"]
    assert [s["item_id"] for s in rows["u"]["overflow"]] == ["a", "b"]


def test_a_list_ends_with_the_last_unseen_item() -> None:
    arriving = events(*[("u", item, "view", second, None) for second, item in enumerate("abcd")])
    (row,) = refresher(FirstUnseen(), seen_limit=9)(
        STATES.empty_table(), arriving, USERS.empty_table(), None
    ).to_pylist()
    assert [(e["rank"], e["item_id"]) for e in row["items"]] == [(1, "e")]


def test_nobody_is_refreshed_where_nothing_came() -> None:
    found = refresher(FirstUnseen())(STATES.empty_table(), NO_EVENTS, USERS.empty_table(), None)
    assert found.equals(NOBODY)


def test_unfolded_states_are_the_same_as_frames_and_as_rows(spark):
    event = {"event_id": "e", "item_id": "a", "event_time": EPOCH}
    rows = [
        {"user_id": "u", "revision": 3, "window": [event], "seen": [event], "seen_overflowed": True},
        {"user_id": "v", "revision": 0, "window": [], "seen": [], "seen_overflowed": False},
    ]
    states = pa.Table.from_pylist(rows, STATES)
    found = unfolded_rows(states)
    assert found.schema == STATES
    assert states_of(unfolded(spark.createDataFrame(states)).toArrow()).to_pylist() == found.to_pylist()
    assert found["revision"].to_pylist() == [3, 0]
    assert [list(map(len, found[name].to_pylist())) for name in ("window", "seen")] == [[0, 0], [0, 0]]
    assert unfolded_rows(states.slice(0, 0)).schema == STATES
