"""The demo's report: one HTML page that works without a network, from plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any, TypedDict

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nightstream.monitoring import report_figures
from nightstream.monitoring.measurements import percentile

# So much of the full width has the bar of a list's lowest score, in percent: a mark to see.
LOWEST_BAR = 6.0

# An epoch of one training run: encoder, stage ("first-…" is validated, "refit-…" is not), epoch from 1, loss, NDCG@10.
EpochRow = TypedDict(
    "EpochRow", {"encoder": str, "stage": str, "epoch": int, "loss": float, "ndcg@10": float | None}, total=False
)
# A row of evaluation.scores. delay_s None: the state as of the cut. users: all | known | unknown.
QualityRow = TypedDict(
    "QualityRow",
    {
        "delay_s": float | None,
        "users": str,
        "events": int,
        "hr@5": float,
        "ndcg@5": float,
        "hr@10": float,
        "ndcg@10": float,
        "hr@20": float,
        "ndcg@20": float,
        "coverage": float | None,
    },
    total=False,
)


class ListEntry(TypedDict):
    """One recommended item, as the serving table has it, with its title."""

    rank: int
    item_id: str
    title: str
    score: float
    strategy: str
    reason: str


class WindowEntry(TypedDict):
    """One event of the example user's window, newest first."""

    event_time: datetime
    item_id: str
    title: str
    event_type: str
    value: float | None


class Example(TypedDict):
    """One user: the list of the night, the window after the stream, the list after the stream."""

    user_id: str
    before: list[ListEntry]
    after: list[ListEntry]
    window: list[WindowEntry]


class Summary(TypedDict):
    """ingest: counts, nested by a name at most once or twice. stream: batches, events, users, events_replayed.

    delays: seconds from the arrival of the oldest event of each micro-batch to its commit. metrics: of the model.
    seconds: how long the whole demo took.
    """

    ingest: dict[str, Any]
    stream: dict[str, Any]
    delays: list[float]
    metrics: dict[str, float]
    seconds: float


def demo_report(
    history: Sequence[Mapping[str, Any]],
    quality: Sequence[Mapping[str, Any]],
    example: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    """The page as text. Anything may be empty: its section then says so.

    Nothing is loaded from anywhere; plotly lies in the page once.

    Args:
        history: EpochRow each.
        quality: QualityRow each.
        example: Example.
        summary: Summary.
    """
    charts = {
        "training": report_figures.training(history),
        "quality": report_figures.quality(quality),
        "delays": report_figures.delays(summary.get("delays", [])),
    }
    before, after = example.get("before", []), example.get("after", [])
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("nightstream.monitoring").joinpath("report_page.html").read_text(encoding="utf-8")
    )
    return page.render(
        tiles=_tiles(quality, summary),
        charts=charts,
        figures=report_figures.figures(charts.values()),
        quality=_quality_rows(quality),
        user=example.get("user_id", ""),
        lists=[
            ("The list of the night", _ranked(before, None)),
            ("The list after the stream", _ranked(after, before)),
        ],
        window=[_window_row(entry) for entry in example.get("window", [])],
        ingest=[(name, f"{count:,}") for name, count in _flat(summary.get("ingest", {}))],
        plotly=Markup(get_plotlyjs()),
    )


def bars(scores: Sequence[float]) -> list[float]:
    """The width of each score's bar in percent: even steps from LOWEST_BAR for the lowest to 100 for the best.

    Scores may be negative and have no zero of their own: only their order and their distances say something.
    """
    low, best = min(scores, default=0.0), max(scores, default=0.0)
    if low == best:
        return [100.0] * len(scores)
    return [LOWEST_BAR + (100.0 - LOWEST_BAR) * (score - low) / (best - low) for score in scores]


def _tiles(quality: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures on top: value, name, note."""
    stream, delays = summary.get("stream", {}), summary.get("delays", [])
    everyone = {row["delay_s"]: row for row in quality if row["users"] == "all"}
    tiles: list[tuple[str, str, str]] = []
    live = min((d for d in everyone if d is not None), default=None)
    if live is not None:
        note = "in the list just before each event"
        if everyone.get(None):
            note += f"; {everyone[None]['hr@10']:.1%} with the lists of the night"
        tiles.append((f"{everyone[live]['hr@10']:.1%}", "hit rate at 10", note))
    if stream:
        tiles.append(
            (f"{stream.get('events', 0):,}", "events through the stream", f"{stream.get('batches', 0):,} micro-batches")
        )
        tiles.append((f"{stream.get('users', 0):,}", "lists refreshed", "one per user and micro-batch"))
    if delays:
        note = f"95 % within {percentile(delays, 95):.1f} s"
        tiles.append((f"{percentile(delays, 50):.1f} s", "from arrival to a new list", note))
    if "seconds" in summary:
        tiles.append((_duration(summary["seconds"]), "for everything", "from the first file to this page"))
    return tiles


def _quality_rows(quality: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            report_figures.delay_name(row["delay_s"]),
            row["users"],
            f"{row['events']:,}",
            *(f"{row[k]:.4f}" for k in ("hr@10", "ndcg@10", "ndcg@20")),
            "" if row.get("coverage") is None else f"{row['coverage']:.1%}",
        ]
        for row in sorted(quality, key=lambda r: (r["delay_s"] is None, r["delay_s"] or 0, r["users"]))
    ]


def _window_row(entry: Mapping[str, Any]) -> list[str]:
    when, value = entry["event_time"], entry.get("value")
    shown = f"{when:%Y-%m-%d %H:%M}" if isinstance(when, datetime) else str(when)
    return [shown, entry["title"], entry["event_type"], "" if value is None else f"{value:g}"]


def _ranked(entries: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Each entry with the width of its bar and, where there was an earlier list, how it moved since."""
    ranks = {e["item_id"]: e["rank"] for e in earlier or ()}
    return [
        {
            **entry,
            "bar": f"{bar:.0f}",
            "score": f"{entry['score']:.3f}",
            "moved": _moved(ranks.get(entry["item_id"]), entry["rank"]) if earlier else None,
        }
        for entry, bar in zip(entries, bars([e["score"] for e in entries]), strict=True)
    ]


def _moved(old: int | None, new: int) -> tuple[str, str] | None:
    """Class and text of the mark; None where the item kept its rank."""
    if old is None:
        return "new", "new"
    if old == new:
        return None
    return ("up", f"▲ {old - new}") if new < old else ("down", f"▼ {new - old}")


def _flat(counts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Nested counts as one list of (name, number)."""
    pairs: list[tuple[str, float]] = []
    for key, value in counts.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            pairs += _flat(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            pairs.append((name, value))
    return pairs


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
