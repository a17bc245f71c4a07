"""What was rejected and why, for a person in one line."""

from __future__ import annotations

from nightstream.store.storage import Storage
from nightstream.store.tables import QUARANTINE

_REASONS = """
SELECT reason, field, count(*) AS rows FROM {quarantine} GROUP BY reason, field ORDER BY rows DESC, reason, field
"""
_EXAMPLE = "SELECT payload FROM {quarantine} WHERE reason = :reason AND field = :field LIMIT 1"
_LONGEST_EXAMPLE = 200


def summary(storage: Storage) -> str | None:
    """How many payloads are in quarantine, the two most frequent reasons, and a payload with the first; None for
    none."""
    storage.create(QUARANTINE)
    reasons = storage.query(_REASONS, QUARANTINE).to_pylist()
    if not reasons:
        return None
    count, first = sum(row["rows"] for row in reasons), reasons[0]
    listed = ", ".join(f"{row['field']} {row['reason']} ({row['rows']:,})" for row in reasons[:2])
    # Asked for by itself: payloads are long, and the counts need none of them.
    example = storage.query(_EXAMPLE, QUARANTINE, reason=first["reason"], field=first["field"])["payload"][0].as_py()
    example = " ".join(example.split())
    if len(example) > _LONGEST_EXAMPLE:
        example = example[:_LONGEST_EXAMPLE] + "…"
    return f"{count:,} payloads are in quarantine, most of them for {listed}; such as {example}"
