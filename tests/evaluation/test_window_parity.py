"""A user's window and seen items just before an event: serving folds them, evaluation slices a history, training
indexes arrays. The three are equal, whatever was repeated, overtaken, retracted or cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learning_data import no_users
from nightstream.evaluation import offline
from nightstream.ingest.history import foldable, live
from nightstream.ingest.resolve import NEW, resolve
from nightstream.models.arrays import Sequences, Windows
from nightstream.models.arrow import combined, rows_of
from nightstream.models.features import Attributes, FeatureStatistics, Scale
from nightstream.serving.refresh import windows_of
from nightstream.serving.user_state import EVENT_COLUMNS, STATES, FoldRules, fold
from nightstream.store.tables import EVENTS, ITEMS, USERS
from nightstream.training import batching, spark_job
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LENGTH, SEEN_LIMIT, IDS = 4, 3, 12
TYPES, OTHER_TYPE, RETRACTION = ("view", "buy"), "impression", "retract"
# The catalogue lacks the last item of the events.
ITEM_IDS, CATALOGUE = [f"i{n}" for n in range(6)], pa.array([f"i{n}" for n in range(5)])
NOTHING = Attributes(numbers={}, categories={})
STATISTICS = FeatureStatistics(
    event_types=TYPES,
    value=Scale(mean=4.0, deviation=2.5),
    items=NOTHING,
    users=NOTHING,
    words=(),
    max_tokens=0,
)
MODEL: Any = SimpleNamespace(
    model=SimpleNamespace(window_length=LENGTH, event_types=TYPES), statistics=STATISTICS, item_ids=CATALOGUE
)


@dataclass(frozen=True)
class History:
    """One user's deliveries. versions: (id, second, content), in order of arrival. subjects: (item, type) of each id;
    an event that changes them is folded again from the table of events. retracted: ids. seed: draws the cut."""

    versions: list[tuple[int, int, int]]
    subjects: list[tuple[str, str]]
    retracted: set[int]
    seed: int

    def rows(self, user: str) -> list[tuple]:
        """EVENTS rows of everything that arrived, retractions included."""
        rows = []
        for place, (number, second, content) in enumerate(self.versions):
            item, kind = self.subjects[number]
            value = None if (number + content) % 4 == 0 else (number + content) / 2
            at = EPOCH + timedelta(seconds=second)
            name = f"{user}-e{number:02}"
            rows.append((name, user, item, kind, at, value, None, f"h{content}", f"{user}-{place:02}", EPOCH))
        for number in sorted(self.retracted):
            name, dead = f"{user}-r{number:02}", f"{user}-e{number:02}"
            rows.append((name, user, None, RETRACTION, EPOCH, None, dead, "h", f"{user}-r{number:02}", EPOCH))
        return rows

    def consumed(self, user: str) -> list[tuple]:
        """The events that count, oldest first: of each id the greatest version, without what was taken back."""
        best: dict[str, tuple] = {}
        for row in self.rows(user):
            if row[3] in TYPES and (row[0] not in best or (row[4], row[7]) > (best[row[0]][4], best[row[0]][7])):
                best[row[0]] = row
        dead = {f"{user}-e{number:02}" for number in self.retracted}
        return sorted((r for r in best.values() if r[0] not in dead), key=lambda r: (r[4], r[0]))

    def cut(self, user: str) -> int | None:
        """How many of the consumed events lie before the target; None for a user who has none."""
        count = len(self.consumed(user))
        return self.seed % count if count else None


# Few ids, items and times, so that repetitions, ties, and windows that are too short are common.
histories = st.builds(
    History,
    st.lists(st.tuples(st.integers(0, IDS - 1), st.integers(0, 6), st.integers(0, 2)), max_size=20),
    st.lists(
        st.tuples(st.sampled_from(ITEM_IDS), st.sampled_from([*TYPES, *TYPES, OTHER_TYPE])), min_size=IDS, max_size=IDS
    ),
    st.sets(st.integers(0, IDS - 1), max_size=3),
    st.integers(0, 1000),
)


def named(found: list[History]) -> dict[str, History]:
    """The histories with something to predict, by user id, ascending."""
    users = {f"u{n:03}": history for n, history in enumerate(found)}
    return {user: history for user, history in users.items() if history.cut(user) is not None}


def arrow(rows: list[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [[] for _ in EVENTS.schema]
    kinds = {
        "event_time": EVENT_COLUMNS["event_time"],
        "arrival_time": EVENT_COLUMNS["event_time"],
        "value": pa.float64(),
    }
    named_columns = zip(EVENTS.schema.names, columns, strict=True)
    return pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in named_columns})


def served(users: dict[str, History], deliveries: pa.Table) -> pa.Table:
    """The states that serving has before each user's target, and older_seen: what no longer fits into their seen.

    deliveries: what history.foldable makes of all rows.
    """
    later = {r[0] for user, history in users.items() for r in history.consumed(user)[history.cut(user) :]}
    rows = [r for r in deliveries.to_pylist() if r["user_id"] in users and r["event_id"] not in later]
    random.Random(len(rows)).shuffle(rows)
    states, older = STATES.empty_table(), {user: set() for user in users}
    rules = FoldRules(LENGTH, SEEN_LIMIT, TYPES)
    for part in range(3):
        state = fold(states, pa.Table.from_pylist(rows[part::3], schema=deliveries.schema), rules)
        for row in state.to_pylist():
            older[row["user_id"]] |= {s["item_id"] for s in row["overflow"]}
        states = state.select(STATES.names)
    # A user of whom nothing has arrived yet has no state.
    missing = sorted(users.keys() - set(states["user_id"].to_pylist()))
    empty = [{"user_id": u, "revision": 0, "window": [], "seen": [], "seen_overflowed": False} for u in missing]
    states = pa.concat_tables([states.cast(STATES), pa.Table.from_pylist(empty, schema=STATES)]).sort_by("user_id")
    return states.append_column(
        "older_seen", pa.array([sorted(older[u]) for u in states["user_id"].to_pylist()], pa.list_(pa.string()))
    )


def arrays_of(states: pa.Table) -> Windows:
    """What the model reads of states."""
    described = states
    for name in ("categories", "numbers"):
        described = described.append_column(name, pa.nulls(len(states)))
    return windows_of(described, MODEL)


def seen_items(windows: Windows) -> list[set[int]]:
    """The catalogue rows that each user may not get."""
    return [set(part.tolist()) - {0} for part in np.split(windows.seen, windows.seen_offsets[1:-1])]


def assert_same_windows(left: Windows, right: Windows) -> None:
    for name in ("items", "types", "times", "values"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert seen_items(left) == seen_items(right)


def before_targets(users: dict[str, History], sequences: Sequences) -> Windows:
    """The windows that training makes before each user's target."""
    cuts = np.array([history.cut(user) for user, history in users.items()])
    return batching.windows_before(sequences, sequences.offsets[:-1] + cuts, LENGTH)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(histories, min_size=1, max_size=5))
