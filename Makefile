# Every target works in a fresh clone: it makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per test process: the models are tiny, and threads of several processes fight.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

PROMPT ?= Mr. Dorling was a tall man. I had never seen Mr. Dor
REPORT ?= demo-report.html

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench mutants gpu real docs linkcheck notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.installed  ## write the circuit report of a bundled model to demo-report.html
	@$(BIN)/mechinterp-attn report gelu-2l --prompt "$(PROMPT)" --out "$(REPORT)" > /dev/null
	@echo "The circuit report of gelu-2l is in $(CURDIR)/$(REPORT): open it in a browser."

test: lint  ## lint, then run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

mutants: $(VENV)/.installed-test  ## make small slips in a copy of the package: each must break a test
	$(ONE_THREAD) $(BIN)/python -m tests.mutants.run $(MUTANTS)

gpu: $(VENV)/.installed-test  ## run the tests that need a GPU; without one they are skipped, and say so
	$(ONE_THREAD) $(BIN)/python -m pytest -m gpu -rs

lint: $(VENV)/.installed-test  ## ruff, mypy, docstrings and, where node is, biome
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/docstrings.py
	$(BIN)/python tests/js/lint.py

format: $(VENV)/.installed-test  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those that need no arguments; the other scripts in benchmarks/ train or fit, and say what they need.
# `make bench ONLY=forward` runs one of them.
ONLY ?=
BENCHMARKS := $(wildcard benchmarks/bench_*.py) $(patsubst %,benchmarks/%.py,detectors forward memory modes three_forms)
bench: $(VENV)/.installed-bench  ## run the benchmarks; their tables go to docs/benchmarks/
	@for script in $(if $(ONLY),$(patsubst %,benchmarks/%.py,$(ONLY)),$(BENCHMARKS)); do \
		echo "== $$script"; BENCH_TABLES=docs/benchmarks $(BIN)/python $$script || exit 1; done

real: $(VENV)/.installed-real  ## fetch a real model, SmolLM2-135M in 4 bits, into real/ (0.5 GB)
	$(BIN)/python benchmarks/smollm2.py

docs: $(VENV)/.installed-docs  ## build docs/_build/html; a warning or a dead link is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html
	@echo "Open $(CURDIR)/docs/_build/html/index.html"

linkcheck: $(VENV)/.installed-docs  ## try the documentation's links to other hosts; needs a network
	$(BIN)/sphinx-build -q -b linkcheck docs docs/_build/linkcheck

notebooks: $(VENV)/.installed-test  ## run the notebooks and keep their outputs
	$(ONE_THREAD) $(BIN)/python notebooks/execute.py

clean:  ## remove what was built, .venv too
	rm -rf $(VENV) docs/_build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(REPORT)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[test,lint]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[bench]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-real: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[bench,gguf]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-bench

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	@touch $@ $(VENV)/.installed
