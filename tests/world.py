"""A small made-up world: two groups of users, each walking along its own ring of items: the next item is known."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

ITEMS = 24
START = 1_700_000_000


def events(users: int = 40, per_user: int = 12, seed: int = 3) -> list[dict[str, Any]]:
    """JSON-ready events in time order: user u of group g walks its ring of ITEMS / 2 items with small jumps."""
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        group, place = user % 2, rng.randrange(ITEMS // 2)
        for step in range(per_user):
            item = group * (ITEMS // 2) + place % (ITEMS // 2)
            when = START + step * 3600 + rng.randrange(3000)
            rows.append(
                {
                    "event_id": f"e{user:03}-{step:03}",
                    "user_id": f"u{user:03}",
                    "item_id": f"i{item:02}",
                    "event_type": "view",
                    "event_time": when,
                    "value": 1.0,
                }
            )
            place += 1
    return sorted(rows, key=lambda r: (r["event_time"], r["event_id"]))


def items() -> list[dict[str, Any]]:
    return [
        {"item_id": f"i{n:02}", "title": f"Item {n}", "group": "left" if n < ITEMS // 2 else "right", "size": float(n)}
        for n in range(ITEMS)
    ]


def users(count: int = 40) -> list[dict[str, Any]]:
    """All users of `events`, and two that never did anything."""
    named = [f"u{n:03}" for n in range(count)] + ["idle-left", "idle-right"]
    return [{"user_id": u, "side": "right" if (u[-1] in "13579" or u == "idle-right") else "left"} for u in named]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def drop(folder: str | Path, name: str, rows: list[Any]) -> None:
    """A file for a stream, appearing whole."""
    hidden = write_lines(Path(folder) / f".{name}.jsonl", rows)
    os.replace(hidden, Path(folder) / f"{name}.jsonl")


def sources(folder: Path) -> dict[str, Any]:
    """The `sources` section for a world written below `folder`."""
    columns = ("event_id", "user_id", "item_id", "event_type", "event_time", "value", "retracts")
    return {
        "events": {
            "format": "jsonl",
            "path": str(folder / "events.jsonl"),
            "columns": {c: c for c in columns},
            "time_unit": "seconds",
        },
        "items": {
            "format": "jsonl",
            "path": str(folder / "items.jsonl"),
            "id": "item_id",
            "title": "title",
            "text": ["title"],
            "categories": {"group": None},
            "numbers": ["size"],
        },
        "users": {
            "format": "jsonl",
            "path": str(folder / "users.jsonl"),
            "id": "user_id",
            "categories": {"side": None},
            "numbers": [],
        },
    }


def placed(document: dict, folder: Path) -> dict:
    """A settings document with everything that is written below `folder`."""
    document["storage"] |= {"root": str(folder / "tables"), "work_dir": str(folder / "work")}
    document["stream"] |= {"path": str(folder / "stream"), "checkpoint": str(folder / "checkpoint")}
    return document