def test_what_training_learns_from_is_what_the_fold_serves(found: list[History]) -> None:
    users = named(found)
    if not users:
        return
    rows = [row for user, history in users.items() for row in history.rows(user)]
    dead = {r[6] for r in rows if r[3] == RETRACTION}
    # What history.foldable does: an event that was taken back makes its user known, and no more.
    kept = [(*r[:3], RETRACTION if r[0] in dead else r[3], *r[4:]) for r in rows if r[3] != RETRACTION]
    past = [history.consumed(user) for user, history in users.items()]
    events = arrow([row for consumed in past for row in consumed])
    sequences = Sequences(
        np.cumsum([0, *map(len, past)]),
        rows_of(combined(events["item_id"]), CATALOGUE).astype(np.int32),
        rows_of(combined(events["event_type"]), pa.array(TYPES)).astype(np.int32),
        np.asarray(events["event_time"].cast(pa.int64())),
        STATISTICS.scale_values(combined(events["value"])),
        np.zeros(len(events), np.int8),
        no_users(len(users)),
    )
    assert_same_windows(before_targets(users, sequences), arrays_of(served(users, arrow(kept))))


class States:
    """Answers with the state that a list would be made from."""

    window_length = LENGTH

    def __init__(self, users: DataFrame) -> None:
        self.users = users

    def lists(self, states: DataFrame, events: DataFrame, users: DataFrame) -> DataFrame:
        window = F.transform("window", lambda e: F.struct(F.unix_micros(e.event_time), *[e[n] for n in EVENT_FIELDS]))
        seen = F.transform("seen", lambda s: F.struct(F.unix_micros(s.event_time), s.item_id))
        return states.select("user_id", F.struct(window.alias("window"), seen.alias("seen")).alias("items"))


