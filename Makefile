# nightstream: everything lands in this folder (.venv, data, out), caches of pip and Spark apart.
# Needs make, Python 3.11 and Java 17 or 21; `make PYTHON=/path/to/python3.11` names an interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3.11
BIN := .venv/bin
ML100K := data/ml-100k
KAFKA ?= 127.0.0.1:9092
TOPIC ?= events

.PHONY: help check-machine venv data lint types test test-slow test-faults test-docs demo kafka kafka-send lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

check-machine:
	@.ci/check-machine "$(PYTHON)"

venv: check-machine .venv/.installed ## make .venv from requirements.lock (a minute or two the first time)

# pip's spark-submit looks for Spark and for a Python on the PATH; these two lines let .venv/bin/spark-submit find both
# in .venv, also where the environment is not activated.
define FIND_SPARK
spark=$$($(BIN)/python -c 'import pathlib, pyspark; print(pathlib.Path(pyspark.__file__).parent)'); \
  ln -sfn "$$spark" $(BIN)/spark-distribution; mkdir -p "$$spark/conf"; \
  echo "spark.pyspark.python $(CURDIR)/$(BIN)/python" > "$$spark/conf/spark-defaults.conf"
endef

# uv installs three times faster than pip, so pip first brings uv, from the same lock. uv doesn't read pip's own
# settings (mirrors, certificates): where it can't get through, pip does the whole work. Both check every hash.
.venv/.locked: requirements.lock | check-machine
	@"$(PYTHON)" -m venv .venv
	@echo "installing the packages of requirements.lock into .venv"
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r .venv/uv.lock
	@UV_HTTP_TIMEOUT=60 $(BIN)/uv pip install --quiet --python $(BIN)/python --cache-dir .venv/cache \
	    --no-deps --require-hashes -r requirements.lock \
	  || { echo "uv did not get through, installing with pip (some minutes)"; \
	       $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock; }
	@rm -rf .venv/cache .venv/uv.lock
	@touch $@

.venv/.installed: .venv/.locked pyproject.toml
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	@$(FIND_SPARK)
	@touch $@

data: venv $(ML100K)/ml-100k.inter ## get MovieLens-100k into data/ml-100k

# The data set lies inside a wheel; pip is only the way to get that one file, nothing of it is installed.
# ml-100k.inter is written last, so where it is, the others are.
$(ML100K)/ml-100k.inter: requirements-data.lock | .venv/.installed
	@mkdir -p data/wheel $(ML100K)
	@echo "fetching MovieLens-100k (GroupLens; research use, see README.md for the terms)"
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
	    -r requirements-data.lock -d data/wheel
	@$(BIN)/python .ci/unpack.py data/wheel recbole/dataset_example/ml-100k $(ML100K) \
	    ml-100k.item ml-100k.user ml-100k.inter
	@rm -rf data/wheel

lint: venv ## ruff: rules, format and import order; import-linter: which package may import which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet lib jobs streaming tests
	@$(BIN)/lint-imports --no-logo

types: venv ## mypy
	@$(BIN)/mypy

test: venv lint types ## lint, types and the fast tests
	@$(BIN)/pytest -m "not slow and not faults and not docs"

# Exit code 5 of pytest means that it collected no test: there is nothing slow yet, and saying so beats a red run.
test-slow: venv ## the tests that need servers, a browser or a long run
	@$(BIN)/pytest -m "slow and not faults" || { code=$$?; [ $$code -eq 5 ] && echo "no test is marked slow" || exit $$code; }

test-faults: venv ## stream and night killed at every write and many moments, and what is rare and long besides (long)
	@$(BIN)/pytest -m faults

test-docs: venv data ## every shell command that README and docs show (long)
	@$(BIN)/pytest -m docs

demo: venv data ## MovieLens-100k from end to end; writes out/ and ends with the path of its report
	@$(BIN)/nightstream demo --settings movielens --settings demo

# The broker is a Java process of its own; its JARs, its settings and what it stores lie below out/kafka.
kafka: venv ## a Kafka broker to try the stream with, at 127.0.0.1:9092, until Ctrl-C
	@$(BIN)/python tests/kafka_broker.py run out/kafka $(KAFKA) $(TOPIC)

kafka-send: venv ## send the lines of stdin to that broker: echo '{...}' | make kafka-send
	@$(BIN)/python tests/kafka_broker.py send out/kafka $(KAFKA) $(TOPIC)

# To take in newer versions, delete the lines concerned from requirements.lock first: what is there stays pinned.
# It is made by `uv pip compile` from pyproject.toml, for Python 3.11 on any system, with hashes and without addresses.
lock: venv ## renew requirements.lock and requirements-data.lock after a change of pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url --output-file requirements.lock --quiet
	@echo "recbole==1.2.1" | $(BIN)/uv pip compile - --no-deps --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url --output-file requirements-data.lock --quiet

clean: ## delete what runs leave behind (out, caches, Spark's droppings); .venv and data stay
	@rm -rf out build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis spark-warehouse metastore_db derby.log
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
