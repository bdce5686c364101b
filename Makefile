PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOW := $(shell date +%Y%m%d-%H%M%S)
RUN ?= runs/stdlib_gpt-$(NOW)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers often set PYTHONDONTWRITEBYTECODE. The tests start hundreds of processes: without cached bytecode each one compiles
# the launcher again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-workers test-slurm bench check lint types imports format recipes images build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Create .venv with everything (PYTHON=python3.11 to choose the interpreter)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

train: setup  ## Train the example model, then sample from it (RUN=runs/name to choose the directory)
	$(BIN)/launcher experiment=stdlib_gpt run.dir=$(RUN)
	$(BIN)/launcher generate run.dir=$(RUN) 'prompt="def "'

test: setup  ## Run the quick tests (8 minutes on two idle cores)
	@$(MAKE) --no-print-directory --jobs=2 test-workers test-slurm SELECT='-m "not slow"'

ALONE := tests/calibrate tests/runtime/test_slow_rank.py tests/runtime/test_watchdog.py
test-all: setup  ## Run all tests (an hour on two idle cores)
	@$(MAKE) --no-print-directory --jobs=2 test-workers test-slurm SELECT="$(ALONE:%=--ignore=%)"
	$(BIN)/pytest -q $(ALONE)  # run alone: these tests measure this machine and its processes

# Four workers for two cores, because many tests wait for a process. A machine has room for one Slurm
# cluster: one process runs its tests beside the others and shows its output at the end.
test-workers:
	$(BIN)/pytest -q $(SELECT) --numprocesses=4 --dist=loadfile --no-loadscope-reorder --ignore=tests/slurm
test-slurm:
	@shown=$$($(BIN)/pytest -q $(SELECT) tests/slurm 2>&1); code=$$?; echo "$$shown"; exit $$code

bench: setup $(VENV)/.installed-peers  ## Compare speed and memory with other projects on CPU (25 minutes on two idle cores)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

$(VENV)/.installed-peers: $(VENV)/.installed
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

check: lint types imports  ## Check style, types and import direction

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-logo

format: setup  ## Fix what can be fixed, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

recipes: setup  ## Write recipes/ anew: each again by the command that its second line names
	@for recipe in recipes/*.sbatch; do \
	  eval "$(BIN)/launcher $$(sed -n '2s/^# launcher //p' $$recipe) submit.dry_run=true" > $$recipe.new && \
	  mv $$recipe.new $$recipe || exit 1; \
	done

images: setup  ## Draw docs/images/ again (a minute or two)
	$(BIN)/launcher plan model=llama3_8b hardware=h100_80gb hardware.nodes=4 parallelism.tensor=4 \
	  parallelism.pipeline=4 parallelism.sequence_parallel=true training.global_batch_size=64 \
	  training.micro_batch_size=1 precision=bf16 plan.figure=docs/images/plan.png
	$(BIN)/launcher compare compare.figure=docs/images/compare.png logging.wandb.mode=disabled

build: setup  ## Build the source distribution and the wheel into dist/
	$(BIN)/python -m build

clean:  ## Remove builds and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
