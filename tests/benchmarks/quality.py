"""Quality of baselines, of each encoder and of what the nightly job would publish, on one data set and one protocol.

    python tests/benchmarks/quality.py --data movielens --protocol leave-one-out --seeds 1,2,3 --json out/quality.json

All models get one split and one set of test events, and evaluation.scores judges all lists: the whole catalogue is
ranked, seen items are removed, a target that no list can hold is a miss. Options are chosen on validation events only;
then each model learns from all events but the test's.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import recbole_client
import typer
from bench import NAMES, WITHOUT_SEED, Bench, delay_text
from nightstream.cli import Protocol, seconds
from nightstream.errors import NightstreamError
from nightstream.files import write_atomically
from nightstream.runtime import console, logs, session, settings
from nightstream.runtime.settings import Settings
from nightstream.runtime.spark_errors import sentence_for
from rich.table import Table
from typer.exceptions import TyperException

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"
# Folders of RecBole's atomic files, one per data set.
DATA_FOLDER = "NIGHTSTREAM_DATA"


def settings_for(data: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a data set: movielens; a folder of that name with NAME.inter below $NIGHTSTREAM_DATA
    (else below data/); the path of an .inter file; or settings files separated by commas.

    Raises NightstreamError for anything else, and SettingsError.
    """
    if data == "movielens":
        source = settings.load([CONF / "movielens.yaml"]).sources
        described = {"events": source.events, "items": source.items, "users": source.users}
        here = [f"sources.{n}.path={ROOT / s.path}" for n, s in described.items() if s is not None]
        return settings.load([CONF / "movielens.yaml"], [*here, *overrides])
    if data.endswith((".yaml", ".yml")):
        return settings.load([Path(f) for f in data.split(",")], overrides)
    folder = Path(os.environ.get(DATA_FOLDER, ROOT / "data"))
    events = Path(data) if data.endswith(".inter") else folder / data / f"{data}.inter"
    if not events.is_file():
        raise NightstreamError(
            f"--data {data}: {events} is not there; give movielens, the path of an .inter file or of settings, "
            f"or the name of a folder below {DATA_FOLDER}"
        )
    found = [f"sources.events.path={events}"]
    items = events.with_suffix(".item")
    if items.is_file():
        found.append(f"sources.items.path={items}")
    return settings.load([CONF / "recbole.yaml"], [*found, *overrides])


def names_of(only: str | None, recbole: str | None, protocol: Protocol) -> list[str]:
    """The models that --only names, for none all that can be had: RecBole's need an interpreter and whole histories.

    Raises NightstreamError for a name that is unknown or cannot be had.
    """
    wanted = list(NAMES) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in NAMES]:
        raise NightstreamError(f"--only {only}: {', '.join(unknown)} not among {', '.join(NAMES)}")
    if recbole is None or protocol == Protocol.PREQUENTIAL:
        without = [name for name in wanted if name not in recbole_client.MODELS]
        if only is not None and without != wanted:
            raise NightstreamError(
                f"--only {only}: RecBole's models need --recbole PYTHON and --protocol leave-one-out"
            )
        wanted = without
    return [name for name in NAMES if name in wanted]


def seeds_of(text: str) -> list[int]:
    """The numbers of --seeds. Raises NightstreamError for what is none, and for one given twice."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) != len(found):
        raise NightstreamError(f"--seeds {text}: write different whole numbers separated by commas, such as 1,2,3")
    return found


def summaries(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[float], list[float], int]]:
    """Rows of all seeds -> the first of each (model, ranker, delay, users), HR@10 and NDCG@10 by seed, the number."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["ranker"], row["delay_s"], row.get("users", "all")), []).append(row)
    for group in groups.values():
        yield group[0], [r["hr@10"] for r in group], [r["ndcg@10"] for r in group], len(group)


def spread_text(values: Sequence[float]) -> str:
    """The mean, and where there are several ± their sample standard deviation."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def table_of(bench: Bench) -> Table:
    """One row per model, and under prequential per delay and kind of user."""
    prequential = bench.protocol == Protocol.PREQUENTIAL.value
    table = Table(title=f"{bench.protocol} on {bench.data}", title_justify="left")
    for name in ("model", "ranker", *(("delay", "users", "events") if prequential else ())):
        table.add_column(name)
    for name in ("seeds", "HR@10", "NDCG@10", "seconds"):
        table.add_column(name, justify="right")
    times: dict[tuple[str, bool], list[float]] = {}
    for row in bench.results:
        times.setdefault((row["model"], row["ranker"]), []).append(row["seconds"])
    for row, hits, gains, count in summaries(bench.by_users):
        if not prequential and row["users"] != "all":
            continue
        spent = times[row["model"], row["ranker"]]
        where = (delay_text(row["delay_s"]), row["users"], f"{row['events']:,}") if prequential else ()
        figures = (str(count), spread_text(hits), spread_text(gains), f"{sum(spent) / len(spent):.0f}")
        table.add_row(row["model"], "yes" if row["ranker"] else "no", *where, *figures)
    return table


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def measure(
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="movielens, toys, an .inter file, or settings (a.yaml,b.yaml)")
    ] = "movielens",
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="Hide each user's last item, or replay the end of the events.")
    ] = Protocol.LEAVE_ONE_OUT,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N", help="One run of each model per seed.")] = "1",
    only: Annotated[str | None, typer.Option("--only", metavar="NAME,NAME", help=f"Among {', '.join(NAMES)}.")] = None,
    delays: Annotated[
        str | None, typer.Option("--delays", metavar="SECONDS", help="prequential: how late the stream is.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="Write the figures, after each model.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="FOLDER", help="Write every list that was judged.")
    ] = None,
    recbole: Annotated[
        str | None, typer.Option("--recbole", metavar="PYTHON", help="Interpreter of an environment with RecBole.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeatable.")
    ] = None,
) -> None:
    """Measure the quality of baselines, of each encoder and of the default on one data set."""
    logs.configure(False)
    names, numbers = names_of(only, recbole, protocol), seeds_of(seeds)
    loaded = settings_for(data, overrides or ())
    delays_s = seconds(delays) or loaded.evaluation.delays_seconds
    spark = session.build(loaded.spark, "nightstream quality")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        bench = Bench(spark, loaded, data, protocol.value, delays_s, predictions, recbole)
        for seed in numbers:
            for name in names:
                if seed == numbers[0] or name not in WITHOUT_SEED:
                    bench.run(name, seed)
                    if json_out is not None:
                        write_atomically(json_out, json.dumps(bench.results, indent=2).encode())
        console.stdout.print(table_of(bench))
    finally:
        spark.stop()


def main() -> None:
    try:
        app(prog_name="quality.py", standalone_mode=False)
    except TyperException as error:
        fail(f"{error.format_message().rstrip('.')} (see --help)")
    except NightstreamError as error:
        fail(str(error))
    except Exception as error:
        if (sentence := sentence_for(error)) is None:
            raise
        fail(sentence)


def fail(sentence: str) -> None:
    typer.echo(f"quality: {sentence}", err=True)
    sys.exit(NightstreamError.exit_code)


if __name__ == "__main__":
    main()
