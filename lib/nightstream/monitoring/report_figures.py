"""The report's charts as plotly JSON; the page gives them the colours of the reader's light or dark scheme.

Each panel is a figure of its own, and titles and legend are text of the page: so the page can put one panel below the
other where there is no room beside it, and nothing lies over anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# Legible on a light and on a dark ground.
COLOURS = ("#3f8efc", "#e8743b", "#19a979", "#b565d9", "#d9a400", "#6c8893")
_USERS = {"all": COLOURS[0], "known": COLOURS[2], "unknown": COLOURS[1]}
_HEIGHT = 280


@dataclass(frozen=True)
class Line:
    """An entry of a legend. dash: as plotly names it."""

    name: str
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One figure. key: its id in the page. title: empty where the section's title says it. figure: plotly JSON."""

    key: str
    title: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """Panels that share a legend; without lines there is none."""

    panels: tuple[Panel, ...]
    lines: tuple[Line, ...] = ()


def training(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Loss and validation NDCG@10 per epoch, a line per encoder; None without a validated epoch."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        # A refit has no validation, and its loss is over other events: in one chart they would be compared.
        if not str(row.get("stage", "")).startswith("refit"):
            runs.setdefault(row["encoder"], []).append(row)
    if not runs:
        return None
    lines = tuple(Line(encoder, COLOURS[i % len(COLOURS)]) for i, encoder in enumerate(sorted(runs)))

    def panel(key: str, title: str, name: str) -> Panel:
        figure = go.Figure()
        for line in lines:
            held = [r for r in sorted(runs[line.name], key=lambda r: r["epoch"]) if r.get(name) is not None]
            _add(figure, line, [r["epoch"] for r in held], [r[name] for r in held], f"{line.name}, epoch %{{x}}")
        figure.update_xaxes(title_text="epoch", rangemode="tozero")
        if name != "loss":
            figure.update_yaxes(rangemode="tozero")
        return Panel(key, title, _json(figure))

    panels = (
        panel("training-loss", "Training loss", "loss"),
        panel("training-ndcg", "NDCG@10 on held-out events", "ndcg@10"),
    )
    return Chart(panels, lines)


def quality(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """NDCG@10 and HR@10 by how late the state knows an event, a line per kind of user; None without rows."""
    if not rows:
        return None
    delays = sorted({r["delay_s"] for r in rows if r["delay_s"] is not None})
    order = [delay_name(d) for d in [*delays, *([None] if any(r["delay_s"] is None for r in rows) else [])]]
    kinds = {users: {delay_name(r["delay_s"]): r for r in rows if r["users"] == users} for users in _USERS}
    kinds = {users: mine for users, mine in kinds.items() if mine}
    lines = {
        users: Line(
            f"{users} users ({max(r['events'] for r in mine.values()):,} events)",
            _USERS[users],
            "solid" if users == "all" else "dot",
        )
        for users, mine in kinds.items()
    }

    def panel(key: str, title: str, name: str) -> Panel:
        figure = go.Figure()
        for users, mine in kinds.items():
            held = [delay for delay in order if delay in mine]
            _add(figure, lines[users], held, [mine[d][name] for d in held], f"{users} users, %{{x}}")
        figure.update_xaxes(
            title_text="how late the list knows an event",
            type="category",
            categoryarray=order,
            tickvals=order,
            # Two lines, so that the widest label leaves room for its neighbours on a narrow screen.
            ticktext=[name.replace(" only", "<br>only") for name in order],
        )
        figure.update_yaxes(rangemode="tozero")
        return Panel(key, title, _json(figure))

    panels = (panel("quality-hr", "Hit rate at 10", "hr@10"), panel("quality-ndcg", "NDCG@10", "ndcg@10"))
    return Chart(panels, tuple(lines.values()))


def delays(seconds: Sequence[float]) -> Chart | None:
    """The delay of each micro-batch, in order; None without one."""
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
    figure.update_layout(bargap=0.15)
    return Chart((Panel("delays", "", _json(figure)),))


def figures(charts: Iterable[Chart | None]) -> dict[str, dict[str, Any]]:
    """The figures of all panels by their keys."""
    return {panel.key: panel.figure for chart in charts if chart is not None for panel in chart.panels}


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


def _add(figure: go.Figure, line: Line, x: Sequence[Any], y: Sequence[float], hover: str) -> None:
    figure.add_scatter(
        x=list(x),
        y=list(y),
        name=line.name,
        mode="lines+markers",
        line={"color": line.colour, "width": 2, "dash": line.dash},
        marker={"size": 7},
        hovertemplate=f"{hover}: %{{y:.4f}}<extra></extra>",
    )


def _json(figure: go.Figure) -> dict[str, Any]:
    figure.update_layout(
        template="none",
        height=_HEIGHT,
        margin={"l": 44, "r": 12, "t": 10, "b": 44},
        showlegend=False,
        hovermode="closest",
    )
    # No oblique labels: they lie over each other where the screen is narrow.
    figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8, autotickangles=[0, 90])
    figure.update_yaxes(automargin=True, zeroline=False, title_standoff=8, nticks=6)
    document: dict[str, Any] = json.loads(figure.to_json())
    return document
