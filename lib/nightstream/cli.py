"""The console script `nightstream`: one command per step, and what a person sees when something is wrong."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from nightstream.errors import NightstreamError
from nightstream.runtime import logs, settings
from nightstream.runtime.spark_errors import sentence_for

log = logging.getLogger(__name__)

app = typer.Typer(
    name="nightstream",
    help="A recommender in the lambda architecture: nightly jobs learn, a streaming query keeps every list fresh.",
    epilog=(
        "Every command reads base.yaml, then the --settings in order, then --set. base.yaml is the one beside the "
        f"first --settings file, or else the one in {settings.CONF}. The overlays there need no path: "
        f"{', '.join(settings.overlays())}."
    ),
    add_completion=False,
    rich_markup_mode=None,
)

Files = Annotated[
    list[str],
    typer.Option(
        "--settings",
        metavar="FILE",
        help="Settings file, or the name of an overlay such as movielens; repeat it, later ones win.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as serving.top_k=10; repeatable, beats files."),
]
Json = Annotated[bool, typer.Option("--log-json", help="Log one JSON object per line instead of readable lines.")]
AsOf = Annotated[
    str | None,
    typer.Option("--as-of", metavar="TIME", help="The moment that counts as now, in ISO 8601, UTC; default now."),
]


class Protocol(StrEnum):
    LEAVE_ONE_OUT = "leave-one-out"
    PREQUENTIAL = "prequential"


@app.command()
def ingest(files: Files, overrides: Overrides = None, log_json: Json = False) -> None:
    """Read the sources into events, items and users.

    Every payload is kept in raw_events, and ends in events, quarantine or duplicates. What was read before is not
    read twice. Prints how many payloads came in and where each of them went.
    """
    _run("ingest", files, overrides, log_json)


@app.command()
def train(files: Files, overrides: Overrides = None, log_json: Json = False, as_of: AsOf = None) -> None:
    """Train a new model version, without publishing it.

    The encoders and the ranker learn from all events so far. Killed and started again with the same --as-of, it
    resumes at the last complete epoch.
    """
    _run("train", files, overrides, log_json, as_of=moment(as_of))


@app.command()
def publish(
    files: Files,
    overrides: Overrides = None,
    log_json: Json = False,
    as_of: AsOf = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--version", metavar="VERSION", help="Any model version; default the newest trained one not rejected."
        ),
    ] = None,
) -> None:
    """Let a trained model serve, or roll back to an older one.

    One commit, after a check that the model can serve and that it is not worse than the published one by more than
    gate.margin; a worse one is kept as rejected, and the exit code is 3. --version publishes whatever you name, an
    older one, to roll back, or a rejected one. A running stream takes it over with its next micro-batches.
    """
    _run("publish", files, overrides, log_json, as_of=moment(as_of), version=version)


@app.command()
def apply(files: Files, overrides: Overrides = None, log_json: Json = False, as_of: AsOf = None) -> None:
    """Bring every user's list to the published model.

    Where a stream is running, it does that itself, and this step leaves it to it.
    """
    _run("apply", files, overrides, log_json, as_of=moment(as_of))


@app.command()
def nightly(files: Files, overrides: Overrides = None, log_json: Json = False, as_of: AsOf = None) -> None:
    """The whole night: ingest, train, publish, apply.

    Until the new model is published, the old one and its lists stay as they are, so a night that died is run again.
    Where the new model is worse than the published one by more than gate.margin, the published one serves on, with
    the night's events, and the exit code is 3.
    """
    _run("nightly", files, overrides, log_json, as_of=moment(as_of))


@app.command()
def evaluate(
    files: Files,
    overrides: Overrides = None,
    log_json: Json = False,
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="Hide each user's last item, or replay the end of the events.")
    ] = Protocol.LEAVE_ONE_OUT,
    predictions: Annotated[
        str | None, typer.Option("--predictions", metavar="OUT.parquet", help="Also write every list that was judged.")
    ] = None,
    delays: Annotated[
        str | None,
        typer.Option("--delays", metavar="SECONDS", help="prequential: how late the stream is, such as 0,1,60,3600."),
    ] = None,
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="OUT.json", help="Also write the figures to a file.")
    ] = None,
) -> None:
    """Measure the quality of the lists.

    Hit rate and NDCG over the whole catalogue, by the very code that serves; no table is read or written. leave-
    one-out trains without each user's last item. prequential trains on the past and replays the rest as a
    stream, once for every delay.
    """
    for path in (json_out, predictions):
        if path is not None and "://" not in path and not Path(path).absolute().parent.is_dir():
            raise NightstreamError(f"{path}: the folder {Path(path).parent} is not there; make it first")
    _run(
        "evaluate",
        files,
        overrides,
        log_json,
        protocol=protocol.value,
        predictions=predictions,
        delays=seconds(delays),
        json_out=json_out,
    )


@app.command()
def serve(
    files: Files,
    overrides: Overrides = None,
    log_json: Json = False,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Work off what has arrived, then end.")] = False,
    max_batches: Annotated[
        int | None, typer.Option("--max-batches", min=1, metavar="N", help="End after so many micro-batches.")
    ] = None,
) -> None:
    """Run the streaming query, until it is interrupted.

    Every micro-batch of events refreshes the lists of its users. SIGTERM and Ctrl-C let the running micro-batch
    finish; a second one does not.
    """
    stopping = threading.Event()
    _run("serve", files, overrides, log_json, stopping=stopping, until_idle=until_idle, max_batches=max_batches)


@app.command()
def freshness(
    files: Files,
    overrides: Overrides = None,
    log_json: Json = False,
    user: Annotated[str | None, typer.Option("--user", metavar="ID", help="Tell of this user alone.")] = None,
    worst: Annotated[
        int, typer.Option("--worst", min=1, max=1000, metavar="N", help="How many of the stalest lists to show.")
    ] = 10,
) -> None:
    """Tell how old the lists are against their users' newest events.

    How many users there are, how many of their lists are stale, and the users whose lists are the furthest behind.
    """
    _run("freshness", files, overrides, log_json, user=user, worst=worst)


@app.command()
def sync(
    files: Files,
    overrides: Overrides = None,
    log_json: Json = False,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Copy what is there, then end.")] = False,
) -> None:
    """Keep a key-value copy of the newest lists, until it is interrupted.

    Every user's newest list goes to PostgreSQL or Redis (the section sync of the settings), as soon as it is
    committed. Started again, it goes on where it was.
    """
    stopping = threading.Event()
    _run("sync", files, overrides, log_json, stopping=stopping, needs_spark=_lies_elsewhere, until_idle=until_idle)


@app.command()
def demo(files: Files, overrides: Overrides = None, log_json: Json = False, as_of: AsOf = None) -> None:
    """A night and a day on MovieLens-100k.

    The nightly job, the newest events as a live stream, an evaluation and a report in HTML. Everything it writes
    lies in a folder named demo beside storage.root and is made anew each time.
    """
    _run("demo", files, overrides, log_json, quiet=True, as_of=moment(as_of))


@app.command("warm-up")
def warm_up(files: Files, overrides: Overrides = None, log_json: Json = False) -> None:
    """Make Spark start faster on this machine, from the next command on.

    Fetches Spark's packages where they are not here yet, and archives the classes of its JVM in the folder
    spark.cache, some 200 MB. Run it once after an installation or an upgrade.
    """
    _run("warm_up", files, overrides, log_json, needs_spark=lambda loaded: False)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0, 1 for a defect of ours, 2 for something that the user can mend, 3 where a new
    model was rejected."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=arguments, prog_name="nightstream", standalone_mode=False)
    except TyperException as error:
        command = f"nightstream {arguments[0]}" if arguments[0] in _commands() else "nightstream"
        _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except NightstreamError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if (sentence := sentence_for(error)) is not None:
            _fail(sentence, NightstreamError.exit_code)
        log.exception("stopped by a defect", extra={"command": " ".join(arguments)})
        sys.exit(1)
    if code == 130:
        _fail("interrupted", 130)
    sys.exit(code or 0)


def run_file(step: str) -> NoReturn:
    """What the thin files of jobs/ and streaming/ do when Spark or Python runs them: the command of that name."""
    main([step, *sys.argv[1:]])


def moment(text: str | None) -> datetime:
    """The time of --as-of in UTC, now where it is not given. Raises NightstreamError for what is no time."""
    if text is None:
        return datetime.now(UTC)
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise NightstreamError(f"--as-of {text}: write it as 2026-01-31T02:00:00") from None
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


def seconds(text: str | None) -> list[float] | None:
    """The numbers of --delays. Raises NightstreamError for what is none, or below 0."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number < math.inf for number in numbers):
        raise NightstreamError(f"--delays {text}: write seconds, 0 or more, separated by commas, such as 0,1,60,3600")
    return numbers


