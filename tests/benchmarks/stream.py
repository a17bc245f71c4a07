"""How soon the stream shows what arrived, as ratios to the bare work that it stands on.

    python tests/benchmarks/stream.py --json out/stream.json

The real streaming query runs over files of made-up events, on tables of 100,000 users and 20,000 items, then of ten
times as many users. One micro-batch at a time: from the file's appearance to the commit (visible) and to the end of
both MERGEs (merged), in turn with a bare query whose micro-batches only collect their rows, and with an append and two
MERGEs of the same rows into copies of the tables; then with some events that came before, or take such back. Then files
arrive at a rate that is doubled until the delay grows, and at last as many micro-batches run back to back as an hour
brings at one every ten seconds, while memory is watched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from nightstream.files import write_atomically
from nightstream.runtime import console, logs, session, settings
from pyspark.sql import SparkSession
from rich.table import Table
from stream_clock import Bare, Collecting, Sample, Stream, start_seconds
from stream_world import BASE, enlarged, small

EVENTS, USERS_PER_BATCH = 500, 200
KNOWN = 10
WARM = 4
FILES_PER_SECOND = 4
GROWING = 0.05  # seconds of delay per second
BEHIND = 1 / 3  # of the time that a rate lasts; delays need not grow where a stream so far behind catches up in one go
FLAT = 0.1  # growth of memory, from the second tenth of the micro-batches to the last


def medians(samples: list[Sample]) -> dict[str, float]:
    return {f.name: statistics.median(getattr(s, f.name) for s in samples) for f in fields(Sample)}


def measured(
    stream: Stream,
    bare: Bare,
    collecting: Collecting,
    events: int,
    users: int,
    batches: int,
    label: str,
    known: int = 0,
) -> dict[str, float]:
    """Medians over the micro-batches after some that warm everything up. known: as of Stream.drop."""
    samples = []
    for number in range(WARM + batches):
        sample = stream.sample(events, users, bare, collecting, known)
        place = f"{number + 1 - WARM}/{batches}" if number >= WARM else "(warming up)"
        console.say(
            f"{label} {place}: visible {sample.visible:.2f} s (bare {sample.bare:.2f}, append {sample.append:.2f}), "
            f"merged {sample.merged:.2f} s (MERGEs {sample.merges:.2f})"
        )
        samples.append(sample)
    found = medians(samples[WARM:])
    console.say(f"{label}: " + ", ".join(f"{name} {value:.2f} s" for name, value in found.items()))
    return found


def sustained(stream: Stream, seconds: float, first_rate: int) -> list[dict[str, float]]:
    """Delays at rates each of which is twice the one before; the last one is too high in both of two tries: what a
    MERGE delays at the end of a try is no growth."""
    rates: list[dict[str, float]] = []
    rate = first_rate
    while True:
        for _ in range(2):
            found = {"rate": float(rate), **at_rate(stream, rate, seconds)}
            console.say(
                f"{rate} events/s: p50 {found['p50']:.2f} s, p95 {found['p95']:.2f} s, p99 {found['p99']:.2f} s, "
                f"delay grows by {found['slope']:.3f} s/s{', too high' if found['too_high'] else ''}"
            )
            if not found["too_high"]:
                break
        rates.append(found)
        if found["too_high"]:
            return rates
        rate *= 2


def at_rate(stream: Stream, rate: int, seconds: float) -> dict[str, float]:
    """Delays of events that arrive at an even rate, quantiles over all and growth from the second third to the last;
    and whether the rate is too high, because they grow, or because the last one is so long."""
    clock, each = stream.clock, max(1, rate // FILES_PER_SECOND)
    first, begun = len(clock.commits), time.monotonic()
    drops: list[float] = []
    while (now := time.monotonic()) < begun + seconds:
        due = begun + len(drops) / FILES_PER_SECOND
        if now < due:
            time.sleep(due - now)
        drops.append(stream.drop(each, each))
    clock.wait(lambda: sum(n for _, n in clock.commits[first:]) >= each * len(drops))
    # Files are taken in the order of their appearance, so what is committed first has come first.
    moments, counts = (np.array(column) for column in zip(*clock.commits[first:], strict=True))
    files = np.searchsorted(np.cumsum(counts), (np.arange(len(drops)) + 1) * each)
    delays = moments[files] - np.array(drops)
    # Medians, because a single slow micro-batch is no growth.
    middle, last = np.array_split(delays, 3)[1:]
    slope = float(np.median(last) - np.median(middle)) / (seconds / 3)
    quantiles = {f"p{q}": float(np.percentile(delays, q)) for q in (50, 95, 99)}
    too_high = slope > GROWING or delays[-1] > BEHIND * seconds
    return {**quantiles, "slope": slope, "too_high": bool(too_high)}


def resident_mb() -> tuple[float, float]:
    """Of this process, and of its children (the JVM, Python workers); pages that they share count once."""
    here, children = psutil.Process(), 0
    for child in here.children(recursive=True):
        # Spark's Python workers come and go.
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            children += child.memory_full_info().pss
    return here.memory_full_info().pss / 2**20, children / 2**20


def lasting(stream: Stream, batches: int) -> list[dict[str, int]]:
    """MB of the driver's Python and of its children while micro-batches run back to back, medians of each tenth."""
    clock, tenths = stream.clock, []
    for tenth in np.array_split(np.arange(batches), 10):
        used = []
        for _ in tenth:
            before = len(clock.commits)
            stream.drop(EVENTS, USERS_PER_BATCH)
            clock.wait(lambda before=before: len(clock.commits) > before)
            used.append(resident_mb())
        python, children = np.median(used, axis=0)
        tenths.append({"python": round(python), "jvm": round(children)})
        console.say(f"micro-batch {tenth[-1] + 1}/{batches}: Python {python:.0f} MB, JVM {children:.0f} MB")
    return tenths


