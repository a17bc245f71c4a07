"""Nightly step: publish the newest trained model version.

Run it with `spark-submit jobs/publish.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.publish import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("publish")
