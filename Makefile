# `make demo` and `make test` each work on a fresh machine: they make .venv where it is absent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests without Ray run in so many processes, and beside them those that start Ray, since many wait
# for processes of their own; each has whole files, whose fixtures are then made once.
TEST_PROCESSES ?= 2
PARALLEL = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# The files with tests that start Ray: each process imports all the files that it is given.
RAY_FILES = $(shell grep -rl --include='test_*.py' 'mark\.ray\b' tests)
# pip compiles nothing, so the first import of a module has to store its bytecode: otherwise each of
# the many processes that tests start compiles torch again, which doubles their time.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

.PHONY: demo test test-local test-ray test-slow lint bench clean

demo: $(VENV)/.demo
	$(BIN)/raybert demo

test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-local test-ray

test-local: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not ray and not slow and not peers"

test-ray: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "ray and not slow and not peers" $(RAY_FILES)

test-slow: $(VENV)/.dev $(VENV)/.kserve
	RAYBERT_MANY_EXAMPLES=1 $(BIN)/python -m pytest -m "slow or hypothesis"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/peers.py --shape keras --json
	$(BIN)/python benchmarks/peers.py --shape small --json

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raybert needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[sample,report]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@

# Its client needs older versions of psutil, protobuf and pandas than raybert and Ray.
$(VENV)/.kserve: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/kserve
	$(VENV)/kserve/bin/python -m pip install --disable-pip-version-check --quiet --no-compile kserve==0.21.0
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