def growth(tenths: list[dict[str, int]]) -> float:
    """Of all processes together, from the second tenth (in the first they warm up) to the last."""
    _, early, *_, late = (sum(tenth.values()) for tenth in tenths)
    return late / early - 1


def run(
    spark: SparkSession,
    folder: Path,
    engine: str,
    users: int,
    items: int,
    batches: int,
    seconds: float,
    grown: int,
    hour: int,
) -> dict[str, Any]:
    """All measurements; `grown` times as many users in the second part, and events per micro-batch."""
    console.say(f"a model over {items:,} items; tables of {users:,} users")
    origin = small(spark, folder / "small", items, engine)
    own = enlarged(spark, origin, folder / "own", users)
    stream = Stream(spark, own, users, items, 2)
    start, first = start_seconds(stream)
    console.say(f"nightstream serve took its first event after {start:.1f} s, visible after {first:.1f} s")
    bare = Bare(spark, own, folder / "bare")
    with Collecting(spark, own, folder / "collecting") as collecting, stream.running():
        plain = measured(stream, bare, collecting, EVENTS, USERS_PER_BATCH, batches, "micro-batch")
        changing = measured(
            stream, bare, collecting, EVENTS, USERS_PER_BATCH, batches, "with known events", known=KNOWN
        )
        more = measured(stream, bare, collecting, grown * EVENTS, grown * USERS_PER_BATCH, batches, f"{grown} x events")
    with stream.running():
        rates = sustained(stream, seconds, 50)
        memory = lasting(stream, hour)
    console.say(f"tables of {grown * users:,} users")
    large = enlarged(spark, origin, folder / "large", grown * users)
    large_bare = Bare(spark, large, folder / "large-bare")
    stream = Stream(spark, large, grown * users, items, 3)
    with Collecting(spark, large, folder / "large-collecting") as collecting, stream.running():
        many = measured(stream, large_bare, collecting, EVENTS, USERS_PER_BATCH, batches, f"{grown} x users")
    steady = [rate for rate in rates if not rate["too_high"]]
    best = steady[-1] if steady else {}
    return {
        "engine": engine,
        "visible_s": plain["visible"],
        "merged_s": plain["merged"],
        "visible_over_bare": plain["visible"] / plain["bare"],
        "merged_over_bare": plain["merged"] / plain["merges"],
        "rates": rates,
        "start_s": start,
        "start_visible_s": first,
        "visible_over_append": plain["visible"] / plain["append"],
        "micro_batch_over_merge": plain["merged"] / plain["merges"],
        "ten_times_users": many["visible"] / plain["visible"],
        "ten_times_events": more["visible"] / plain["visible"],
        "events_per_second_per_core": best.get("rate", 0) / (os.cpu_count() or 1),
        **{f"visible_p{q}_s": best.get(f"p{q}") for q in (50, 95, 99)},
        "ten_times_users_merged": many["merged"] / plain["merged"],
        "ten_times_users_merges": many["merges"] / plain["merges"],
        "known_events": changing["visible"] / plain["visible"],
        "seconds": {"plain": plain, "known_events": changing, "ten_times_events": more, "ten_times_users": many},
        "memory_mb": memory,
        "memory_growth": growth(memory),
        "users": users,
        "items": items,
        "grown": grown,
    }


