"""The night: ingest, train, publish, apply.

Run it with `spark-submit jobs/nightly.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.nightly import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("nightly")
