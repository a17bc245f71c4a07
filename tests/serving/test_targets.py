"""Which server an address names, and what is said of one that names none."""

from __future__ import annotations

import sys

import pytest
from nightstream.errors import MachineError, SettingsError
from nightstream.serving import targets


@pytest.mark.parametrize(
    ("kind", "url"),
    [
        ("redis", "postgresql://u:hush@h/d"),
        ("postgresql", "redis://u:hush@h"),
        ("postgresql", "host=h password=hush"),
        ("postgresql", "postgresql://u:hu@sh@h/d"),
        ("postgresql", "postgresql://u:hu/sh@h/d"),
        ("postgresql", "postgresql://u:hush%zz@h/d"),
        ("redis", "redis://:hu#sh@h"),
        ("redis", "redis://:hu/sh@h"),
    ],
)
def test_an_address_that_is_none_is_not_shown(kind, url):
    with pytest.raises(SettingsError, match=r"sync\.url .*write \w+://user:\$\{env:NAME\}@host") as raised:
        targets.target_of(kind, url, "t", "p:")
    assert "hu" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(("kind", "module"), [("postgresql", "psycopg"), ("redis", "redis")])
def test_a_missing_package_is_named(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=rf"package {module}: pip install 'nightstream\[sync\]'"):
        targets.target_of(kind, f"{kind}://h", "t", "p:")
