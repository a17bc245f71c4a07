"""The pages for people: README is short, every page is linked from it, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 150
# They tell of files that were, or that a reader is to write.
NAME_OTHER_FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "code.md")

_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def links(text: str) -> list[str]:
    """The targets of all links and pictures outside of code blocks that lead into the repository."""
    return [target for target in _LINK.findall(_FENCED.sub("", text)) if "://" not in target]


def anchors(text: str) -> set[str]:
    """What a link can name after #: the headings, written as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_and_anchors_are_found_as_github_writes_them():
    text = "# A (b), c_d!\n[x](docs/y.md#z) ![p](p.png) [w](https://w.org)\n```sh\n# no heading [n](n.md)\n```\n"
    assert links(text) == ["docs/y.md#z", "p.png"]
    assert anchors(text) == {"a-b-c_d"}


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_readme_leads_to_every_page_of_docs():
    linked = {target.partition("#")[0] for target in links(README.read_text(encoding="utf-8"))}
    missing = [str(p.relative_to(ROOT)) for p in PAGES if p.parent.name == "docs" and f"docs/{p.name}" not in linked]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text, broken = page.read_text(encoding="utf-8"), []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in NAME_OTHER_FILES], ids=lambda page: page.name)
def test_every_file_that_a_sentence_names_is_there(page):
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:conf|docs|jobs|lib|notebooks|streaming|tests)/[\w/.-]*)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]
