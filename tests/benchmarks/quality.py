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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from als import SparkALS
from baselines import Baseline, Fusion, ItemKNN, Popular, popularity, tuned
from measuring import VALID_LIMIT, BaselineLister, Log, log_of, records
from nightstream import evaluation, logs, progress, session, settings, training_data
from nightstream.blocks import RANK, TRAIN, VALID
from nightstream.cli import Protocol, seconds
from nightstream.errors import NightstreamError
from nightstream.failures import sentence_for
from nightstream.learning_files import write_atomically
from nightstream.model import Model
from nightstream.payload import FEATURES_FILE
from nightstream.settings import Settings
from nightstream.steps import evaluate
from pyspark.sql import DataFrame, SparkSession
from rich.table import Table
from sasrec import SASRec
from typer.exceptions import TyperException

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"
# Folders of RecBole's atomic files, one per data set.
DATA_FOLDER = "NIGHTSTREAM_DATA"

BASELINES = ("popular", "item-knn", "als", "sasrec", "fusion")
FUSED = ("item-knn", "als", "sasrec")
ENCODERS = ("cnn", "gru", "transformer")
NAMES = (*BASELINES, *ENCODERS, "default")
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "popular": {},
    "item-knn": {"decay": (0.9, 1.0, 0.8, 0.6), "neighbours": (200, 50, 1000), "shrink": (0.0, 10.0)},
    "als": {"alpha": (10.0, 1.0, 40.0), "regularisation": (0.1, 0.01, 0.3), "rank": (32, 16, 64)},
    "sasrec": {"dropout": (0.5, 0.2)},
}


@dataclass
class Bench:
    """One data set under one protocol, with everything that its models share."""

    spark: SparkSession
    settings: Settings
    data: str
    protocol: Protocol
    delays_s: Sequence[float]
    predictions: Path | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    by_users: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = evaluate.split(self.spark, self.settings, self.protocol.value)
        self.catalogue_size = self.parts.items.count()
        self._log: Log | None = None
        self._options: dict[str, dict[str, Any]] = {}
        self._fitted: dict[tuple[str, int], Baseline] = {}

    @property
    def log(self) -> Log:
        """The history as arrays; only baselines need it."""
        if self._log is None:
            self._log = log_of(self.parts)
        return self._log

    def run(self, name: str, seed: int) -> None:
        """Measures one model, one encoder with and without the ranker, or the default."""
        if name in BASELINES:
            self._baseline(name, seed)
        else:
            self._ours(name, seed)

    def _baseline(self, name: str, seed: int) -> None:
        start = time.monotonic()
        model = self.fitted(name, seed)
        log = self.log
        fallback = popularity(log.events, log.size, (TRAIN, RANK, VALID))
        types = self.settings.events.window_types
        lister = BaselineLister(self.spark, model, fallback, log.item_ids, self.parts.users, types)
        self._judge(evaluate.judged(self.parts, lister, self.delays_s), name, False, seed, start)

    def fitted(self, name: str, seed: int) -> Baseline:
        """The baseline, its options tuned with the first seed, fitted to the whole history with this one."""
        if (name, seed) not in self._fitted:
            log = self.log
            everything = (TRAIN, RANK, VALID)
            if name == "fusion":
                models = [self.fitted(n, seed) for n in FUSED]
                return Fusion(models, popularity(log.events, log.size, everything))
            make = self._maker(name, seed)
            if name not in self._options:
                targets = training_data.sampled_targets(log.events, VALID, VALID_LIMIT, seed)
                self._options[name] = tuned(make, GRIDS[name], log.events, log.size, targets, progress.say)
                progress.say(f"{name}: {self._options[name] or 'nothing to tune'}")
            model = make(**self._options[name])
            model.fit(log.events, log.size, everything)
            self._fitted[name, seed] = model
        return self._fitted[name, seed]

    def _maker(self, name: str, seed: int) -> Callable[..., Baseline]:
        if name == "als":
            return lambda **options: SparkALS(self.spark, seed=seed, **options)
        if name == "sasrec":
            return lambda **options: SASRec(seed=seed, **options)
        return {"popular": Popular, "item-knn": ItemKNN}[name]

    def _ours(self, name: str, seed: int) -> None:
        start = time.monotonic()
        training = self.settings.training.model_copy(update={"seed": seed})
        if name != "default":
            # One encoder gets the cores that the default shares out.
            threads = training.threads * training.parallel_encoders
            training = training.model_copy(update={"encoders": (name,), "threads": threads})
        own = self.settings.model_copy(update={"training": training})
        files = evaluate.fit(own, self.parts).files
        trained = time.monotonic()
        self._judge(self._served(own, files), name, True, seed, start)
        model = Model.from_artifacts({n: data for n, data in files.items() if n != FEATURES_FILE})
        if model.ranker is None:
            progress.say(f"{name}: the ranker was no better on validation, so the lists are the encoders' own")
        if name != "default":
            bare = model.only(name).to_artifacts() | {FEATURES_FILE: files[FEATURES_FILE]}
            # Both rows share one training, and the time of each counts it.
            self._judge(self._served(own, bare), name, False, seed, time.monotonic() - (trained - start))

    def _served(self, own: Settings, files: dict[str, bytes]) -> DataFrame:
        return evaluate.judged(self.parts, evaluate.served(own, self.parts, files), self.delays_s)

    def _judge(self, rows: DataFrame, name: str, ranker: bool, seed: int, start: float) -> None:
        rows = rows.persist()
        found = evaluation.scores(rows, self.catalogue_size)
        elapsed = time.monotonic() - start
        if self.predictions is not None:
            file = f"{name}{'-ranker' if ranker and name != 'default' else ''}-{seed}.parquet"
            evaluate.write_predictions(evaluation.predictions(rows), str(self.predictions / file))
        rows.unpersist()
        self.results += records(found, self.data, self.protocol.value, name, ranker, seed, elapsed)
        self.by_users += [{**row, "model": name, "ranker": ranker, "seed": seed} for row in found]
        for row in (r for r in found if r["users"] == "all"):
            figures = f"HR@10 {row['hr@10']:.4f}, NDCG@10 {row['ndcg@10']:.4f}"
            label = f"{name}{' with ranker' if ranker else ''}, seed {seed}, {delay_text(row['delay_s'])}"
            progress.say(f"{label}: {figures} ({elapsed:.0f} s)")


