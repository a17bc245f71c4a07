"""The catalogue under one model: encoding items to embeddings, and packing model and catalogue for the workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.errors import TableError
from nightstream.models.bundle import Bundle, Loaded, encode_catalogue
from nightstream.models.features import transform_items
from nightstream.store import registry
from nightstream.store.materialize import Cut, cut
from nightstream.store.merge import Merge, When
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEM_EMBEDDINGS, ITEMS

CONTENT = ("title", "text", "categories", "numbers")


def known_items(items: DataFrame, events: DataFrame) -> DataFrame:
    """ITEMS rows for all items that are described or occur in an event; one that only occurs has no content."""
    occurring = events.where(F.col("item_id").isNotNull()).select("item_id").distinct()
    described = items.withColumn("described", F.lit(True))
    return (
        occurring.join(described, "item_id", "full_outer")
        .withColumn("available", F.coalesce("available", F.lit(True)))
        .select(*ITEMS.schema.names)
    )


def embed(items: DataFrame, bundle: Bundle) -> DataFrame:
    """ITEMS rows -> ITEM_EMBEDDINGS rows under the bundle's model, encoded on the executors."""
    rows = items.select("item_id", *CONTENT, content_hash().alias("content_hash"))
    return rows.mapInArrow(_encoder(bundle), ITEM_EMBEDDINGS.schema)


def content_hash() -> Column:
    """16 hex digits of sha256 over what an item is encoded from."""
    return F.substring(F.sha2(F.to_json(F.struct(*CONTENT)), 256), 1, 16)


def _encoder(bundle: Bundle) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        loaded: Loaded | None = None
        for batch in batches:
            if not batch.num_rows:
                continue
            loaded = loaded or bundle.load()
            table = pa.Table.from_batches([batch])
            ids = table["item_id"].to_pylist()
            vectors = loaded.model.encode_items(transform_items(table, loaded.statistics), ids)
            known = set(loaded.model.item_ids)
            offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * vectors.shape[1])
            columns = {
                "model_version": pa.array([bundle.model_version] * len(ids)),
                "item_id": pa.array(ids, pa.string()),
                "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1).astype(np.float32))),
                "from_content": pa.array([i not in known for i in ids]),
                "content_hash": batch.column("content_hash"),
            }
            yield pa.record_batch(
                [columns[n] for n in ITEM_EMBEDDINGS.schema.names], names=ITEM_EMBEDDINGS.schema.names
            )

    return encode


def load_bundle(storage: Storage, version: str, files: dict[str, bytes] | None = None) -> Bundle:
    """A version with its catalogue as the tables have it now; both are bounded by what one worker must hold.

    catalogue_version is a hash of the catalogue's content, so it moves only when that does.
    Raises TableError where the version has no embeddings.
    """
    storage.create(ITEMS)
    table = storage.query(
        "SELECT e.item_id, i.title, coalesce(i.available, true) AS available, e.vector FROM {item_embeddings} e "
        "LEFT JOIN {items} i ON e.item_id = i.item_id WHERE e.model_version = :version",
        ITEM_EMBEDDINGS,
        ITEMS,
        version=version,
    )
    if not table.num_rows:
        raise TableError(
            f"model {version} has no rows in {ITEM_EMBEDDINGS.name}; publish another version or train anew"
        )
    return _packed(version, files or registry.load_artifacts(storage, version), table)


def _packed(version: str, files: dict[str, bytes], table: pa.Table) -> Bundle:
    content = encode_catalogue(table)
    return Bundle(version, hashlib.sha256(content).hexdigest()[:12], files, content)


def bundle_of(name: str, files: dict[str, bytes], items: DataFrame) -> Bundle:
    """A bundle that no table holds: the files of a model with the embeddings of `items` (ITEMS rows), made for this.

    Both are bounded by what one worker must hold.
    """
    embedded = embed(items, Bundle(name, "", files, NO_ITEMS)).select("item_id", "vector")
    table = items.join(embedded, "item_id").select("item_id", "title", "available", "vector").toArrow()
    return _packed(name, files, table)


def embed_changed(storage: Storage, items: DataFrame, bundle: Bundle, attempts: int) -> int:
    """Encode those ITEMS rows that have no embedding under the bundle's model yet, or one of an older content; returns
    how many there were."""
    present = storage.read_or_empty(ITEM_EMBEDDINGS).where(F.col("model_version") == bundle.model_version)
    before = present.select("item_id", F.col("content_hash").alias("_before"))
    changed = items.join(before, "item_id", "left").where(~content_hash().eqNullSafe(F.col("_before"))).persist()
    try:
        row = changed.agg(F.count(F.lit(1)).alias("all"), F.count("_before").alias("updated")).first()
        assert row is not None
        if row["updated"]:
            rows = cut(embed(changed, bundle), {}, size=row["all"], cached=False)
            storage.with_retries(lambda: _replace(storage, rows), attempts, ITEM_EMBEDDINGS.name)
        elif row["all"]:
            # An append, unlike a MERGE, meets no conflict with the night that writes its own model's embeddings.
            storage.append(ITEM_EMBEDDINGS, embed(changed, bundle))
        return int(row["all"])
    finally:
        changed.unpersist()


def _replace(storage: Storage, rows: Cut) -> None:
    same = "t.model_version = s.model_version AND t.item_id = s.item_id"
    storage.merge(ITEM_EMBEDDINGS, rows, Merge(same, (When("update"), When("insert"))))


NO_ITEMS = encode_catalogue(
    pa.table(
        {
            "item_id": pa.array([], pa.string()),
            "title": pa.array([], pa.string()),
            "available": pa.array([], pa.bool_()),
            "vector": pa.array([], pa.list_(pa.float32())),
        }
    )
)
