"""The report's charts as plotly JSON; the page gives them the colours of the reader's light or dark scheme."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Legible on a light and on a dark ground.
COLOURS = ("#3f8efc", "#e8743b", "#19a979", "#b565d9", "#d9a400", "#6c8893")
_USERS = {"all": COLOURS[0], "known": COLOURS[2], "unknown": COLOURS[1]}
_HEIGHT = 350


def training(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss and validation NDCG@10 per epoch, a line per encoder; None without a validated epoch."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        # A refit has no validation, and its loss is over other events: in one chart they would be compared.
        if not str(row.get("stage", "")).startswith("refit"):
            runs.setdefault(row["encoder"], []).append(row)
    if not runs:
        return None
    figure = make_subplots(
        1, 2, subplot_titles=("Training loss", "NDCG@10 on held-out events"), horizontal_spacing=0.09
    )
    for place, (encoder, rows) in enumerate(sorted(runs.items())):
        rows = sorted(rows, key=lambda r: r["epoch"])
        colour = COLOURS[place % len(COLOURS)]
        for column, key in ((1, "loss"), (2, "ndcg@10")):
            held = [r for r in rows if r.get(key) is not None]
            figure.add_scatter(
                x=[r["epoch"] for r in held],
                y=[r[key] for r in held],
                name=encoder,
                legendgroup=encoder,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 5},
                hovertemplate=f"{encoder}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="epoch", rangemode="tozero")
    figure.update_yaxes(rangemode="tozero", col=2)
    return _json(figure)


def quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """NDCG@10 and HR@10 by how late the state knows an event, a line per kind of user."""
    if not rows:
        return None
    delays = sorted({r["delay_s"] for r in rows if r["delay_s"] is not None})
    order = [*delays, *([None] if any(r["delay_s"] is None for r in rows) else [])]
    figure = make_subplots(1, 2, subplot_titles=("NDCG@10", "Hit rate at 10"), horizontal_spacing=0.09)
    for users, colour in _USERS.items():
        mine = {r["delay_s"]: r for r in rows if r["users"] == users}
        if not mine:
            continue
        held = [d for d in order if d in mine]
        events = max(r["events"] for r in mine.values())
        for column, key in ((1, "ndcg@10"), (2, "hr@10")):
            figure.add_scatter(
                x=[delay_name(d) for d in held],
                y=[mine[d][key] for d in held],
                name=f"{users} users ({events:,} events)",
                legendgroup=users,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": "solid" if users == "all" else "dot"},
                marker={"size": 8},
                hovertemplate=f"{users} users, %{{x}}: %{{y:.4f}}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="how late the list knows an event", type="category", categoryorder="array")
    figure.update_xaxes(categoryarray=[delay_name(d) for d in order])
    figure.update_yaxes(rangemode="tozero")
    return _json(figure)


def delays(seconds: Sequence[float]) -> dict[str, Any] | None:
    """The delay of each micro-batch, in order."""
    if not seconds:
        return None
    figure = go.Figure()
    figure.add_bar(
        x=list(range(1, len(seconds) + 1)),
        y=list(seconds),
        marker={"color": COLOURS[0]},
        name="delay",
        hovertemplate="micro-batch %{x}: %{y:.2f} s<extra></extra>",
    )
    figure.update_xaxes(title_text="micro-batch")
    figure.update_yaxes(title_text="seconds", rangemode="tozero")
    figure.update_layout(showlegend=False, bargap=0.15)
    return _json(figure)


def delay_name(delay_s: float | None) -> str:
    """A delay as readers say it; None is the state as of the cut."""
    if delay_s is None:
        return "night only"
    if delay_s == 0:
        return "at once"
    for unit, size in (("h", 3600), ("min", 60)):
        if delay_s >= size and delay_s % size == 0:
            return f"{delay_s / size:g} {unit}"
    return f"{delay_s:g} s"


def _json(figure: go.Figure) -> dict[str, Any]:
    figure.update_layout(
        template="none",
        height=_HEIGHT,
        margin={"l": 56, "r": 16, "t": 44, "b": 92},
        legend={"orientation": "h", "y": -0.34, "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(automargin=True, zeroline=False, title_font_size=13, title_standoff=8)
    figure.update_yaxes(automargin=True, zeroline=False, title_font_size=13)
    document: dict[str, Any] = json.loads(figure.to_json())
    return document
