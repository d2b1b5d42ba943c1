# make demo    train on the bundled MNIST, print the table, write the report
# make bench   every benchmark, or BENCH="overhead memory"; hours, on a machine with nothing else to do
# make test    install what the tests need and run them
# Everything lives in $(VENV); nothing outside the checkout is touched. All paths are relative, so that the
# checkout may lie in a folder whose name has spaces.

PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch is a tenth of the size of the CUDA build. For a GPU: make setup TORCH_INDEX=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_OUT ?= runs/demo
BENCH_OUT ?= runs/bench
BENCH ?=
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
SOURCES := pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types bench docs clean

help:
	@echo "targets: setup demo test lint types bench docs clean (variables: PYTHON VENV TORCH_INDEX DEMO_OUT BENCH_OUT BENCH PYTEST_ARGS)"

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	"$(VENV)/bin/toreq" demo --out "$(DEMO_OUT)"

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

types: $(VENV)/.installed-dev
	$(PY) -m basedpyright --pythonpath "$(PY)"

bench: $(VENV)/.installed-bench
	"$(VENV)/bin/toreq" bench $(BENCH) --json "$(BENCH_OUT)/bench.json" --plots "$(BENCH_OUT)"

docs: $(VENV)/.installed-docs
	$(PY) -m mkdocs build --strict

# Leaves the environment and the runs alone: both are somebody's work.
clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make: expected Python 3.11 or newer, got %d.%d; name another one with PYTHON=python3.12" % v[:2])'
	"$(PYTHON)" -m venv "$(VENV)"

# --no-deps: the extra index is asked for torch only, so that an unreachable one costs a second and pip then
# finds torch where it finds everything else.
$(VENV)/.installed: $(SOURCES) | $(PY)
	@echo "installing toreq into $(VENV) (some minutes on a fresh machine)"
	$(INSTALL) --no-deps $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch
	$(INSTALL) -e .
	@touch "$@"

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/.installed
	$(INSTALL) -e ".[dev]"
	@touch "$@"

$(VENV)/.installed-bench: $(SOURCES) | $(VENV)/.installed
	$(INSTALL) -e ".[bench]"
	@touch "$@"

$(VENV)/.installed-docs: $(SOURCES) | $(VENV)/.installed
	$(INSTALL) -e ".[docs]"
	@touch "$@"
