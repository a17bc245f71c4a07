"""The report: what is in the page, that it stands alone, and that nothing in the data can break out of it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from nightstream.monitoring import report, report_figures

HISTORY = [
    {"encoder": name, "stage": f"first-{name}", "epoch": e, "loss": start / e, "ndcg@10": 0.05 + 0.01 * e}
    for name, start in (("cnn", 6.0), ("gru", 6.5), ("transformer", 7.0))
    for e in range(1, 9)
] + [{"encoder": "cnn", "stage": "refit-cnn", "epoch": 1, "loss": 99.0, "ndcg@10": None}]
QUALITY = [
    {
        "delay_s": delay,
        "users": users,
        "events": {"all": 10_000, "known": 2_000, "unknown": 8_000}[users],
        **{f"{m}@{k}": value * k / 10 * (2 if m == "hr" else 1) for m in ("hr", "ndcg") for k in (5, 10, 20)},
        "coverage": 0.61 if users == "all" else None,
    }
    for delay, base in ((0.0, 0.06), (1.0, 0.059), (60.0, 0.055), (3600.0, 0.04), (None, 0.03))
    for users, value in (("all", base), ("known", base * 1.1), ("unknown", base * 0.95))
]


def entries(names: list[str]) -> list[dict]:
    return [
        {
            "rank": rank,
            "item_id": name,
            "title": f"Title {name}",
            "score": 1.0 / rank,
            "strategy": "sequence",
            "reason": "Fits what you turned to lately",
        }
        for rank, name in enumerate(names, 1)
    ]


EXAMPLE = {
    "user_id": "42",
    "before": entries(["a", "b", "c"]),
    "after": entries(["c", "b", "d"]),
    "window": [
        {
            "event_time": datetime(1998, 4, 1, 12, 30, tzinfo=UTC),
            "item_id": "z",
            "title": "</script><script>alert('x')</script> & Ü",
            "event_type": "rating",
            "value": 4.0,
        }
    ],
}
SUMMARY = {
    "ingest": {
        "events": {"raw_events": 90_001, "events": 90_000, "quarantine": 1},
        "items": {"rows": 1682, "left_out": {}},
    },
    "stream": {"batches": 40, "events": 10_000, "users": 900, "events_replayed": 10_000},
    "delays": [1.0 + 0.1 * (n % 7) for n in range(40)],
    "metrics": {"ndcg@10": 0.07},
    "seconds": 312.0,
}


@pytest.fixture(scope="module")
def page() -> str:
    return report.demo_report(HISTORY, QUALITY, EXAMPLE, SUMMARY)


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in {"script", "style"}:
            self.text.append(data.strip())


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


def test_the_page_loads_nothing(page):
    tags = parsed(page).tags
    assert not [a for _, a in tags if "src" in a or "href" in a]
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert page.count("plotly.js v") == 1


def test_every_section_shows_its_data(page):
    text = " | ".join(t for t in parsed(page).text if t)
    for wanted in (
        "Title d",
        "▲ 2",
        "new",
        "0.333",
        "1998-04-01 12:30",
        "90,001",
        "40 micro-batches",
        "5.2 min",
        "12.0%",
    ):
        assert wanted in text, wanted
    assert [a["id"] for _, a in parsed(page).tags if a.get("class") == "figure"] == FIGURES


FIGURES = ["quality-hr", "quality-ndcg", "training-loss", "training-ndcg", "delays"]


def test_a_bar_goes_from_the_lists_lowest_score_to_its_best():
    low = report.LOWEST_BAR
    assert report.bars([2.0, 0.0, -2.0]) == pytest.approx([100, (100 + low) / 2, low])
    assert report.bars([-0.5, -0.75, -1.5]) == pytest.approx([100, low + (100 - low) * 0.75, low])
    assert report.bars([-3.0, -3.0]) == [100, 100]
    assert report.bars([]) == []


def test_scores_are_numbers_in_the_details_alone(page):
    shown, _, details = page.partition("<summary>The scores</summary>")
    assert re.findall(r">\s*0\.333\s*<", details)
    assert not re.findall(r">\s*0\.333\s*<", shown)


def test_strings_from_the_data_stay_text(page):
    assert "<script>alert" not in page
    assert any("</script><script>alert('x')</script> & Ü" in t for t in parsed(page).text)


def test_an_empty_run_makes_a_page_that_says_so():
    text = " ".join(parsed(report.demo_report([], [], {}, {})).text)
    assert "No encoder was trained" in text
    assert "No micro-batch ran" in text


def test_training_curves_hold_each_epoch_of_the_validated_runs():
    chart = report_figures.training(HISTORY)
    assert chart is not None
    assert [line.name for line in chart.lines] == ["cnn", "gru", "transformer"]
    loss, ndcg = (panel.figure["data"] for panel in chart.panels)
    for traces in (loss, ndcg):
        assert {(t["name"], tuple(t["x"])) for t in traces} == {
            (n, tuple(range(1, 9))) for n in ("cnn", "gru", "transformer")
        }
    assert all(99.0 not in t["y"] for t in loss)
    assert next(t for t in loss if t["name"] == "gru")["y"] == pytest.approx([6.5 / e for e in range(1, 9)])


def test_quality_goes_from_fresh_to_frozen():
    chart = report_figures.quality(QUALITY)
    assert chart is not None
    ndcg = next(panel.figure for panel in chart.panels if panel.key == "quality-ndcg")
    everyone = next(t for t in ndcg["data"] if t["name"].startswith("all"))
    assert everyone["x"] == ["at once", "1 s", "1 min", "1 h", "night only"]
    assert everyone["y"] == pytest.approx([0.06, 0.059, 0.055, 0.04, 0.03])
    assert ndcg["layout"]["xaxis"]["categoryarray"] == everyone["x"]


def test_figures_in_the_page_are_json(page):
    text = re.search(r"^const figures = (.*);$", page, re.MULTILINE)
    assert text is not None
    assert set(json.loads(text[1])) == set(FIGURES)
