# Everything a fresh machine needs: Python 3.11 or newer (with venv), pip and make.
#
#   make demo        create the environment, install fanal, run the demonstration
#   make test        create the test environment, run the whole default suite with lint and type checks
#   make test-slow   the checks that take minutes of training or sampling
#   make docs        build the documentation site, strictly
#
# On a CPU-only machine without a local CPU wheel of torch:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow docs clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) -e .
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) -e '.[test,docs]'
	touch $@

demo: .venv/.demo
	$(BIN)/fanal demo --overwrite

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: .venv/.test
	$(BIN)/pytest -m slow

docs: .venv/.test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site dist
