# make reproduce   set up, train two CPU ladders, write the report (resumable;
#                  LADDER=second_seeds: the same with other seeds)
# make test        set up, lint, run the tests
# make test-all    the slow ones too (make test-slow: those alone)
# make test-slurm  sweeps on a Slurm that it installs and starts on this machine (root)
# make house       lines per room, largest files, circles of imports
# make bench       all benchmarks, against floors and PyTorch (PRESET=gpu on a GPU)
PYTHON ?= python3
VENV ?= .venv
LADDER ?= reproduce
RUNS ?= runs/$(LADDER)
BIN := $(VENV)/bin
PRESET ?= cpu
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)
# Most of a test is compilation, on one core. A file stays on one worker, with its
# fixtures and compiled programs.
SPREAD ?= -n auto --maxprocesses=4 --dist=loadfile

.PHONY: reproduce test test-slow test-slurm test-all lint house bench setup setup-dev

reproduce: setup
	for name in siblings tax; do \
	  $(BIN)/python -m launch.sweep --config=experiments/$$name.py:$(LADDER) \
	    --workdir=$(RUNS)/$$name --parallel=$(WORKERS) || exit; \
	done
	$(BIN)/python -m launch.report $(RUNS) --output=$(RUNS)/report

test: lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not slurm"

test-slow: setup-dev
	$(BIN)/python -m pytest $(SPREAD) -m slow

test-slurm: setup-dev
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

test-all: test test-slow test-slurm

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

house: setup-dev
	$(BIN)/python -m tests.house

bench: setup-dev
	for name in train loss decode pack; do \
	  $(BIN)/python -m launch.benchmark $$name --preset=$(PRESET) || exit; \
	done

setup: $(VENV)/.requirements
setup-dev: $(VENV)/.requirements-dev

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.requirements
