"""learn() on histories whose next item is known, and the model that comes out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_data import make_windows, ring_sequences
from nightstream.errors import ArtifactError
from nightstream.models import artifacts
from nightstream.models.arrays import RANK, TRAIN, VALID, Catalogue, ItemFeatures, UserFeatures
from nightstream.models.artifacts import from_artifacts, to_artifacts
from nightstream.models.model import Model, _blocks
from nightstream.models.ranking import candidate_sources, rank_features, reasons, strategies
from nightstream.models.ranking.ranker import RankerSizes
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.strategies import STRATEGIES
from nightstream.models.ranking.topk import BLOCK
from nightstream.training.pipeline import LearnSpec, learn, refit_epochs
from nightstream.training.trainer import train_encoder

ITEMS = 30
IDS = [f"i{n}" for n in range(1, ITEMS + 1)]
OPTIONS = {"width": 16, "window": 6, "positions": 128, "epochs": 10, "learning_rate": 0.02, "dropout": 0.1}
SPEC = LearnSpec(options=OPTIONS, seed=1, threads=1, ranker=RankerSizes(trees=30, threads=1, min_child_weight=0.5))


def content(rows: list[int]) -> ItemFeatures:
    """Items whose only content is a category, the same for five neighbours on the ring."""
    kinds = np.asarray([[2 + (row - 1) // 5] for row in rows], np.int32)
    return ItemFeatures(np.zeros((len(rows), 0), np.float32), (kinds,), (8,), np.zeros((len(rows), 0), np.int32), 2)


def two_kinds_of_users(count: int) -> UserFeatures:
    return UserFeatures(np.zeros((count, 0), np.float32), (2 + np.arange(count, dtype=np.int32)[:, None] % 2,), (4,))


def histories() -> Any:
    sequences = ring_sequences(items=ITEMS)
    return replace(sequences, users=two_kinds_of_users(len(sequences)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def model(work: Path) -> Model:
    torch.set_num_threads(1)
    return learn(histories(), content(list(range(1, ITEMS + 1))), IDS, ["event"], SPEC, train_encoder, work)


@pytest.fixture(scope="module")
def catalogue(model: Model) -> Catalogue:
    vectors = model.encode_items(content(list(range(1, ITEMS + 1))), IDS)
    return Catalogue(IDS, vectors, np.ones(ITEMS, bool), [f"Title {i}" for i in IDS])


def ring(start: int, events: int) -> list[int]:
    return [(start + 7 * n) % ITEMS + 1 for n in range(events)]


def windows_of(rows: list[list[int]], **more: Any) -> Any:
    return make_windows(rows, users=two_kinds_of_users(len(rows)), **more)


def test_the_next_item_of_the_ring_comes_first(model: Model, catalogue: Catalogue) -> None:
    lists = model.recommend(windows_of([ring(s, 5) for s in range(ITEMS)]), catalogue, 5)
    wanted = np.array([ring(s, 6)[-1] for s in range(ITEMS)])
    assert (lists.rows[:, 0] == wanted).mean() > 0.8


def test_each_member_alone_finds_it_among_its_first(model: Model) -> None:
    for name in ("gru", "cnn"):
        alone = model.only(name)
        vectors = alone.encode_items(content(list(range(1, ITEMS + 1))), IDS)
        lists = alone.recommend(
            windows_of([ring(s, 5) for s in range(ITEMS)]), Catalogue(IDS, vectors, np.ones(ITEMS, bool)), 3
        )
        wanted = np.array([ring(s, 6)[-1] for s in range(ITEMS)])
        assert (lists.rows == wanted[:, None]).any(1).mean() > 0.8, name
    with pytest.raises(ValueError, match="rnn"):
        model.only("rnn")


def test_ensemble_cosine_is_the_weighted_mean_of_the_members_cosines(model: Model, catalogue: Catalogue) -> None:
    users = model.encode_users(windows_of([ring(3, 4)]), catalogue)
    assert users.shape == (1, model.width)
    np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(catalogue.vectors, axis=1), 1, atol=1e-5)
    expected = np.zeros(ITEMS)
    for name in ("gru", "cnn"):
        alone = model.only(name)
        own = alone.encode_items(content(list(range(1, ITEMS + 1))), IDS)
        expected += (
            0.5 * (alone.encode_users(windows_of([ring(3, 4)]), Catalogue(IDS, own, np.ones(ITEMS, bool))) @ own.T)[0]
        )
    np.testing.assert_allclose((users @ catalogue.vectors.T)[0], expected, atol=1e-5)


@pytest.mark.parametrize("with_ranker", [True, False])
def test_a_user_gets_the_same_list_alone_and_in_any_batch(
    model: Model, catalogue: Catalogue, with_ranker: bool
) -> None:
    rng = np.random.default_rng(0)
    rows = [ring(int(rng.integers(ITEMS)), int(rng.integers(0, 9))) for _ in range(2 * BLOCK + 9)]
    enabled, model.ranker_enabled = model.ranker_enabled, with_ranker
    try:
        windows = windows_of(rows)
        together = model.recommend(windows, catalogue, 6)
        order = rng.permutation(len(rows))
        users = windows.users.take(order)
        shuffled = model.recommend(make_windows([rows[i] for i in order], users=users), catalogue, 6)
        np.testing.assert_allclose(shuffled.vectors, together.vectors[order], atol=1e-5)
        np.testing.assert_allclose(shuffled.scores, together.scores[order], atol=1e-5)
        np.testing.assert_array_equal(shuffled.rows, together.rows[order])
        side_by_side = model.recommend(windows, catalogue, 6, threads=4)
        np.testing.assert_array_equal(side_by_side.rows, together.rows)
        np.testing.assert_allclose(side_by_side.scores, together.scores, atol=1e-5)
        for user in (0, 5, BLOCK, 2 * BLOCK + 8):
            alone = model.recommend(windows.slice(user, user + 1), catalogue, 6)
            np.testing.assert_array_equal(alone.rows[0], together.rows[user])
            np.testing.assert_array_equal(alone.strategies[0], together.strategies[user])
            np.testing.assert_array_equal(alone.because[0], together.because[user])
            np.testing.assert_allclose(alone.scores[0], together.scores[user], atol=1e-5)
    finally:
        model.ranker_enabled = enabled


@pytest.mark.parametrize(
    ("users", "threads", "sizes"),
    [
        (0, 2, []),
        (1, 2, [1]),
        (BLOCK, 1, [BLOCK]),
        (BLOCK, 2, [BLOCK // 2] * 2),
        (200, 1, [50] * 4),
        (200, 2, [50] * 4),
        (200, 3, [33, 33, 34, 33, 33, 34]),
        (31, 8, [31]),
        (50, 8, [16, 17, 17]),
    ],
)
def test_blocks_of_users_are_shared_out_evenly(users: int, threads: int, sizes: list[int]) -> None:
    windows = windows_of([[1 + user % ITEMS] for user in range(users)], seen=[[user] for user in range(users)])
    blocks = _blocks(windows, threads)
    assert [count for _, count in blocks] == sizes
    assert {len(block) for block, _ in blocks} <= {BLOCK}
    assert [user for block, count in blocks for user in block.slice(0, count).seen.tolist()] == list(range(users))


def test_everyone_gets_a_full_list_of_eligible_items(model: Model, catalogue: Catalogue) -> None:
    available = np.ones(ITEMS, bool)
    available[9] = False
    small = replace(catalogue, available=available)
    seen: list[list[int]] = [[], ring(0, 5), list(range(1, 28)), list(range(1, ITEMS + 1))]
    windows = windows_of([[], ring(0, 5), ring(1, 3), []], seen=seen)
    for model.ranker_enabled in (False, True):
        lists = model.recommend(windows, small, 40)
        assert lists.rows.shape == (4, 40)
        for rows, out, scores in zip(lists.rows.tolist(), seen, lists.scores, strict=True):
            eligible = set(range(1, ITEMS + 1)) - set(out) - {10}
            assert set(rows) - {0} == eligible
            assert rows[len(eligible) :] == [0] * (40 - len(eligible))
            assert (np.diff(scores[: len(eligible)]) <= 0).all()


def test_an_empty_window_has_a_zero_vector_and_a_list_by_popularity(model: Model, catalogue: Catalogue) -> None:
    lists = model.recommend(windows_of([[]]), catalogue, 5)
    assert not lists.vectors.any()
    assert {STRATEGIES[s] for s in lists.strategies[0]} <= {"popular", "segment_popular"}
    assert not lists.because.any()
    share = model.sources.segment_scores(two_kinds_of_users(1), np.arange(1, ITEMS + 1)[None, :])[0]
    assert lists.rows[0, 0] == share.argmax() + 1


def test_a_sequence_reason_names_the_window_item_nearest_to_the_recommended_one(
    model: Model, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "ranker_enabled", False)
    windows = [ring(s, 4) for s in range(ITEMS)]
    lists = model.recommend(windows_of(windows), catalogue, 5)
    assert {STRATEGIES[s] for s in lists.strategies.ravel()} == {"sequence"}
    vectors = np.concatenate([np.zeros((1, model.width)), catalogue.vectors])
    for window, rows, named in zip(windows, lists.rows, lists.because, strict=True):
        cosines = vectors[rows] @ vectors[window].T
        assert (cosines[np.arange(5), [window.index(item) for item in named]] >= cosines.max(1) - 1e-5).all()


def test_a_covisitation_reason_names_a_window_item_that_came_close_to_the_recommended_one(
    model: Model, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    covisitation = STRATEGIES.index("covisitation")

    def wherever_allowed(contributions: np.ndarray, groups: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        return np.where(allowed[:, covisitation], covisitation, 0)

    monkeypatch.setattr(reasons, "strongest_group", wherever_allowed)
    windows = [ring(s, 6) for s in range(ITEMS)]
    lists = model.recommend(windows_of(windows), catalogue, 20)
    given = lists.strategies == covisitation
    # Each history goes 11 steps of 7 round the ring of 30, and 7 times 13 is 1 there: items more than 11 steps apart
    # never came together, and in a window of 6 some item is too far from most that are known by another.
    assert 0 < given.sum() < given.size
    for window, rows, named in zip(windows, np.where(given, lists.rows, 0), lists.because, strict=True):
        for row, because in zip(rows[rows > 0], named[rows > 0], strict=True):
            steps = int(row - because) * 13 % ITEMS
            assert because in window
            assert min(steps, ITEMS - steps) <= 11


def test_new_items_are_encoded_by_content_and_recommended_with_that_reason(model: Model) -> None:
    rows = [*range(1, ITEMS + 1), 6, 6]
    ids = [*IDS, "new-1", "new-2"]
    vectors = model.encode_items(content(rows), ids)
    np.testing.assert_allclose(vectors[-1], vectors[-2], atol=1e-6)
    catalogue = Catalogue(ids, vectors, np.ones(len(ids), bool))
    # A window may hold such an item, and everything old is seen, so that only the other new one is left.
    lists = model.recommend(windows_of([[31]], seen=[list(range(1, 32))]), catalogue, 3)
    assert lists.rows.tolist() == [[32, 0, 0]]
    assert STRATEGIES[lists.strategies[0, 0]] == "content"
    assert lists.because[0, 0] == 31


def test_catalogue_rows_need_not_be_vocabulary_rows(model: Model, catalogue: Catalogue) -> None:
    order = np.random.default_rng(0).permutation(ITEMS)
    shuffled = Catalogue([IDS[i] for i in order], catalogue.vectors[order], np.ones(ITEMS, bool))
    place = np.empty(ITEMS, int)
    place[order] = np.arange(ITEMS)
    rows = [ring(s, 5) for s in range(10)]
    moved = [[int(place[r - 1]) + 1 for r in events] for events in rows]
    a = model.recommend(windows_of(rows), catalogue, 4)
    b = model.recommend(windows_of(moved), shuffled, 4)
    np.testing.assert_array_equal(place[a.rows - 1] + 1, b.rows)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


def test_a_hole_in_a_window_and_more_places_than_needed_do_not_matter(model: Model, catalogue: Catalogue) -> None:
    windows, hole = windows_of([ring(2, 4)], length=8), windows_of([ring(2, 4)], length=9)
    for name in ("items", "types", "times", "values"):
        values, plain = getattr(hole, name), getattr(windows, name)
        values[0, :6], values[0, 6], values[0, 7:] = plain[0, :6], 0, plain[0, 6:]
    np.testing.assert_allclose(model.encode_users(hole, catalogue), model.encode_users(windows, catalogue), atol=1e-6)
    long, short = windows_of([ring(2, 9)], length=20), windows_of([ring(2, 9)[-6:]], length=6)
    np.testing.assert_allclose(model.encode_users(long, catalogue), model.encode_users(short, catalogue), atol=1e-5)


def test_artifacts_there_and_back_give_the_same_lists(model: Model, catalogue: Catalogue) -> None:
    again = from_artifacts(to_artifacts(model))
    assert (again.window_length, again.event_types) == (6, ["event"])
    vectors = again.encode_items(content(list(range(1, ITEMS + 1))), IDS)
    np.testing.assert_array_equal(vectors, catalogue.vectors)
    windows = windows_of([ring(s, 5) for s in range(9)])
    a, b = model.recommend(windows, catalogue, 5), again.recommend(windows, replace(catalogue, vectors=vectors), 5)
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.scores, b.scores)


def test_a_process_that_registered_the_sources_in_another_order_gives_the_same_lists(
    model: Model, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = windows_of([ring(s, 5) for s in range(9)])
    before, files, names = model.recommend(windows, catalogue, 5), to_artifacts(model), list(STRATEGIES)
    order = dict(reversed(SOURCES.items()))
    for registry in (artifacts, candidate_sources, rank_features, strategies):
        monkeypatch.setattr(registry, "SOURCES", order)
    after = from_artifacts(files).recommend(windows, catalogue, 5)
    np.testing.assert_array_equal(after.rows, before.rows)
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(after.because, before.because)
    assert names != list(STRATEGIES)
    assert [names[s] for s in before.strategies.ravel()] == [list(STRATEGIES)[s] for s in after.strategies.ravel()]


def test_files_that_name_no_sources_have_them_in_the_registrys_order(model: Model) -> None:
    files = to_artifacts(model)
    about = json.loads(files["model.json"])
    assert about.pop("sources") == list(SOURCES)
    older = from_artifacts(files | {"model.json": json.dumps(about).encode()})
    assert older.sources.names == model.sources.names


def test_missing_and_damaged_artifacts_are_refused(model: Model) -> None:
    files = to_artifacts(model)
    for name in files:
        with pytest.raises(ArtifactError):
            from_artifacts({k: v for k, v in files.items() if k != name})
        with pytest.raises(ArtifactError):
            from_artifacts(files | {name: files[name][: len(files[name]) // 2]})
        if name != "model.json":
            flipped = bytearray(files[name])
            flipped[-3] ^= 1
            with pytest.raises(ArtifactError, match=name):
                from_artifacts(files | {name: bytes(flipped)})


def test_items_with_other_attributes_and_vectors_of_another_model_are_refused(
    model: Model, catalogue: Catalogue
) -> None:
    bare = ItemFeatures(np.zeros((1, 3), np.float32), (), (), np.zeros((1, 0), np.int32), 2)
    with pytest.raises(ArtifactError, match="attributes"):
        model.encode_items(bare, ["x"])
    with pytest.raises(ArtifactError, match="width"):
        model.only("gru").recommend(windows_of([[1]]), catalogue, 3)


def test_no_users_and_no_items(model: Model, catalogue: Catalogue) -> None:
    lists = model.recommend(windows_of([[1]]).slice(0, 0), catalogue, 3)
    assert lists.rows.shape == (0, 3)
    none = Catalogue([], np.zeros((0, model.width), np.float32), np.zeros(0, bool))
    assert model.recommend(windows_of([[]]), none, 3).rows.tolist() == [[0, 0, 0]]


def test_learning_again_in_the_same_directory_trains_nothing(model: Model, work: Path) -> None:
    def never(job: dict[str, Any]) -> None:
        raise AssertionError(f"{job['name']} was trained again")

    again = learn(histories(), content(list(range(1, ITEMS + 1))), IDS, ["event"], SPEC, never, work)
    assert {k: v for k, v in to_artifacts(again).items() if k.startswith("encoder")} == {
        k: v for k, v in to_artifacts(model).items() if k.startswith("encoder")
    }


def test_before_the_refit_nothing_has_been_learnt_from_validation(tmp_path: Path) -> None:
    """The last item of the ring is turned to in validation alone."""
    sequences = histories()
    only_valid = sequences.items == ITEMS
    roles = np.where(only_valid, VALID, np.where(sequences.roles == VALID, TRAIN, sequences.roles)).astype(np.int8)
    spec = replace(SPEC, encoders=("gru",), options=OPTIONS | {"epochs": 2}, use_ranker=False)
    earlier: list[Model] = []
    later = learn(
        replace(sequences, roles=roles),
        content(list(range(1, ITEMS + 1))),
        IDS,
        ["event"],
        spec,
        train_encoder,
        tmp_path,
        before_refit=earlier.append,
    )
    (before,) = earlier
    assert before.members[0].trained.tolist() == [True] * (ITEMS - 1) + [False]
    assert later.members[0].trained.all()
    assert (before.sources.popularity[ITEMS], later.sources.popularity[ITEMS] > 0) == (0, True)
    weights = [m.members[0].sequence.state_dict() for m in (before, later)]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_other_data_is_learned_anew(work: Path) -> None:
    sequences = replace(histories(), items=histories().items[::-1].copy())

    class Called(Exception):
        pass

    def launched(job: dict[str, Any]) -> None:
        raise Called

    with pytest.raises(Called):
        learn(sequences, content(list(range(1, ITEMS + 1))), IDS, ["event"], SPEC, launched, work)


def test_validation_figures_stand_in_the_model(model: Model) -> None:
    facts = model.metrics["validation"]
    assert facts["with_ranker"]["ndcg@10"] > 0.7
    assert facts["gru"]["targets"] == 80


def test_specs_and_inputs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="once"):
        LearnSpec(encoders=("gru", "gru"))
    with pytest.raises(ValueError, match="weights"):
        LearnSpec(weights=(1.0,))
    with pytest.raises(ValueError, match="item_ids"):
        learn(histories(), content([1, 2]), IDS, ["event"], SPEC, train_encoder, tmp_path)


def test_the_refit_is_longer_the_more_events_are_new_to_it() -> None:
    assert refit_epochs(10, np.array([TRAIN] * 98 + [RANK, VALID])) == 2
    assert refit_epochs(10, np.array([TRAIN] * 80 + [RANK, VALID] * 10)) == 4
    assert refit_epochs(10, np.array([TRAIN] * 3 + [RANK, VALID])) == 5
    assert refit_epochs(1, np.array([TRAIN] * 98 + [RANK, VALID])) == 1