def delay_text(delay_s: float | None) -> str:
    return "frozen" if delay_s is None else f"{delay_s:g} s"


def settings_for(data: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a data set: movielens; a folder of that name with NAME.inter below $NIGHTSTREAM_DATA (else
    ../shared/data beside the repository); the path of an .inter file; or settings files separated by commas.

    Raises NightstreamError for anything else, and SettingsError.
    """
    if data == "movielens":
        source = settings.load([CONF / "movielens.yaml"]).sources
        described = {"events": source.events, "items": source.items, "users": source.users}
        here = [f"sources.{n}.path={ROOT / s.path}" for n, s in described.items() if s is not None]
        return settings.load([CONF / "movielens.yaml"], [*here, *overrides])
    if data.endswith((".yaml", ".yml")):
        return settings.load([Path(f) for f in data.split(",")], overrides)
    folder = Path(os.environ.get(DATA_FOLDER, ROOT.parent / "shared" / "data"))
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


def names_of(only: str | None) -> list[str]:
    """The models that --only names, all for none. Raises NightstreamError for an unknown one."""
    wanted = list(NAMES) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in NAMES]:
        raise NightstreamError(f"--only {only}: {', '.join(unknown)} not among {', '.join(NAMES)}")
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
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.4f}"


def table_of(bench: Bench) -> Table:
    """One row per model, and under prequential per delay and kind of user."""
    prequential = bench.protocol == Protocol.PREQUENTIAL
    table = Table(title=f"{bench.protocol.value} on {bench.data}", title_justify="left")
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
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeatable.")
    ] = None,
) -> None:
    """Measure the quality of baselines, of each encoder and of the default on one data set."""
    logs.configure(False)
    names, numbers = names_of(only), seeds_of(seeds)
    loaded = settings_for(data, overrides or ())
    delays_s = seconds(delays) or loaded.evaluation.delays_seconds
    spark = session.build(loaded.spark, "nightstream quality")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        bench = Bench(spark, loaded, data, protocol, delays_s, predictions)
        for seed in numbers:
            for name in names:
                # What no seed changes is measured once.
                if seed == numbers[0] or name not in ("popular", "item-knn"):
                    bench.run(name, seed)
                    if json_out is not None:
                        write_atomically(json_out, json.dumps(bench.results, indent=2).encode())
        progress.output.print(table_of(bench))
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
