# Set-up, tests and demo; every target makes its own environment when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
LOW_PYTHON ?= python3.11
LOW_VENV ?= .venv-low
SUITE_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test lint types peft-suite lower-bounds clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

# pip installs the project after its dependencies, so its command stands for a finished set-up.
$(VENV)/bin/peft-hoe:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install "$(TORCH)"
	$(VENV)/bin/python -m pip install -e ".[all,dev]"

setup: $(VENV)/bin/peft-hoe  ## make the environment in $(VENV)

demo: $(VENV)/bin/peft-hoe  ## build, save, load and steer a tiny model, offline
	$(VENV)/bin/peft-hoe demo

test: $(VENV)/bin/peft-hoe  ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/bin/peft-hoe  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

peft-suite: $(VENV)/bin/peft-hoe  ## run the tests of the installed PEFT with HoEConfig
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/peft_suite/run.py $(SUITE_ARGS)

$(LOW_VENV)/bin/peft-hoe: scripts/lower-bounds.txt
	$(LOW_PYTHON) -m venv $(LOW_VENV)
	$(LOW_VENV)/bin/python -m pip install -r scripts/lower-bounds.txt
	$(LOW_VENV)/bin/python -m pip install --no-deps -e .
	touch $@

lower-bounds: $(LOW_VENV)/bin/peft-hoe  ## run the tests with every dependency at its lower bound
	OMP_NUM_THREADS=1 $(LOW_VENV)/bin/python -m pytest $(PYTEST_ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) $(LOW_VENV) .peft-suite build dist .pytest_cache .mypy_cache .ruff_cache
