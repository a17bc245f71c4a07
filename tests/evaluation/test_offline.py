"""What each protocol lets a list know, against a slow re-implementation; and the scores of known ranks."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from nightstream.evaluation import offline
from nightstream.models import ranking_metrics
from nightstream.store.tables import EVENTS
from nightstream.training import splits
from pyspark.sql import functions as F

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LENGTH = 3


class Told:
    """Stands where the refresh is called, and answers with the state it was given instead of recommendations."""

    window_length = LENGTH

    def __init__(self, users):
        self.users = users

    def lists(self, states, events, users):
        window = F.transform(F.col("window"), lambda e: e.event_id)
        if not events.isEmpty():
            ids = events.groupBy("user_id").agg(F.sort_array(F.collect_set("event_id")).alias("ids"))
            states = states.join(ids, "user_id", "left")
            window = F.coalesce("ids", window)
        seen = F.sort_array(F.transform(F.col("seen"), lambda s: s.item_id))
        told = F.struct(
            F.lit(1).alias("rank"), F.to_json(F.struct(window.alias("w"), seen.alias("s"))).alias("item_id")
        )
        return states.select("user_id", F.array(told).alias("items"))


def made(spark, events):
    rows = [
        (f"e{n:03}", user, item, "view", EPOCH + timedelta(seconds=second), 1.0, None, "h", "r", EPOCH)
        for n, (user, item, second) in enumerate(events)
    ]
    return spark.createDataFrame(rows, EVENTS.schema), rows


def test_prequential_knows_exactly_what_a_speed_layer_of_that_delay_would(spark):
    rng = random.Random(2)
    events, rows = made(spark, [(f"u{rng.randrange(4)}", f"i{rng.randrange(9)}", rng.randrange(40)) for _ in range(70)])
    cut, delays = 24, [0.0, 1.0, 5.0]
    users = spark.createDataFrame([("u0",)], "user_id string").selectExpr("user_id", "null categories", "null numbers")
    found = offline.prequential(events, round((EPOCH.timestamp() + cut) * 1e6), delays, Told(users)).collect()

    seconds = {r[0]: round((r[4] - EPOCH).total_seconds()) for r in rows}
    expected = {}
    for user in {r[1] for r in rows}:
        mine = sorted((r for r in rows if r[1] == user), key=lambda r: (r[4], r[0]))
        at_cut = [r for r in mine if seconds[r[0]] <= cut]
        for place, row in enumerate(mine):
            if seconds[row[0]] <= cut:
                continue
            before = mine[:place]
            for delay in [*delays, math.inf]:
                known = before
                if delay:
                    known = [r for r in before if r in at_cut or seconds[r[0]] <= seconds[row[0]] - delay]
                window = [r[0] for r in known][-LENGTH:]
                seen = sorted(r[2] for r in before)
                told = str({"w": window, "s": seen}).replace("'", '"').replace(" ", "")
                expected[user, row[2], row[4], delay, told, bool(at_cut)] = (
                    expected.get((user, row[2], row[4], delay, told, bool(at_cut)), 0) + 1
                )
    got: dict = {}
    for r in found:
        at = r.event_time.replace(tzinfo=UTC)
        key = (r.user_id, r.target_item_id, at, r.delay_s, r["items"][0].item_id, r.known)
        got[key] = got.get(key, 0) + 1
    assert got == expected


def test_the_list_before_each_target_knows_every_event_before_it(spark):
    rng = random.Random(3)
    events, rows = made(spark, [(f"u{rng.randrange(4)}", f"i{rng.randrange(9)}", rng.randrange(30)) for _ in range(50)])
    users = spark.createDataFrame([("u0",)], "user_id string").selectExpr("user_id", "null categories", "null numbers")
    targets = spark.createDataFrame([(r[0],) for r in rows[::3]], "event_id string")
    expected = {}
    for row in rows[::3]:
        mine = sorted((r for r in rows if r[1] == row[1]), key=lambda r: (r[4], r[0]))
        before = mine[: mine.index(row)]
        told = {"w": [r[0] for r in before][-LENGTH:], "s": sorted(r[2] for r in before)}
        expected[row[0]] = (row[1], row[2], bool(before), str(told).replace("'", '"').replace(" ", ""))
    found = offline.before_each(events, targets, Told(users)).collect()
    assert len(found) == len(expected)
    assert {r.event_id: (r.user_id, r.target_item_id, r.known, r["items"][0].item_id) for r in found} == expected


def test_leave_one_out_keeps_the_test_event_out_and_single_events_in(spark):
    events, _ = made(spark, [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("v", "d", 1)])
    users = spark.createDataFrame([], "user_id string")
    rows = offline.leave_one_out(splits.leave_last_out(events), Told(users)).collect()
    told = {r.user_id: (r.target_item_id, r.known, r["items"][0].item_id) for r in rows}
    assert told == {"u": ("c", True, '{"w":["e000","e001"],"s":[]}'), "v": ("d", False, '{"w":[],"s":[]}')}


def test_scores_of_known_ranks(spark):
    def entry(items):
        return [(n + 1, item, 0.5) for n, item in enumerate(items)]

    ten = [f"x{n}" for n in range(20)]
    rows = [
        ("u", "x0", EPOCH, 0.0, True, entry(ten)),
        ("v", "x6", EPOCH, 0.0, False, entry(ten)),
        ("w", "never", EPOCH, 0.0, True, entry(ten[:3])),
        ("u", "x0", EPOCH, math.inf, True, entry([])),
    ]
    schema = (
        "user_id string, target_item_id string, event_time timestamp, delay_s double, known boolean, "
        "items array<struct<rank:int,item_id:string,score:double>>"
    )
    frame = spark.createDataFrame(rows, schema)
    found = {(s["delay_s"], s["users"]): s for s in offline.scores(frame, 40)}
    everyone = found[0.0, "all"]
    assert everyone["events"] == 3
    assert everyone["hr@5"] == pytest.approx(1 / 3)
    assert everyone["hr@10"] == pytest.approx(2 / 3)
    assert everyone["ndcg@10"] == pytest.approx((1 + 1 / math.log2(8)) / 3)
    assert everyone["coverage"] == pytest.approx(20 / 40)
    assert found[0.0, "known"]["ndcg@5"] == pytest.approx(1 / 2)
    assert found[0.0, "unknown"]["hr@5"] == 0.0
    assert found[None, "all"]["hr@20"] == 0.0
    gains = [r.gain for r in offline.gains(frame, 10).where("delay_s = 0").orderBy("user_id").collect()]
    assert gains == pytest.approx([1, 1 / math.log2(8), 0])
    written = offline.predictions(frame)
    assert written.columns == ["user_id", "target_item_id", "event_time", "delay_s", "rank", "item_id", "score"]
    assert written.count() == 43


def test_gains_and_scores_in_spark_are_those_of_ranking_metrics(spark):
    """A target at every rank, the length of the list and no rank included."""
    ranks = np.arange(offline.LIST_LENGTH + 1)
    items = [(n, f"i{n}", 0.5) for n in ranks[1:].tolist()]
    rows = [(f"u{rank:02}", f"i{rank}", EPOCH, 0.0, True, items) for rank in ranks.tolist()]
    schema = (
        "user_id string, target_item_id string, event_time timestamp, delay_s double, known boolean, "
        "items array<struct<rank:int,item_id:string,score:double>>"
    )
    frame = spark.createDataFrame(rows, schema)
    everyone = next(s for s in offline.scores(frame, 40) if s["users"] == "all")
    for k in offline.CUTOFFS:
        found = [r.gain for r in offline.gains(frame, k).orderBy("user_id").collect()]
        assert found == ranking_metrics.gains(ranks, k).tolist()
        assert everyone[f"ndcg@{k}"] == pytest.approx(ranking_metrics.ndcg(ranks, k), rel=1e-12)
        assert everyone[f"hr@{k}"] == pytest.approx(ranking_metrics.hit_rate(ranks, k), rel=1e-12)
