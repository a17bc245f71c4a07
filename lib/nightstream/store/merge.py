"""What a MERGE does, said once for all engines: rows `s` go into a table `t`.

Conditions are SQL that Spark and DataFusion both read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
