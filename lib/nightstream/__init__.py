"""nightstream: a recommender in the lambda architecture on Spark and Delta Lake."""

__version__ = "0.1.0"