EVENT_FIELDS = ("event_id", "content_hash", "item_id", "event_type", "value")


@dataclass
class Captured(Exception):
    sequences: Sequences


def drawn(seed: int, count: int) -> list[History]:
    """Histories by chance. Shrinking through hypothesis would start Spark jobs for each attempt."""
    rng = random.Random(seed)
    kinds = (*TYPES, *TYPES, OTHER_TYPE)
    return [
        History(
            [(rng.randrange(IDS), rng.randrange(7), rng.randrange(3)) for _ in range(rng.randrange(21))],
            [(rng.choice(ITEM_IDS), rng.choice(kinds)) for _ in range(IDS)],
            set(rng.sample(range(IDS), rng.randrange(4))),
            rng.randrange(1000),
        )
        for _ in range(count)
    ]


def test_all_three_are_equal_from_the_deliveries_on(spark, request) -> None:
    """Training's arrays come out of its own job, evaluation's states out of its protocol."""
    users = named(drawn(seed=14, count=100))
    raw = spark.createDataFrame([r for u, history in users.items() for r in history.rows(u)], EVENTS.schema).persist()
    distinct = resolve(raw, raw.limit(0)).where(F.col("outcome") == NEW).select(*EVENTS.schema.names)
    consumed = live(distinct, RETRACTION).where(F.col("event_type").isin(*TYPES)).persist()
    described = spark.createDataFrame([(u, {}, {}) for u in users], USERS.schema)

    states = served(users, foldable(raw, RETRACTION).toArrow())
    targets = [(history.consumed(u)[history.cut(u)][0],) for u, history in users.items()]
    asked = spark.createDataFrame(targets, "event_id string")
    sliced = {r.user_id: r["items"] for r in offline.before_each(consumed, asked, States(described)).collect()}
    assert sliced.keys() == users.keys()
    for state in states.to_pylist():
        window, seen = sliced[state["user_id"]]
        in_fold = [(micros(e["event_time"]), *(e[n] for n in EVENT_FIELDS)) for e in state["window"]]
        assert [tuple(e) for e in window] == in_fold, state["user_id"]
        newest = {item: at for at, item in sorted(tuple(s) for s in seen)}
        kept = {s["item_id"]: micros(s["event_time"]) for s in state["seen"]}
        assert newest.keys() == kept.keys() | set(state["older_seen"]), state["user_id"]
        assert kept.items() <= newest.items(), state["user_id"]

    def capture(sequences: Sequences, *_: Any, **__: Any) -> None:
        raise Captured(sequences)

    own = request.getfixturevalue("settings")
    items = spark.createDataFrame([(i, None, None, {}, {}, True) for i in CATALOGUE.to_pylist()], ITEMS.schema)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark_job, "fit_statistics", lambda *_: STATISTICS)
        patch.setattr(spark_job, "learn", capture)
        with pytest.raises(Captured) as stopped:
            spark_job.fit(own, consumed.withColumn("role", F.lit(0).cast("byte")), items, described, "windows")
    assert_same_windows(before_targets(users, stopped.value.sequences), arrays_of(states))
    raw.unpersist()
    consumed.unpersist()


def micros(time: datetime) -> int:
    return round((time - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)
