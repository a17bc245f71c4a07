"""The notebook runs as it stands, on the tables of a night."""

from __future__ import annotations

import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_it_walks_through_the_tables(night, tmp_path, monkeypatch, capsys):
    _, settings = night("explored")
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    monkeypatch.setenv("NIGHTSTREAM_SETTINGS", str(file))
    monkeypatch.setenv("NIGHTSTREAM_PLOTS", str(tmp_path / "plots"))
    runpy.run_path(str(ROOT / "notebooks" / "01_explore.py"))
    printed = capsys.readouterr().out
    assert "'raw_events': 480, 'events': 480" in printed
    assert "24 item embeddings" in printed
    # 40 users with events, two without, and the one for strangers.
    assert "freshness_users = 43" in printed
    assert "freshness_stale_share = 0\n" in printed
    assert "the newest events of the window" in printed
    assert "strategy" in printed
    assert (tmp_path / "plots" / "item_embeddings.html").stat().st_size > 1000