def _run(
    step: str,
    files: Sequence[str],
    overrides: Sequence[str] | None,
    log_json: bool,
    quiet: bool = False,
    stopping: threading.Event | None = None,
    needs_spark: Callable[[settings.Settings], bool] = lambda loaded: True,
    **options: Any,
) -> None:
    """Load the settings, import the step, give it a session, print what it returns as JSON on stdout."""
    logs.configure(log_json)
    loaded = settings.load(files, overrides or ())
    spark = None
    with ThreadPoolExecutor(1) as pool:
        # Torch takes as long to import as Spark to start.
        importing = pool.submit(importlib.import_module, f"nightstream.steps.{step}")
        if needs_spark(loaded):
            session = importlib.import_module("nightstream.runtime.session")
            log.info("starting Spark", extra={"step": step})
            spark = session.build(loaded.spark, f"nightstream {step}")
        run: Callable[..., dict[str, Any] | None] = importing.result().run
    if stopping is not None:
        # After the session: PySpark puts a handler of its own in place when it starts.
        _stop_on_signals(stopping)
        options["stop"] = stopping.is_set
    try:
        result = run(spark=spark, settings=loaded, **options)
        # First of all: the work is done, whatever Spark's end meets.
        if result is not None and not quiet:
            typer.echo(json.dumps(result, indent=2, default=str))
    finally:
        if spark is not None and "DATABRICKS_RUNTIME_VERSION" not in os.environ:
            spark.stop()


def _lies_elsewhere(loaded: settings.Settings) -> bool:
    """Whether only Spark reaches the tables: in a catalog, an object store, or beside a Spark Connect server."""
    return not loaded.storage.is_folder or bool(os.environ.get("SPARK_REMOTE") or loaded.spark.remote)


def _stop_on_signals(stopping: threading.Event) -> None:
    def stop(number: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        log.info("stopping when the running micro-batch is done")
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _commands() -> set[str]:
    return {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def _fail(sentence: str, code: int) -> NoReturn:
    """One line on stderr, as JSON where the log is JSON, then exit."""
    if any(isinstance(h, logs.JsonHandler) for h in logging.getLogger().handlers):
        log.error(sentence)
    else:
        typer.echo(f"nightstream: {sentence}", err=True)
    sys.exit(code)
