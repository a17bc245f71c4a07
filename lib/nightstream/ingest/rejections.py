"""What was rejected and why, for a person in one line."""

from __future__ import annotations

from nightstream.store.storage import Storage
from nightstream.store.tables import QUARANTINE

_REASONS = """
SELECT reason, field, count(*) AS rows, min(payload) AS example
FROM {quarantine} GROUP BY reason, field ORDER BY rows DESC, reason, field LIMIT 2
"""
_LONGEST_EXAMPLE = 200


def summary(storage: Storage) -> str | None:
    """How many payloads are in quarantine, the two most frequent reasons, and a payload with the first; None for
    none."""
    storage.create(QUARANTINE)
    count = storage.query("SELECT count(*) AS rows FROM {quarantine}", QUARANTINE)["rows"][0].as_py()
    if not count:
        return None
    reasons = storage.query(_REASONS, QUARANTINE).to_pylist()
    listed = ", ".join(f"{row['field']} {row['reason']} ({row['rows']:,})" for row in reasons)
    example = " ".join(reasons[0]["example"].split())
    if len(example) > _LONGEST_EXAMPLE:
        example = example[:_LONGEST_EXAMPLE] + "…"
    return f"{count:,} payloads are in quarantine, most of them for {listed}; such as {example}"
