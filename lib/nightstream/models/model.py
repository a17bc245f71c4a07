"""A trained model as one thing: encoders, sources and ranker, and the vectors and lists that they give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nightstream.errors import ArtifactError
from nightstream.models.arrays import Catalogue, ItemFeatures, Lists, Windows
from nightstream.models.encoders import ItemEncoder, SequenceEncoder
from nightstream.models.encoders.tensors import item_batch, sequence_batch
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, prepare
from nightstream.models.ranking.ranker import Ranker
from nightstream.models.ranking.recommend import empty_lists, recommend_block
from nightstream.models.ranking.topk import BLOCK, unit

ITEM_BLOCK = 1024
# So many users take longer than it takes to encode a block.
_WORTH_A_BLOCK = 16


@dataclass(frozen=True)
class Member:
    """One encoder pair of the ensemble. weight: its share of the cosine; the weights of all members sum to 1.
    trained: bool [V], vocabulary items whose id embedding has been trained."""

    name: str
    items: ItemEncoder
    sequence: SequenceEncoder
    weight: float
    trained: np.ndarray


class Model:
    """An ensemble of encoders in one vector space, candidate sources, and a ranker.

    Item and user vectors are the members' unit vectors side by side, each times the root of its weight: their cosine is
    the weighted mean of the members' cosines, so one vector per item and user serves the whole ensemble.

    item_ids: the vocabulary. event_types: names, in the order of the 1-based type indices. window_length: events that
    encode_users looks at. ranker_enabled: false gives lists by cosine alone.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        event_types: Sequence[str],
        members: Sequence[Member],
        sources: Sources,
        ranker: Ranker | None = None,
        ranker_enabled: bool = True,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        if not members:
            raise ValueError("a model needs at least one encoder")
        self.item_ids = list(item_ids)
        self.event_types = list(event_types)
        self.members = list(members)
        self.sources = sources
        self.ranker = ranker
        self.ranker_enabled = ranker_enabled
        self.metrics = metrics or {}
        self.window_length = max(m.sequence.sizes.window for m in self.members)
        self.row_of = {item: row for row, item in enumerate(self.item_ids, start=1)}
        self._prepared: Prepared | None = None
        for member in self.members:
            member.items.eval()
            member.sequence.eval()

    @property
    def width(self) -> int:
        """D, of item and user vectors."""
        return sum(m.items.sizes.width for m in self.members)

    def only(self, *names: str) -> Model:
        """The model with some members alone, at weights in the same proportion, and without the ranker.

        Its vectors are narrower: a catalogue must be encoded anew. ValueError for a name that no member has.
        """
        missing = set(names) - {m.name for m in self.members}
        if missing or not names:
            raise ValueError(f"no such member: {', '.join(sorted(missing)) or 'none named'}")
        kept = [m for m in self.members if m.name in names]
        total = sum(m.weight for m in kept)
        kept = [replace(m, weight=m.weight / total) for m in kept]
        return Model(self.item_ids, self.event_types, kept, self.sources, None, False, self.metrics)

    def encode_items(self, features: ItemFeatures, item_ids: Sequence[str]) -> np.ndarray:
        """float32 [M, D] unit vectors. Ids that were trained use their embedding, all others their content alone.

        features: M items in the order of item_ids, normalised as those of training. ArtifactError if their attributes
        are not those that the model was trained with.
        """
        if len(features) != len(item_ids):
            raise ValueError("features and item_ids must have one row per item each")
        sizes = self.members[0].items.sizes
        if features.numbers.shape[1] != sizes.numbers or features.category_sizes != sizes.category_sizes:
            raise ArtifactError("the items' attributes are not those that the model was trained with")
        rows = np.fromiter((self.row_of.get(i, 0) for i in item_ids), np.int64, len(item_ids))
        parts = []
        for member in self.members:
            trained = np.concatenate([[False], member.trained])
            ids = np.where(trained[rows], rows, 0)
            parts.append(_encode_items(member.items, features, ids) * np.float32(member.weight**0.5))
        return np.concatenate(parts, 1) if len(item_ids) else np.zeros((0, self.width), np.float32)

    def encode_users(self, windows: Windows, catalogue: Catalogue) -> np.ndarray:
        """float32 [B, D] unit vectors, all zero for users with no known item in the window. Blocks of BLOCK users."""
        table = self.table(catalogue)
        parts = [self._encode_block(block, table) for block, _ in _blocks(self._fit_windows(windows))]
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)
        return vectors[: len(windows)]

    def recommend(self, windows: Windows, catalogue: Catalogue, k: int, threads: int = 1) -> Lists:
        """The k best eligible items of each user, min(k, eligible) for everyone, also with an empty window.

        Eligible are available items that are not in a user's seen. A pure function of its arguments: no clock, no
        randomness, and a user's list is the same in any batch, because encoding and cosines come in blocks
        of one shape, and all else row by row.
        threads: blocks that are computed at a time. Calls must not overlap.
        """
        table = self.table(catalogue)
        ranker = self.ranker if self.ranker_enabled else None

        def arrays(part: tuple[Windows, int]) -> list[np.ndarray]:
            block, count = part
            vectors = self._encode_block(block, table)
            lists = recommend_block(block.slice(0, count), vectors, table, self.sources, ranker, k)
            return [lists.rows, lists.scores, lists.strategies, lists.because, lists.vectors]

        with _one_core_each(threads) as pool:
            parts = list(pool.map(arrays, _blocks(self._fit_windows(windows), threads)))
        if not parts:
            return empty_lists(0, k, self.width)
        rows, scores, strategies, because, users = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Lists(rows, scores, strategies, because, users)

    def table(self, catalogue: Catalogue) -> Prepared:
        """The catalogue as this model sees it; kept for the next call with the same object."""
        # The same catalogue serves many batches; one lookup of every id per batch would cost more than the batch.
        if self._prepared is None or self._prepared.catalogue is not catalogue:
            if catalogue.vectors.shape[1:] != (self.width,):
                raise ArtifactError(
                    f"the catalogue's vectors have shape {catalogue.vectors.shape}, the model needs width {self.width}"
                )
            members = [(m.name, m.items.sizes.width, m.weight) for m in self.members]
            self._prepared = prepare(catalogue, self.row_of, members, self.sources)
        return self._prepared

    def _fit_windows(self, windows: Windows) -> Windows:
        """Windows of exactly window_length places, the events moved together to the right."""
        length = self.window_length
        order = np.argsort(windows.items > 0, axis=1, kind="stable")
        arrays = [
            np.take_along_axis(a, order, 1)[:, -length:]
            for a in (windows.items, windows.types, windows.times, windows.values)
        ]
        short = length - arrays[0].shape[1]
        items, types, times, values = (np.pad(a, ((0, 0), (max(short, 0), 0))) for a in arrays)
        types = np.where((types <= len(self.event_types)) & (items > 0), types, 0)
        return replace(windows, items=items, types=types, times=np.where(items > 0, times, 0), values=values)

    def _encode_block(self, windows: Windows, table: Prepared) -> np.ndarray:
        parts = []
        for member, vectors in zip(self.members, table.padded_members, strict=True):
            length = member.sequence.sizes.window
            items = windows.items[:, -length:].astype(np.int64)
            batch = sequence_batch(
                torch.from_numpy(vectors)[torch.from_numpy(items)],
                windows.types[:, -length:],
                windows.times[:, -length:],
                windows.values[:, -length:],
                items > 0,
                windows.users,
            )
            with torch.no_grad():
                user = member.sequence.last(batch).numpy()
            parts.append(user * np.float32(member.weight**0.5))
        return unit(np.concatenate(parts, 1))


