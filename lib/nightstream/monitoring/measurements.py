"""What is measured over a stretch of time, and the rows of `metrics` that it becomes."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from nightstream.store.storage import Storage
from nightstream.store.tables import METRICS

SHARES = (50, 95, 99)
MOST_VALUES = 5_000


def write(storage: Storage, values: Mapping[str, float], version: str, at: datetime, labels: Mapping[str, str]) -> None:
    """Append one METRICS row per value, in one commit; no values, no commit."""
    if not values:
        return
    rows = [(name, float(value), version, dict(labels), at) for name, value in values.items()]
    storage.append_values(METRICS, rows)


class Interval:
    """Measurements of some micro-batches, by name, in bounded memory: of a distribution the newest MOST_VALUES count.

    Three kinds, by what becomes of them: sums, distributions in seconds, and peaks, of which the largest counts.
    """

    def __init__(self, begun: datetime) -> None:
        self.begun = begun
        self.sums: Counter[str] = Counter()
        self.seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST_VALUES))
        self.peaks: dict[str, float] = {}

    def add(
        self,
        sums: Mapping[str, float] | None = None,
        seconds: Mapping[str, float] | None = None,
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (sums or {}).items():
            self.sums[name] += value  # type: ignore[assignment]
        for name, value in (seconds or {}).items():
            self.seconds[name].append(value)
        for name, value in (peaks or {}).items():
            self.peaks[name] = max(value, self.peaks.get(name, value))

    def percentiles(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """<name>_p50_s, <name>_p95_s, <name>_p99_s of the distributions named, by default of all."""
        return {
            f"{name}_p{share}_s": percentile(self.seconds[name], share)
            for name in (sorted(self.seconds) if names is None else names)
            if self.seconds.get(name)
            for share in SHARES
        }

    def values(self, now: datetime) -> dict[str, float]:
        """All of it, and what follows from it.

        quarantined_share: of the payloads that arrived. input_rows_per_s: over the time since `begun`;
        processed_rows_per_s: over the time in which micro-batches ran.
        """
        sums = dict(self.sums)
        figures: dict[str, float] = {name: float(value) for name, value in sums.items()}
        arrived = sum(sums.get(name, 0) for name in ("events", "quarantined", "duplicates"))
        if arrived:
            figures["quarantined_share"] = sums.get("quarantined", 0) / arrived
        elapsed, rows = (now - self.begun).total_seconds(), sums.get("input_rows", 0)
        if elapsed > 0:
            figures["input_rows_per_s"] = rows / elapsed
        if sums.get("busy_s"):
            figures["processed_rows_per_s"] = rows / sums["busy_s"]
        return {**figures, **self.percentiles(), **self.peaks}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of the values do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))] if ordered else 0.0
