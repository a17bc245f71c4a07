"""Nightly step: read the sources into events, quarantine, items and users.

Run it with `spark-submit jobs/ingest.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.ingest import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("ingest")