@contextmanager
def _one_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch has none of its own: those would get into the other blocks' way."""
    own = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(own)


def _encode_items(encoder: ItemEncoder, features: ItemFeatures, ids: np.ndarray) -> np.ndarray:
    """float32 [M, D], in padded blocks of ITEM_BLOCK items."""
    out = np.zeros((len(ids), encoder.sizes.width), np.float32)
    for start in range(0, len(ids), ITEM_BLOCK):
        rows = np.minimum(np.arange(start, start + ITEM_BLOCK), len(ids) - 1)
        with torch.no_grad():
            vectors = encoder(item_batch(features.take(rows), ids[rows])).numpy()
        stop = min(start + ITEM_BLOCK, len(ids))
        out[start:stop] = vectors[: stop - start]
    return out


def _blocks(windows: Windows, threads: int = 1) -> list[tuple[Windows, int]]:
    """Blocks of exactly BLOCK users, filled up with their own last one, and how many of each count: about equally many.

    There are as few as there can be, or a few more, so that each of the threads gets as many.
    """
    fewest = -(-len(windows) // BLOCK)
    count = min(-(-fewest // threads) * threads, max(fewest, len(windows) // _WORTH_A_BLOCK))
    ends = [len(windows) * place // max(count, 1) for place in range(count + 1)]
    out = []
    for start, stop in itertools.pairwise(ends):
        part = windows.slice(start, stop)
        if missing := BLOCK - (stop - start):
            rows = np.minimum(np.arange(BLOCK), stop - start - 1)
            offsets = np.concatenate([part.seen_offsets, np.repeat(part.seen_offsets[-1:], missing)])
            part = Windows(
                part.items[rows],
                part.types[rows],
                part.times[rows],
                part.values[rows],
                part.users.take(rows),
                part.seen,
                offsets,
            )
        out.append((part, stop - start))
    return out
