from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

from nightstream.runtime import secrets


def test_secret_scopes_are_asked_through_dbutils(monkeypatch):
    asked = []
    runtime = ModuleType("databricks.sdk.runtime")
    store = SimpleNamespace(get=lambda scope, key: asked.append((scope, key)) or f"{key} of {scope}")
    monkeypatch.setattr(runtime, "dbutils", SimpleNamespace(secrets=store), raising=False)
    for name, module in {"databricks": ModuleType("a"), "databricks.sdk": ModuleType("b")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "databricks.sdk.runtime", runtime)
    found, problems = secrets.resolve({"plain": "x", "jaas": 'password="${secret:kafka/pass-word}";'})
    assert (found, problems) == ({"plain": "x", "jaas": 'password="pass-word of kafka";'}, [])
    assert asked == [("kafka", "pass-word")]


def test_elsewhere_it_says_what_to_write():
    _, (problem,) = secrets.resolve({"a": "${secret:s/k}", "b": "${secret:s/k}"})
    assert problem == "${secret:s/k} can be read on Databricks only; elsewhere write ${env:NAME}"


def test_what_the_secret_store_says_stays_out():
    def refused(scope, key):
        raise PermissionError("the token hush is not allowed")

    _, (problem,) = secrets.resolve({"a": "${secret:s/k}"}, refused)
    assert problem == "the secret s/k cannot be read (PermissionError); check scope, key and rights"


def test_a_secret_that_looks_like_a_reference_is_not_resolved_again(monkeypatch):
    monkeypatch.setenv("OUTER", "${env:INNER}")
    assert secrets.resolve({"a": "${env:OUTER}"}) == ({"a": "${env:INNER}"}, [])
