"""Nightly step: bring every user's vector and list to the published model.

Run it with `spark-submit jobs/apply.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.apply import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("apply")
