"""What a MERGE does, said once for all engines: rows `s` go into a table `t`.

Conditions are SQL that Spark and DataFusion both read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

Action = Literal["update", "insert", "delete"]


@dataclass(frozen=True)
class When:
    """One clause: what becomes of rows that have met a row of the table, or of those that have not (insert)."""

    action: Action
    condition: str | None = None


@dataclass(frozen=True)
class Merge:
    """on: which rows of s and t meet. clauses: the first that holds counts."""

    on: str
    clauses: tuple[When, ...]

    def add_to(self, builder: Any, names: dict[Action, str]) -> Any:
        """The builder of an engine with the clauses. names: of its methods."""
        for clause in self.clauses:
            builder = getattr(builder, names[clause.action])(clause.condition)
        return builder


@dataclass(frozen=True)
class Replacement:
    """Users' rows that take the place of all that a table holds of the same users, where their revision is higher.

    All rows of a user have one revision, in the table and among the new ones. key: columns that tell the table's rows
    apart, user_id among them. absent: None where each user has one row. Else a column: a new row in which it is null
    says that the user has no row of that key any more, and there is a new row for each key that the user may have had.
    """

    key: tuple[str, ...]
    absent: str | None = None

    def as_merge(self, buckets: Sequence[int] | None) -> Merge:
        """The same as a MERGE. buckets: those that the users are in, where the table has several; empty where these
        are not known."""
        newer = "s.revision > t.revision"
        clauses = [When("update", newer), When("insert")]
        if self.absent is not None:
            clauses.insert(0, When("delete", f"{newer} AND s.{self.absent} IS NULL"))
            clauses[-1] = When("insert", f"s.{self.absent} IS NOT NULL")
        same = self.key if buckets is None else ("bucket", *self.key)
        on = [f"t.{name} = s.{name}" for name in same]
        if buckets:
            on.append(f"t.{in_buckets(buckets)}")
        return Merge(" AND ".join(on), tuple(clauses))

    def applied(self, held: pa.Table, rows: pa.Table) -> pa.Table:
        """What a table holds afterwards that has held these rows before; both with the same columns."""
        place = pc.index_in(rows["user_id"], value_set=held["user_id"])
        newer = pc.or_kleene(pc.is_null(place), pc.greater(rows["revision"], held["revision"].take(place)))
        rows = rows.filter(newer)
        kept = held.filter(pc.invert(pc.is_in(held["user_id"], value_set=rows["user_id"])))
        if self.absent is not None:
            rows = rows.filter(pc.is_valid(rows[self.absent]))
        return pa.concat_tables([kept, rows])


def in_buckets(buckets: Sequence[int]) -> str:
    """The condition that leaves out the files of all other buckets."""
    return f"bucket IN ({', '.join(map(str, buckets))})"
