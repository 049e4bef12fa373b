# Set-up, tests and demo; every target makes its own environment when there is none, of the versions in constraints/.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
NEW_VENV ?= .venv-newest-trl
NEWEST_VENV ?= .venv-newest
NO_TRL_VENV ?= .venv-no-trl
LOW_PYTHON ?= python3.11
LOW_VENV ?= .venv-low
LOW_TORCH ?= torch==2.6.0
ENGINES_VENV ?= .venv-engines
LLAMA_CPP ?= .llama.cpp
LOCK_VENV ?= .venv-lock
SUITE_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test slow lint peft-suite lower-bounds newest-trl no-trl engines newest lock clean

# One process a core, one thread a process; `PYTEST_ARGS="-n 0"` runs in one process.
export OMP_NUM_THREADS ?= 1
# Without a GPU Triton's kernels are interpreted, which Triton decides when it is imported.
export TRITON_INTERPRET ?= 1
processes = -n auto --maxprocesses 8 --dist worksteal
all = slow or not slow
pytest = $(1)/bin/python -m pytest $(processes)
torch = $(if $(TORCH),"$(TORCH)",-r constraints/torch.txt)

# In a rule for the command peft-hoe, which pip writes last, so that it stands for a finished set-up: a new environment
# of an interpreter and a file of constraints, and the pip that installs by them. One call of it: nothing is installed twice.
pip = $(dir $@)python -m pip install --constraint constraints/$(1).txt
define environment
	$(1) -m venv $(@:/bin/peft-hoe=)
	$(call pip,$(2)) --quiet --upgrade pip
endef

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/bin/peft-hoe: pyproject.toml constraints/trl-1.12.txt constraints/torch.txt
	$(call environment,$(PYTHON),trl-1.12)
	$(call pip,trl-1.12) $(torch) -e ".[all,dev]"
	touch $@

setup: $(VENV)/bin/peft-hoe  ## make the environment in $(VENV)

demo: $(VENV)/bin/peft-hoe  ## build, save, load and steer a tiny model, offline
	$(VENV)/bin/peft-hoe demo

test: $(VENV)/bin/peft-hoe  ## run the tests, but the slow ones
	$(call pytest,$(VENV)) $(PYTEST_ARGS)

slow: $(VENV)/bin/peft-hoe  ## run the slow tests: processes, servers, compilers, whole experiments
	$(call pytest,$(VENV)) -m slow $(PYTEST_ARGS)

lint: $(VENV)/bin/peft-hoe  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

peft-suite: $(VENV)/bin/peft-hoe  ## run the tests of the installed PEFT with HoEConfig
	$(VENV)/bin/python scripts/peft_suite/run.py $(SUITE_ARGS)

$(NEW_VENV)/bin/peft-hoe: pyproject.toml constraints/newest-trl.txt constraints/torch.txt
	$(call environment,$(PYTHON),newest-trl)
	$(call pip,newest-trl) $(torch) -e ".[all,dev]"
	touch $@

newest-trl: $(NEW_VENV)/bin/peft-hoe  ## run the tests of training with the newest TRL
	$(call pytest,$(NEW_VENV)) -m "$(all)" tests/training $(PYTEST_ARGS)

$(NO_TRL_VENV)/bin/peft-hoe: pyproject.toml constraints/trl-1.12.txt constraints/torch.txt
	$(call environment,$(PYTHON),trl-1.12)
	$(call pip,trl-1.12) $(torch) -e ".[eval,dev]"
	touch $@

no-trl: $(NO_TRL_VENV)/bin/peft-hoe  ## run the tests of training without TRL
	$(call pytest,$(NO_TRL_VENV)) -m "$(all)" tests/training $(PYTEST_ARGS)

$(LOW_VENV)/bin/peft-hoe: pyproject.toml constraints/lower-bounds.txt
	$(call environment,$(LOW_PYTHON),lower-bounds)
	$(call pip,lower-bounds) "$(LOW_TORCH)" -e ".[train,eval]" pytest pytest-timeout pytest-xdist vaderSentiment
	touch $@

lower-bounds: $(LOW_VENV)/bin/peft-hoe  ## run the tests with every dependency at its lower bound
	$(call pytest,$(LOW_VENV)) -m "$(all)" $(PYTEST_ARGS)

# The constraints are all that is installed besides torch: vLLM names a torchvision that does not go with this torch.
$(ENGINES_VENV)/bin/peft-hoe: pyproject.toml constraints/engines.txt constraints/torch.txt
	$(call environment,$(PYTHON),engines)
	$(dir $@)python -m pip install $(torch)
	$(dir $@)python -m pip install --no-deps --requirement constraints/engines.txt -e .
	touch $@

engines: $(ENGINES_VENV)/bin/peft-hoe  ## run the tests of quantised bases, vLLM and llama.cpp, which is built once into $(LLAMA_CPP)
	$(ENGINES_VENV)/bin/python scripts/llama_cpp.py $(LLAMA_CPP)
	PEFT_HOE_LLAMA_CPP="$(LLAMA_CPP)" PEFT_HOE_REQUIRE_QUANTISED=1 \
		$(ENGINES_VENV)/bin/python -m pytest tests/tuner/test_quantised.py tests/engines $(PYTEST_ARGS)

newest:  ## install the newest of everything, run the tests, write the result into docs/compatibility.md
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -m pip install "$(or $(TORCH),torch)" -e ".[all,dev]"
	$(NEWEST_VENV)/bin/python scripts/newest.py $(processes) $(PYTEST_ARGS)

$(LOCK_VENV)/bin/uv:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet uv

lock: $(LOCK_VENV)/bin/uv  ## write constraints/*.txt anew: the newest versions that constraints/*.in allow
	$(LOCK_VENV)/bin/python scripts/lock.py --uv $(LOCK_VENV)/bin/uv

clean:  ## remove what the targets made
	rm -rf $(VENV) $(NEW_VENV) $(NEWEST_VENV) $(NO_TRL_VENV) $(LOW_VENV) $(ENGINES_VENV) $(LLAMA_CPP) $(LOCK_VENV) .peft-suite build dist .pytest_cache .mypy_cache .ruff_cache
