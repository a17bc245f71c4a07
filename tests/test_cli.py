"""The command line: what a person sees, and what reaches the steps. No Spark but in the last test."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nightstream import cli
from nightstream.errors import NightstreamError, RejectedError, SourceError
from nightstream.runtime import settings
from pyspark.errors import AnalysisException

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "conf" / "base.yaml")
FILES = sorted(path for folder in ("jobs", "streaming") for path in (ROOT / folder).glob("*.py"))
COMMANDS = (
    "ingest",
    "train",
    "publish",
    "apply",
    "nightly",
    "evaluate",
    "serve",
    "sync",
    "freshness",
    "demo",
    "warm-up",
)

pytestmark = pytest.mark.usefixtures("restored_logging")


class Spark:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def step(monkeypatch):
    """Puts a recording step and a session that is none in place of the real ones: step("train", result or error)."""

    def install(name: str, outcome: object = None) -> types.SimpleNamespace:
        seen = types.SimpleNamespace(options=None, settings=None, spark=Spark())

        def run(spark, settings, **options):
            seen.settings, seen.options = settings, options
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.SimpleNamespace(run=run)
        session = types.SimpleNamespace(build=lambda settings, app_name: seen.spark)
        monkeypatch.setitem(sys.modules, f"nightstream.steps.{name}", module)
        monkeypatch.setitem(sys.modules, "nightstream.runtime.session", session)
        return seen

    return install


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_names_its_options(command, capsys):
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "--settings" in shown
    assert "--set" in shown
    assert "--log-json" in shown


def test_no_arguments_show_the_commands(capsys):
    assert call() == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {c} ", shown, re.MULTILINE) for c in COMMANDS)


def test_help_says_where_settings_come_from(capsys):
    call("--help")
    shown = "".join(capsys.readouterr().out.split())
    assert str(settings.CONF) in shown
    assert ",".join(settings.overlays()) in shown


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("nightstream.cli", ["pyspark", "torch", "xgboost"]), ("nightstream.steps.ingest", ["torch", "xgboost"])],
)
def test_what_starts_often_imports_little(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["train"], "--settings"),
        (["train", "--settings", "nowhere/x.yaml"], "nowhere/x.yaml"),
        (["train", "--settings", "moveilens"], "movielens"),
        (["train", "--settings", BASE, "--frob"], "--frob"),
        (["train", "--settings", BASE, "--as-of", "tomorrow"], "tomorrow"),
        (["serve", "--settings", BASE, "--max-batches", "0"], "--max-batches"),
        (["freshness", "--settings", BASE, "--worst", "1001"], "--worst"),
        (["ingest", "--settings", BASE, "--set", "serving.top_k=0"], "serving.top_k"),
        (["ingest", "--settings", BASE, "--set", "serving.topk=5"], "serving.topk"),
        (["evaluate", "--settings", BASE, "--protocol", "best"], "--protocol"),
        (["evaluate", "--settings", BASE, "--delays", "0,-1"], "--delays"),
        (["evaluate", "--settings", BASE, "--json", "no/such/folder/out.json"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, named, capsys):
    assert call(*arguments) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert one_sentence(shown)


def test_a_step_gets_its_settings_and_its_time(step, capsys):
    seen = step("train", {"model_version": "v1"})
    assert call("train", "--settings", BASE, "--set", "serving.top_k=7", "--as-of", "2026-01-31T02:00:00+01:00") == 0
    assert seen.settings.serving.top_k == 7
    assert seen.options == {"as_of": datetime(2026, 1, 31, 1, tzinfo=UTC)}
    assert json.loads(capsys.readouterr().out) == {"model_version": "v1"}
    assert seen.spark.stopped


def test_the_result_is_shown_whatever_the_end_of_spark_meets(step, capsys):
    def fail() -> None:
        raise ConnectionRefusedError("the JVM is gone")

    step("train", {"model_version": "v1"}).spark.stop = fail
    assert call("train", "--settings", BASE) != 0
    assert json.loads(capsys.readouterr().out) == {"model_version": "v1"}


def test_evaluate_hands_on_its_options(step, tmp_path):
    seen = step("evaluate", {})
    out = str(tmp_path / "p.parquet")
    arguments = ["evaluate", "--settings", BASE, "--protocol", "prequential", "--predictions", out, "--delays", "0,60"]
    assert call(*arguments) == 0
    assert seen.options == {"protocol": "prequential", "predictions": out, "delays": [0.0, 60.0], "json_out": None}


def test_freshness_hands_on_its_options(step):
    seen = step("freshness", {})
    assert call("freshness", "--settings", BASE, "--user", "u1", "--worst", "3") == 0
    assert seen.options == {"user": "u1", "worst": 3}


def test_serve_hands_on_its_options_and_a_way_to_stop(step, monkeypatch):
    monkeypatch.setattr(cli, "_stop_on_signals", lambda stopping: None)
    seen = step("serve")
    assert call("serve", "--settings", BASE, "--until-idle", "--max-batches", "3") == 0
    assert seen.options["stop"]() is False
    assert (seen.options["until_idle"], seen.options["max_batches"]) == (True, 3)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SourceError("data/x.inter is missing; check sources.events.path"), "data/x.inter is missing"),
        (AnalysisException("[PATH_NOT_FOUND] Path does not exist: file:/x. SQLSTATE: 42K03"), "Path does not exist"),
        (
            RuntimeError("at org.X: nightstream.errors.TableError: table items is missing\n\tat java.Y"),
            "items is missing",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(step, error, sentence, capsys):
    seen = step("ingest", error)
    assert call("ingest", "--settings", BASE) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nightstream: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "SQLSTATE" not in lines[0]
    assert seen.spark.stopped


@pytest.mark.parametrize("command", ["publish", "nightly"])
def test_a_rejected_model_has_an_exit_code_of_its_own(step, command, capsys):
    seen = step(command, RejectedError("model v2 was not published: NDCG@10 0.0100 against 0.1000"))
    assert call(command, "--settings", BASE) == 3
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("nightstream: ")]
    assert lines == ["nightstream: model v2 was not published: NDCG@10 0.0100 against 0.1000"]
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert seen.spark.stopped


def test_a_defect_shows_its_trace_and_its_context(step, capsys):
    step("apply", ZeroDivisionError("division by zero"))
    assert call("apply", "--settings", BASE, "--log-json") == 1
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert records[-1]["command"].startswith("apply --settings")
    assert "ZeroDivisionError" in records[-1]["trace"]


def test_json_log_carries_the_sentence_too(step, capsys):
    step("apply", NightstreamError("no model is published"))
    assert call("apply", "--settings", BASE, "--log-json") == 2
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert records[-1] | {"at": ""} == {
        "at": "",
        "level": "error",
        "logger": "nightstream.cli",
        "message": "no model is published",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_for_spark_submit_runs_the_command_of_its_name(path, step, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_stop_on_signals", lambda stopping: None)
    seen = step(path.stem, {"from": path.stem})
    monkeypatch.setattr(sys, "argv", [str(path), "--settings", "movielens", "--set", "serving.top_k=7"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert (seen.settings.sources.events.format, seen.settings.serving.top_k) == ("recbole", 7)
    assert json.loads(capsys.readouterr().out) == {"from": path.stem}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_for_spark_submit_offers_the_run_of_its_step(path):
    run = runpy.run_path(str(path))["run"]
    assert (run.__module__, run.__name__) == (f"nightstream.steps.{path.stem}", "run")


@pytest.mark.slow
def test_spark_submit_runs_a_job_file(tmp_path):
    """Plain spark-submit, no further flags: the job brings Delta along itself, and its exit code comes through."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK_", "SPARK_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    event = {"event_id": "e1", "user_id": "u1", "item_id": "i1", "event_type": "view", "event_time": 1_700_000_000}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    command = ["spark-submit", str(ROOT / "jobs" / "ingest.py"), "--settings", BASE]
    command += ["--set", f"storage.root={tmp_path / 'tables'}"]

    def submit(source: Path) -> subprocess.CompletedProcess[str]:
        more = ["--set", f"sources.events.path={source}"]
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

    good = submit(tmp_path / "events.jsonl")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "tables" / "events" / "_delta_log").is_dir()
    bad = submit(tmp_path / "nowhere.jsonl")
    assert bad.returncode == 2, bad.stderr
    # spark-submit sends all that Python writes to its own stdout.
    sentences = [line for line in bad.stdout.splitlines() if line.startswith("nightstream: ")]
    assert len(sentences) == 1
    assert "nowhere.jsonl" in sentences[0]
    assert "Traceback" not in bad.stdout + bad.stderr
