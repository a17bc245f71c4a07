"""The report as a person sees it: in Chromium, at the width of a phone and of a desktop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import browser
import pytest
from nightstream.monitoring import report
from selenium.webdriver import Chrome
from test_report import EXAMPLE, HISTORY, QUALITY, SUMMARY

pytestmark = pytest.mark.slow

WIDTHS = (400, 1280)
# Half a pixel either way is rounding.
TOUCH_PIXELS = 1.0
_UNSEEN = "script, style, head, head *"
_WIDER = f"""
return [...document.documentElement.querySelectorAll('*')]
  .filter(e => !e.matches({_UNSEEN!r}) && !(e instanceof SVGElement) && e.scrollWidth > e.clientWidth + 1
               && getComputedStyle(e).display !== 'inline' && e.clientWidth > 0)
  .map(e => `${{e.tagName}}.${{e.className}} needs ${{e.scrollWidth}} of ${{e.clientWidth}}`)
"""
# Plotly measures its texts in a drawing beside the page.
_BEYOND = """
return [...document.querySelectorAll('body *')]
  .filter(e => e.getClientRects().length && !e.closest('#js-plotly-tester'))
  .filter(e => e.getBoundingClientRect().left < -1 || e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => `${e.tagName}.${e.getAttribute('class')} ${e.textContent.slice(0, 40)}`)
"""
_BOXES = """
return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).map(e => {
  const box = e.getBoundingClientRect();
  return [e.textContent.trim().slice(0, 30) || e.id, box.left, box.top, box.right, box.bottom];
})
"""


class Box(NamedTuple):
    """What an element takes of the window, in CSS pixels."""

    name: str
    left: float
    top: float
    right: float
    bottom: float

    def lies_over(self, other: Box) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > TOUCH_PIXELS and down > TOUCH_PIXELS


def boxes(chrome: Chrome, selector: str) -> list[Box]:
    return [Box(*values) for values in chrome.execute_script(_BOXES, selector)]


def overlapping(found: list[Box]) -> list[tuple[str, str]]:
    return [(a.name, b.name) for a, b in combinations(found, 2) if a.lies_over(b)]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser.chromium() as opened:
        yield opened


@pytest.fixture(scope="module", params=WIDTHS)
def page(chrome, tmp_path_factory, request) -> Chrome:
    """The browser with the page at one width, its details open. Titles and reasons are as long as real ones."""
    long = [
        entry
        | {
            "title": "Young Poisoner's Handbook, The (and other long titles)",
            "reason": "Goes with “Leaving Las Vegas” and what you turned to lately",
            "score": 2.718 - 0.7 * entry["rank"] ** 2,
        }
        for entry in EXAMPLE["after"]
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.demo_report(HISTORY, QUALITY, EXAMPLE | {"after": long}, SUMMARY), encoding="utf-8")
    browser.show(chrome, path, request.param)
    chrome.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    return chrome


def test_nothing_is_wider_than_its_place(page):
    assert page.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.execute_script(_WIDER) == []
    assert page.execute_script(_BEYOND) == []


def test_charts_legends_and_titles_lie_beside_or_below_each_other(page):
    found = boxes(page, ".figure, .legend, h1, h2, h3, .about, .tile, .list, summary, table")
    assert len([b for b in found if b.name]) > 15
    assert overlapping(found) == []


def test_no_label_of_a_chart_lies_over_another(page):
    figures = page.execute_script("return [...document.querySelectorAll('.figure')].map(f => f.id)")
    assert figures == ["quality-hr", "quality-ndcg", "training-loss", "training-ndcg", "delays"]
    for figure in figures:
        labels = boxes(page, f"#{figure} .xtick, #{figure} .ytick, #{figure} .xtitle, #{figure} .ytitle")
        assert len(labels) > 6, figure
        assert overlapping(labels) == [], figure


def test_on_a_phone_there_is_one_chart_to_a_row(page):
    left = {box.left for box in boxes(page, ".figure")}
    wide = page.execute_script("return innerWidth") > 760
    assert len(left) == (2 if wide else 1)


def test_a_bar_is_full_for_the_best_score_and_a_mark_for_the_lowest(page):
    tracks, bars = boxes(page, ".score"), boxes(page, ".score i")
    shares = [(bar.right - bar.left) / (track.right - track.left) for bar, track in zip(bars, tracks, strict=True)]
    # 1, 1/2, 1/3 in the list of the night; 2.018, -0.082, -3.582 after the stream.
    low = report.LOWEST_BAR / 100
    expected = [1.0, low + (1 - low) * 0.25, low, 1.0, low + (1 - low) * 3.5 / 5.6, low]
    assert shares == pytest.approx(expected, abs=0.02)


def test_the_console_shows_no_error(page):
    assert page.get_log("browser") == []
