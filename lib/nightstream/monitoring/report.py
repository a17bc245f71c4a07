"""The demo's report: one HTML page that works without a network, from plain dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, TypedDict

from plotly.offline import get_plotlyjs

from nightstream.monitoring import report_figures
from nightstream.monitoring.measurements import percentile

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
    """The page as text.

    history: EpochRow; quality: QualityRow; example: Example; summary: Summary. Anything may be empty: its section then
    says so. Nothing is loaded from anywhere; plotly lies in the page once.
    """
    figures = {
        "training": report_figures.training(history),
        "quality": report_figures.quality(quality),
        "delays": report_figures.delays(summary.get("delays", [])),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    page = Template(files("nightstream.monitoring").joinpath("report_page.html").read_text(encoding="utf-8"))
    return page.substitute(
        tiles=_tiles(quality, summary),
        training=_figure("training", drawn, "No encoder was trained in this run."),
        quality=_figure("quality", drawn, "No event was replayed, so there is nothing to measure."),
        quality_table=_quality_table(quality),
        user=escape(str(example.get("user_id", ""))),
        window=_window(example.get("window", [])),
        before=_list(example.get("before", []), []),
        after=_list(example.get("after", []), example.get("before", [])),
        ingest=_counts(summary.get("ingest", {})),
        delays=_figure("delays", drawn, "No micro-batch ran."),
        # "</" would end the script element, whatever string it stands in.
        figures=json.dumps(drawn).replace("</", "<\\/"),
        plotly=get_plotlyjs(),
    )


def _tiles(quality: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
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
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>'
        for value, name, note in tiles
    )


def _figure(name: str, drawn: Mapping[str, Any], otherwise: str) -> str:
    return f'<div class="figure" id="{name}"></div>' if name in drawn else f"<p class='none'>{escape(otherwise)}</p>"


def _quality_table(quality: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            report_figures.delay_name(row["delay_s"]),
            row["users"],
            f"{row['events']:,}",
            *(f"{row[k]:.4f}" for k in ("hr@10", "ndcg@10", "ndcg@20")),
            "" if row.get("coverage") is None else f"{row['coverage']:.1%}",
        ]
        for row in sorted(quality, key=lambda r: (r["delay_s"] is None, r["delay_s"] or 0, r["users"]))
    ]
    return _table(["delay", "users", "events", "HR@10", "NDCG@10", "NDCG@20", "coverage"], rows, numbers_from=2)


def _window(entries: Sequence[Mapping[str, Any]]) -> str:
    def line(entry: Mapping[str, Any]) -> list[str]:
        when, value = entry["event_time"], entry.get("value")
        shown = f"{when:%Y-%m-%d %H:%M}" if isinstance(when, datetime) else str(when)
        return [shown, entry["title"], entry["event_type"], "" if value is None else f"{value:g}"]

    return _table(["when", "item", "event", "value"], [line(e) for e in entries], numbers_from=3)


def _list(entries: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> str:
    """A ranked list; with `earlier`, each entry also says how it moved."""
    if not entries:
        return "<p class='none'>No list.</p>"
    ranks = {e["item_id"]: e["rank"] for e in earlier}
    top = max(abs(e["score"]) for e in entries) or 1.0
    lines = []
    for entry in entries:
        width = max(0.0, 100 * entry["score"] / top)
        moved = _moved(ranks.get(entry["item_id"]), entry["rank"]) if earlier else ""
        lines.append(
            f"<li><span class='rank'>{entry['rank']}</span><div class='what'><b>{escape(entry['title'])}</b>{moved}"
            f"<small>{escape(entry['reason'])}</small></div>"
            f"<div class='score'><i style='width:{width:.0f}%'></i><span>{entry['score']:.3f}</span></div></li>"
        )
    return f"<ol class='list'>{''.join(lines)}</ol>"


def _moved(old: int | None, new: int) -> str:
    if old is None:
        return "<em class='new'>new</em>"
    if old == new:
        return ""
    return f"<em class='up'>▲ {old - new}</em>" if new < old else f"<em class='down'>▼ {new - old}</em>"


def _counts(counts: Mapping[str, Any]) -> str:
    """Nested counts as one table of (name, number)."""
    rows = list(_flat(counts))
    return _table(["", "rows"], [[name, f"{n:,}"] for name, n in rows], 1) if rows else "<p class='none'>No counts.</p>"


def _flat(counts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in counts.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            found += _flat(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name, value))
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    if not rows:
        return "<p class='none'>Nothing to show.</p>"

    def cells(values: Sequence[str], tag: str) -> str:
        kinds = ["" if i < numbers_from else " class='n'" for i in range(len(values))]
        return "".join(f"<{tag}{k}>{escape(str(v))}</{tag}>" for k, v in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{cells(heads, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
