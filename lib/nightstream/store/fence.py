"""The fence: what a process writes after another one has taken its lease is refused, or has no effect.

Each taking of the lease has a number, the epoch, greater than all before. Who takes the lease seals the tables that it
is about, by a commit that carries the epoch, before reading any of them; each later commit carries it, too, as one of
Delta's application transactions. A commit under an older epoch then meets a greater one in the table's log: delta-rs
refuses it, Spark leaves it out, and where the seal comes while it runs, the commit fails.
(Delta transaction protocol, «Transaction identifiers»; fencing tokens after Kleppmann, «How to do distributed locking»,
2016.)
"""

from __future__ import annotations

import itertools

APPLICATION = "nightstream lease"
_WRITES = 2**32


class Fence:
    """The versions of the application transaction that the commits under one epoch carry."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._count = itertools.count()

    def next(self) -> int:
        """Greater than all before: Spark leaves a write out whose version a table has already."""
        return self.epoch * _WRITES + next(self._count)

    def is_behind(self, version: int | None) -> bool:
        """Whether a commit of that version came under a later epoch. None: there is no such commit."""
        return version is not None and version // _WRITES > self.epoch
