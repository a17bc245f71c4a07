"""Measure the quality of the lists, by leave-one-out or prequentially.

Run it with `spark-submit jobs/evaluate.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.evaluate import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("evaluate")
