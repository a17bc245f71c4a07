"""The command: what it refuses, and that a baseline is judged by the events and the scoring of the evaluation job."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import quality
import recbole_client
from baselines import Histories, Popular, best_rows, popularity
from bench import NAMES
from measuring import BaselineLister, entries, log_of, records
from nightstream.errors import NightstreamError
from nightstream.evaluation import offline
from nightstream.evaluation.protocol import Split, judged
from nightstream.models.arrays import RANK, TRAIN, VALID
from nightstream.store.tables import EVENTS
from nightstream.training import splits

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def parts(spark) -> Split:
    """Three users; the test event of u is d, of v is a, of w an item that the catalogue does not have."""
    told = {"u": "abcd", "v": "bcda", "w": "bax", "x": "e"}
    rows = [
        (f"{user}{n}", user, item, "view", EPOCH + timedelta(hours=n), 1.0, None, "h", "r", EPOCH)
        for user, items in told.items()
        for n, item in enumerate(items)
    ]
    events = splits.leave_last_out(spark.createDataFrame(rows, EVENTS.schema))
    items = spark.createDataFrame([(i,) for i in "edcba"], "item_id string")
    users = spark.createDataFrame([], "user_id string, categories string, numbers string")
    return Split(events, events.where(events.role != splits.TEST), items, users, None)


def lister_of(spark, model, log, parts) -> BaselineLister:
    share = popularity(log.events, log.size, (TRAIN, RANK, VALID))
    return BaselineLister(
        spark, lambda _, h: best_rows(model, h, share, offline.LIST_LENGTH), log.item_ids, parts.users, ["view"]
    )


def test_the_log_is_the_history_in_order(parts):
    log = log_of(parts)
    assert log.item_ids.to_pylist() == list("abcde")
    assert log.events.offsets.tolist() == [0, 3, 6, 8]
    assert [log.item_ids[i - 1].as_py() for i in log.events.items] == list("abcbcdba")
    assert log.events.roles.tolist() == [TRAIN, RANK, VALID, TRAIN, RANK, VALID, RANK, VALID]


def test_a_baseline_is_scored_like_what_serves(spark, parts):
    log = log_of(parts)
    model = Popular()
    model.fit(log.events, log.size, (TRAIN, RANK, VALID))
    lister = lister_of(spark, model, log, parts)
    rows = judged(parts, lister, [0.0]).persist()
    lists = {r.user_id: [e.item_id for e in r["items"]] for r in rows.collect()}
    # Events of the history: b 3, a 2, c 2, d 1.
    assert lists == {"u": ["d", "e"], "v": ["a", "e"], "w": ["c", "d", "e"], "x": list("bacde")}
    (everyone,) = [s for s in offline.scores(rows, 5) if s["users"] == "all"]
    assert everyone["events"] == 4
    assert everyone["hr@10"] == pytest.approx(3 / 4)
    assert everyone["ndcg@10"] == pytest.approx((1 + 1 + 0 + 1 / math.log2(6)) / 4)
    written = offline.predictions(rows)
    assert [r["rank"] for r in written.where("user_id = 'w'").orderBy("rank").collect()] == [1, 2, 3]


def test_a_delay_hides_events_from_a_baseline_but_they_stay_seen(spark, parts):
    log = log_of(parts)

    class Counting(Popular):
        """Points at the item as far from the end as events are known."""

        def scores(self, histories):
            scores = np.zeros((len(histories), 5))
            scores[np.arange(len(histories)), 4 - histories.sizes] = 1.0
            return scores

    lister = lister_of(spark, Counting(), log, parts)
    cut = round(EPOCH.timestamp() * 1e6)
    rows = offline.prequential(parts.events.where("user_id = 'u'"), cut, [0.0], lister).collect()
    lists = {(r.target_item_id, r.delay_s): "".join(e.item_id for e in r["items"]) for r in rows}
    assert lists == {
        ("b", 0.0): "dbce",
        ("b", math.inf): "dbce",
        ("c", 0.0): "cde",
        ("c", math.inf): "dce",
        ("d", 0.0): "de",
        ("d", math.inf): "de",
    }


def test_records_have_the_keys_of_the_json_and_only_all_users():
    scores = [
        {"delay_s": None, "users": u, "events": 2, "hr@10": 0.5, "ndcg@10": 0.25, "coverage": 1.0}
        for u in ("all", "known")
    ]
    (found,) = records(scores, "toys", "prequential", "default", True, 3, 1.234)
    assert found == {
        "data": "toys",
        "protocol": "prequential",
        "delay_s": None,
        "model": "default",
        "ranker": True,
        "default": True,
        "seed": 3,
        "hr@10": 0.5,
        "ndcg@10": 0.25,
        "seconds": 1.2,
    }
    assert json.loads(json.dumps(found)) == found


def test_names_and_seeds():
    leave, replay = quality.Protocol.LEAVE_ONE_OUT, quality.Protocol.PREQUENTIAL
    assert quality.names_of(None, "python", leave) == list(NAMES)
    assert quality.names_of(None, None, leave) == [n for n in NAMES if not n.startswith("recbole")]
    assert quality.names_of("default, item-knn", None, replay) == ["item-knn", "default"]
    for recbole, protocol in ((None, leave), ("python", replay)):
        with pytest.raises(NightstreamError, match="--recbole PYTHON"):
            quality.names_of("recbole-caser", recbole, protocol)
    assert quality.seeds_of("3,1") == [3, 1]
    with pytest.raises(NightstreamError, match="lightfm"):
        quality.names_of("popular,lightfm", None, leave)
    for text in ("", "1,x", "1,1"):
        with pytest.raises(NightstreamError, match="--seeds"):
            quality.seeds_of(text)


def test_data_by_name_by_file_and_by_settings(tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.inter").write_text("")
    monkeypatch.setenv(quality.DATA_FOLDER, str(tmp_path))
    named, by_file = quality.settings_for("shop"), quality.settings_for(str(folder / "shop.inter"))
    assert named == by_file
    assert named.sources.events.path == str(folder / "shop.inter")
    assert named.sources.items is None
    (folder / "shop.item").write_text("")
    assert quality.settings_for("shop").sources.items.path == str(folder / "shop.item")
    assert quality.settings_for("shop", ["sources.items=null"]).sources.items is None
    movies = quality.settings_for("movielens", ["training.epochs=2"])
    assert movies.training.epochs == 2
    assert Path(movies.sources.users.path).is_absolute()
    assert quality.settings_for(str(quality.CONF / "movielens.yaml")).sources.items is not None
    with pytest.raises(NightstreamError, match=r"books\.inter is not there"):
        quality.settings_for("books")


def test_mean_and_spread():
    assert quality.spread_text([0.1]) == "0.1000"
    assert quality.spread_text([0.1, 0.2, 0.3]) == "0.2000 ± 0.1000"
    rows = [
        {"model": m, "ranker": False, "delay_s": 0.0, "hr@10": h, "ndcg@10": h / 2} for m, h in (("a", 1), ("a", 3))
    ]
    ((first, hits, gains, count),) = quality.summaries(rows)
    assert (first["model"], hits, gains, count) == ("a", [1, 3], [0.5, 1.5], 2)


@pytest.mark.usefixtures("restored_logging")
def test_bad_input_gets_one_sentence_and_exit_code_2(monkeypatch, capsys):
    for arguments, sentence in (
        (["--data", "nowhere.inter"], "quality: --data nowhere.inter: nowhere.inter is not there"),
        (["--protocol", "coin"], "quality: Invalid value for '--protocol'"),
    ):
        monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
        with pytest.raises(SystemExit) as left:
            quality.main()
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith(sentence)
        assert len(told.strip().splitlines()) == 1


def test_lists_shorter_than_the_catalogue_end_where_the_items_do():
    made = entries(np.array([[2, 1], [1, 0], [0, 0]]), np.ones((3, 2)), pa.array(["a", "b"]))
    assert [[(e["rank"], e["item_id"]) for e in row] for row in made.to_pylist()] == [
        [(1, "b"), (2, "a")],
        [(1, "a")],
        [],
    ]


def test_recbole_is_asked_by_row_and_strangers_get_the_fallback(parts, tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(
        "import sys, numpy as np\n"
        "folder, model, seed = sys.argv[1:]\n"
        "if seed == '9': sys.exit('no such\\nmodel')\n"
        "log, asked = (np.load(f'{folder}/{n}.npz') for n in ('log', 'queries'))\n"
        "last = dict(zip(log['user'], log['item']))\n"
        "assert [last[u] for u in asked['user']] == list(asked['items'][asked['offsets'][1:] - 1])\n"
        "rows = np.array([[4, 0, 0, 0, 0], [5, 1, 0, 0, 0]])\n"
        "np.savez(folder + '/lists.npz', rows=rows, scores=rows / 2)\n"
    )
    monkeypatch.setattr(recbole_client, "SCRIPT", script)
    log = log_of(parts)
    items, offsets = np.array([1, 2, 3, 2, 3, 4]), np.array([0, 3, 3, 6])
    histories = Histories(items, offsets, items, offsets)

    def ask(seed: int) -> tuple[np.ndarray, np.ndarray]:
        ids = pa.array(["u", "x", "v"])
        return recbole_client.best_rows(sys.executable, "recbole-caser", seed, log, np.arange(5.0), ids, histories)

    rows, scores = ask(1)
    assert rows.tolist() == [[4, 0, 0, 0, 0], [5, 4, 3, 2, 1], [5, 1, 0, 0, 0]]
    assert scores[[0, 2], 0].tolist() == [2.0, 2.5]
    with pytest.raises(NightstreamError, match="Caser could not be trained: model"):
        ask(9)
