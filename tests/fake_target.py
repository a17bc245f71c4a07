"""A key-value target in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from nightstream.serving.key_value import Record, Written


class Fake:
    """A target in memory. on_write: called before each write, with the target."""

    name = "the fake"

    def __init__(self, on_write: Callable[[Fake], None] = lambda target: None) -> None:
        self.values: dict[str, Record] = {}
        self.kept: str | None = None
        self.connections = 0
        self.sent: list[list[str]] = []
        self.on_write = on_write

    def connect(self) -> None:
        self.connections += 1

    def write(self, records: Sequence[Record]) -> Written:
        self.on_write(self)
        users = [record.user_id for record in records]
        assert len(set(users)) == len(users)
        self.sent.append(users)
        newer = [r for r in records if r.user_id not in self.values or r.revision > self.values[r.user_id].revision]
        self.values |= {record.user_id: record for record in newer}
        return Written(frozenset(record.user_id for record in newer))

    def position(self) -> str | None:
        return self.kept

    def move(self, before: str | None, after: str) -> bool:
        if self.kept != before:
            return False
        self.kept = after
        return True

    def close(self) -> None:
        pass

    def copy(self) -> dict:
        """As refreshes.newest."""
        return {
            user: (r.revision, r.model_version, r.as_of, r.refreshed_at, json.loads(r.items))
            for user, r in self.values.items()
        }

    def revisions(self) -> dict[str, int]:
        return {user: record.revision for user, record in self.values.items()}
