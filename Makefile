# Set-up, tests and demo; every target makes its own environment when there is none.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
LOW_PYTHON ?= python3.11
LOW_VENV ?= .venv-low
NEW_VENV ?= .venv-newest-trl
SUITE_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test lint types peft-suite lower-bounds newest-trl clean

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

# Without an upper bound on TRL: it has no PPOTrainer since 1.13, and those tests skip.
$(NEW_VENV)/bin/peft-hoe:
	$(PYTHON) -m venv $(NEW_VENV)
	$(NEW_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEW_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(NEW_VENV)/bin/python -m pip install --quiet -e ".[train,eval,dev]"

newest-trl: $(NEW_VENV)/bin/peft-hoe  ## run the tests of training with the newest TRL
	$(NEW_VENV)/bin/python -c "import trl; from packaging.version import Version; print('trl', trl.__version__); assert Version(trl.__version__) >= Version('1.13')"
	OMP_NUM_THREADS=1 $(NEW_VENV)/bin/python -m pytest tests/training $(PYTEST_ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) $(LOW_VENV) $(NEW_VENV) .peft-suite build dist .pytest_cache .mypy_cache .ruff_cache