def table_of(found: dict[str, Any]) -> Table:
    title = f"{found['users']:,} users, {found['items']:,} items, engine {found['engine']}"
    table = Table(title=title, title_justify="left")
    for name in ("micro-batch", "visible s", "bare s", "ratio", "merged s", "MERGEs s", "ratio"):
        table.add_column(name, justify="right" if name != "micro-batch" else "left")
    labels = {
        "plain": f"{EVENTS} events of {USERS_PER_BATCH} users",
        "known_events": f"{KNOWN} of the events repeated, {KNOWN} taken back",
        "ten_times_events": f"{found['grown']} times the events and users in it",
        "ten_times_users": f"{found['grown']} times the users in the tables",
    }
    for name, label in labels.items():
        row = found["seconds"][name]
        table.add_row(
            label,
            *(f"{row[n]:.2f}" for n in ("visible", "bare")),
            f"{row['visible'] / row['bare']:.1f}",
            *(f"{row[n]:.2f}" for n in ("merged", "merges")),
            f"{row['merged'] / row['merges']:.2f}",
        )
    return table


def rates_of(found: dict[str, Any]) -> Table:
    table = Table("events/s", "p50 s", "p95 s", "p99 s", "growth s/s")
    for rate in found["rates"]:
        delays = (f"{rate[name]:.2f}" for name in ("p50", "p95", "p99"))
        table.add_row(f"{rate['rate']:.0f}", *delays, f"{rate['slope']:.3f}")
    return table


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def measure(
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT.json", help="Write the figures.")] = None,
    users: Annotated[int, typer.Option("--users", help="Users in the tables, a multiple of 4,000.")] = 100_000,
    items: Annotated[int, typer.Option("--items", help="Items in the catalogue.")] = 20_000,
    batches: Annotated[int, typer.Option("--batches", help="Micro-batches that are measured each time.")] = 11,
    seconds: Annotated[float, typer.Option("--seconds", help="How long each rate lasts.")] = 60.0,
    grown: Annotated[int, typer.Option("--grown", help="How many times larger the larger ones are.")] = 10,
    hour: Annotated[int, typer.Option("--hour", help="Micro-batches over which memory is watched, at least 10.")] = 360,
    engine: Annotated[str, typer.Option("--engine", help="What writes: auto, delta-rs or spark.")] = "auto",
    work: Annotated[Path | None, typer.Option("--work", help="Where the tables go; some GB.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Measure the speed layer against the bare work that it stands on."""
    logs.configure(False)
    loaded = settings.load([BASE], overrides or [])
    spark = session.build(loaded.spark, "nightstream stream benchmark")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        with TemporaryDirectory(dir=work) as folder:
            found = run(spark, Path(folder), engine, users, items, batches, seconds, grown, hour)
        if json_out is not None:
            write_atomically(json_out, json.dumps(found, indent=2).encode())
        console.stdout.print(table_of(found))
        console.stdout.print(rates_of(found))
        by_tenths = {kind: ", ".join(str(tenth[kind]) for tenth in found["memory_mb"]) for kind in ("python", "jvm")}
        console.stdout.print(f"MB over {hour} micro-batches, by tenths: {by_tenths['python']} (Python)")
        console.stdout.print(f"and {by_tenths['jvm']} (JVM)")
        verdict = "flat" if found["memory_growth"] <= FLAT else "NOT flat"
        console.stdout.print(f"Memory is {verdict}: {found['memory_growth']:+.0%} from the second tenth to the last")
        figures = {k: v for k, v in found.items() if isinstance(v, float) or v is None}
        console.stdout.print(json.dumps({k: None if v is None else round(v, 2) for k, v in figures.items()}, indent=2))
    finally:
        spark.stop()


if __name__ == "__main__":
    app()
