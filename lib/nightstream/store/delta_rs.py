"""Delta tables in a folder of this machine, read and written without Spark, by delta-rs.

What it writes is small and lies in this process: to plan and to start a Spark job for it takes longer than to write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, QueryBuilder, Schema, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from nightstream.errors import TableError, WriterBusyError
from nightstream.store.fence import APPLICATION, Fence
from nightstream.store.merge import Action, Merge, Replacement, in_buckets
from nightstream.store.sql_text import Value, for_datafusion
from nightstream.store.tables import TableSpec, arrow_schema

_CLAUSES: dict[Action, str] = {
    "update": "when_matched_update_all",
    "insert": "when_not_matched_insert_all",
    "delete": "when_matched_delete",
}
# Up to two million users, of 128 to 256 users each: with some kB a user, some hundred MB.
_BUCKETS_AT_A_TIME = 512
# Bytes of files, compressed.
_LARGEST_WHOLE = 256_000_000
TAKEN_OVER = "the tables were taken over by another process; start this process again"


class DeltaRs:
    """The tables below a folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, spec: TableSpec) -> str:
        return f"{self.root}/{spec.name}"

    def exists(self, spec: TableSpec) -> bool:
        return DeltaTable.is_deltatable(self.path(spec))

    def create(self, spec: TableSpec) -> None:
        """Create the table, empty, unless it is there."""
        DeltaTable.create(
            self.path(spec),
            schema=Schema.from_json(spec.schema.json()),
            mode="ignore",
            description=spec.grain,
            configuration=spec.properties,
        )

    def version(self, spec: TableSpec) -> int:
        """The number of the newest commit."""
        return self.open(spec).version()

    def open(self, spec: TableSpec) -> DeltaTable:
        """The table at its newest version; its columns are checked against the spec. TableError where it is missing."""
        try:
            table = DeltaTable(self.path(spec))
        except TableNotFoundError as error:
            raise TableError.missing(spec.name, self.path(spec)) from error
        spec.check(field.name for field in table.schema().fields)
        return table

    def seal(self, spec: TableSpec, fence: Fence) -> None:
        """A commit of nothing but the fence's epoch."""
        self.append(spec, arrow_schema(spec.schema).empty_table(), fence)

    def append(self, spec: TableSpec, rows: pa.Table, fence: Fence | None = None) -> None:
        """Append rows in one commit. Raises WriterBusyError where the fence is behind."""
        rows = rows.select(spec.schema.names).cast(arrow_schema(spec.schema))
        self._commit(spec, fence, lambda table, how: write_deltalake(table, rows, mode="append", commit_properties=how))

    def merge(self, spec: TableSpec, rows: pa.Table, merge: Merge, fence: Fence | None = None) -> None:
        """MERGE rows in one commit. Raises WriterBusyError where the fence is behind."""

        def run(table: DeltaTable, how: CommitProperties) -> None:
            builder = table.merge(rows, merge.on, source_alias="s", target_alias="t", commit_properties=how)
            merge.add_to(builder, _CLAUSES).execute()

        self._commit(spec, fence, run)

    def replace(
        self,
        spec: TableSpec,
        rows: pa.Table,
        replacement: Replacement,
        buckets: Sequence[int] | None,
        fence: Fence | None = None,
    ) -> None:
        """Put rows in the place of older ones of their users, by writing their buckets, or a table without, anew.

        A MERGE takes as long, for nested columns in many files out of all proportion, and writes texts as string_view,
        on which Arrow's readers can't filter. At most _BUCKETS_AT_A_TIME go into one commit, because their rows lie in
        memory; a table that is too large for that and has no buckets yet is merged.

        Args:
            spec: the table.
            rows: with its columns.
            replacement: which rows are the same.
            buckets: all that the rows are in; None for a table that has one.
            fence: of the writer.

        Raises:
            CommitFailedError: a concurrent writer got ahead.
            WriterBusyError: the fence is behind.
        """
        if not rows.num_rows:
            return
        if buckets is None:
            sizes = pa.table(self.open(spec).get_add_actions(flatten=True))["size_bytes"]
            if (pc.sum(sizes).as_py() or 0) > _LARGEST_WHOLE:
                self.merge(spec, rows, replacement.as_merge(None), fence)
            else:
                self._replace(spec, rows, replacement, "true", fence)
            return
        for start in range(0, len(buckets), _BUCKETS_AT_A_TIME):
            some = buckets[start : start + _BUCKETS_AT_A_TIME]
            of_these = rows.filter(pc.is_in(rows["bucket"], value_set=pa.array(some, rows["bucket"].type)))
            self._replace(spec, of_these, replacement, in_buckets(some), fence)

    def _replace(
        self, spec: TableSpec, rows: pa.Table, replacement: Replacement, within: str, fence: Fence | None
    ) -> None:
        kinds = arrow_schema(spec.schema)

        def run(table: DeltaTable, how: CommitProperties) -> None:
            columns = ", ".join(map(_quoted, spec.schema.names))
            found = (
                QueryBuilder().register(spec.name, table).execute(f"SELECT {columns} FROM {spec.name} WHERE {within}")
            )
            held = plain(pa.table(found.read_all())).cast(kinds)
            after = replacement.applied(held, rows.select(spec.schema.names).cast(kinds))
            write_deltalake(table, after, mode="overwrite", predicate=within, commit_properties=how)

        self._commit(spec, fence, run)

    def swap(self, spec: TableSpec, rows: pa.Table, version: int) -> bool:
        """Replace the content of the table, if that version is still its newest; returns whether it was."""
        table = DeltaTable(self.path(spec), version=version)
        try:
            how = CommitProperties(max_commit_retries=0)
            write_deltalake(table, rows.cast(arrow_schema(spec.schema)), mode="overwrite", commit_properties=how)
        except CommitFailedError:
            return False
        return True

    def query(self, sql: str, specs: Sequence[TableSpec], values: Mapping[str, Value]) -> pa.Table:
        """What a query answers, see Storage.query."""
        builder = QueryBuilder()
        for spec in specs:
            builder.register(spec.name, self.open(spec))
        return plain(pa.table(builder.execute(for_datafusion(sql, values)).read_all()))

    def batches(self, spec: TableSpec, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The table's rows, some thousands at a time."""
        builder = QueryBuilder().register(spec.name, self.open(spec))
        kinds = pa.schema([arrow_schema(spec.schema).field(name) for name in columns])
        for batch in builder.execute(f"SELECT {', '.join(map(_quoted, columns))} FROM {spec.name}"):
            yield from pa.Table.from_batches([pa.record_batch(batch)]).cast(kinds).combine_chunks().to_batches()

    def _commit(
        self, spec: TableSpec, fence: Fence | None, write: Callable[[DeltaTable, CommitProperties], None]
    ) -> None:
        table = self.open(spec)
        if fence is None:
            write(table, CommitProperties())
            return
        _check(table, fence)
        try:
            write(table, CommitProperties(app_transactions=[Transaction(APPLICATION, fence.next())]))
        except CommitFailedError:
            _check(self.open(spec), fence)
            raise


def _check(table: DeltaTable, fence: Fence) -> None:
    if fence.is_behind(table.transaction_version(APPLICATION)):
        raise WriterBusyError(TAKEN_OVER)


def plain(table: pa.Table) -> pa.Table:
    """The table with the types that Arrow's functions know: DataFusion gives views of texts and bytes."""
    return table.cast(pa.schema([_plain_field(field) for field in table.schema]))


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_type(field.type))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_field(kind.item_field))
    return kind


def _quoted(name: str) -> str:
    return f'"{name}"'
