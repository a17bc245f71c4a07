"""The copy of every user's newest list in PostgreSQL or Redis, kept fresh.

Run it with `spark-submit streaming/sync.py --settings conf/movielens.yaml --settings mine.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.sync import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("sync")
