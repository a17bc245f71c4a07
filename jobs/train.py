"""Nightly step: train the encoders and the ranker, write a model version.

Run it with `spark-submit jobs/train.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.train import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("train")
