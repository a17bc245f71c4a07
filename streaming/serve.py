"""The streaming query that keeps every list fresh between the nights.

Run it with `spark-submit streaming/serve.py --settings conf/movielens.yaml`.
"""

from nightstream.cli import run_file
from nightstream.steps.serve import run

__all__ = ["run"]

if __name__ == "__main__":
    run_file("serve")
