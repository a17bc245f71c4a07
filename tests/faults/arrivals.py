"""Event files that a stream may meet, one after the other: late, repeated, changed, taken back, malformed events."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import world

MALFORMED = (
    "no json",
    '{"user_id": "u001"',
    {"user_id": "u000"},
    {"user_id": "u1", "item_id": "i1", "event_time": "soon"},
)
TOO_FAR_AHEAD = 10**10


class Arrivals:
    """Files of a folder, made from a seed: the same seed gives the same files.

    users: known and unknown ones by number. An event may be of an item that nobody described.
    """

    def __init__(self, folder: Path, seed: int, users: int = 48, items: int = world.ITEMS + 1) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.users, self.items = users, items
        self.sent: list[dict[str, Any]] = []
        self.files = 0

    def drop(self, whole: bool = False) -> None:
        """The next file. whole: one that makes a micro-batch write everything that it can write."""
        rows: list[Any] = [self._event() for _ in range(self.rng.randrange(1, 7))]
        if whole or self.rng.random() < 0.2:
            rows += [self._repeated(), self.rng.choice(MALFORMED)]
        if whole or self.rng.random() < 0.1:
            rows += [self._changed(), self._changed(), self._taken_back()]
        self.sent += [r for r in rows if isinstance(r, dict) and r.get("event_type") == "view"]
        self.rng.shuffle(rows)
        world.drop(self.folder, f"f{self.files:05}", rows)
        self.files += 1

    def keep_coming(self, backlog: Callable[[], int], stop: threading.Event, most: int = 6) -> None:
        """Drop files, at odd moments, as long as fewer than `most` are waiting; until stop."""
        while not stop.wait(self.rng.uniform(0.1, 1.5)):
            if backlog() < most:
                self.drop()

    def _event(self, **told: Any) -> dict[str, Any]:
        """Late by seconds to some days; one in thirty by a clock that is far ahead."""
        when = time.time() - 10 ** self.rng.uniform(0, 5.5)
        if self.rng.random() < 0.03:
            when = TOO_FAR_AHEAD
        return {
            "event_id": f"live{len(self.sent)}-{self.rng.randrange(10**9)}",
            "user_id": f"u{self.rng.randrange(self.users):03}",
            "item_id": f"i{self.rng.randrange(self.items):02}",
            "event_type": "view",
            "event_time": int(when),
            **told,
        }

    def _known(self) -> dict[str, Any]:
        return dict(self.rng.choice(self.sent or [self._event()]))

    def _repeated(self) -> dict[str, Any]:
        return self._known()

    def _changed(self) -> dict[str, Any]:
        """Another event of the same user under a known id, mostly a later one, which takes its place. (Were it another
        user's, the former user would stay known to a stream that had met the first one, and only to that.)"""
        known = self._known()
        return self._event(
            event_id=known["event_id"], user_id=known["user_id"], event_time=int(time.time()) - self.rng.randrange(60)
        )

    def _taken_back(self) -> dict[str, Any]:
        return self._event(event_type="retract", item_id=None, retracts=self._known()["event_id"])
