# Two commands for a newcomer: make demo, make test. Each makes what it needs, once, in .venv.
# Needed: Linux, Python 3.11 or later with venv, a C compiler, a Rust toolchain.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO ?= cargo

# Set, an activated environment of the caller would be built into instead of ours.
unexport CONDA_PREFIX
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

SOURCES := Cargo.toml $(wildcard Cargo.lock) pyproject.toml $(wildcard crates/*/Cargo.toml) \
	$(shell find crates -name '*.rs')

.PHONY: help demo test lint bench wheels fuzz build clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo   see quire work on real data'
	@echo 'make test   run all tests'
	@echo 'make lint   format, lints, types; warnings are errors'
	@echo 'make bench  measure, and write docs/benchmarks.md'
	@echo 'make wheels try real wheels; writes the table of docs/wheels.md (downloads 5 GB)'
	@echo 'make fuzz   feed random bytes to every parser'
	@echo 'make clean  remove everything that was built'

demo: build $(VENV)/.extra-demo
	$(BIN)/quire demo

test: build $(VENV)/.extra-test $(VENV)/.extra-demo
	tools/test_servers
	timeout --kill-after=10 1200 $(CARGO) test --release --quiet --package quire-core
	$(BIN)/python -m pytest

lint: build $(VENV)/.extra-lint $(VENV)/.extra-test $(VENV)/.extra-demo
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets --quiet -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy python tools
	$(BIN)/python -m mypy.stubtest quire._native --mypy-config-file pyproject.toml --ignore-disjoint-bases \
		--allowlist tools/stubtest_allowlist.txt

bench: build $(VENV)/.extra-bench $(VENV)/.extra-test
	$(BIN)/python -m benches

wheels: build $(VENV)/.extra-test
	$(BIN)/python tools/try_wheels.py

fuzz: build $(VENV)/.extra-test
	PATH="$(CURDIR)/$(BIN):$$PATH" fuzz/run

build: $(VENV)/.extension

clean:
	rm -rf $(VENV) target fuzz/target .mypy_cache .ruff_cache .pytest_cache .hypothesis fuzz/.hypothesis
	rm -f python/quire/_native*.so
	find $(wildcard python tests benches fuzz examples tools) -name __pycache__ -prune -exec rm -rf {} +

# The extension and the library itself, editable: a change of Python code needs no build.
$(VENV)/.extension: $(VENV)/.tools $(SOURCES)
	$(BIN)/maturin develop --release --quiet
	@touch $@

$(VENV)/.tools: pyproject.toml tools/make_venv
	tools/make_venv $(PYTHON) $(VENV)
	$(BIN)/python tools/requirements.py build > $(VENV)/requirements-build.txt
	$(BIN)/pip install --quiet --requirement $(VENV)/requirements-build.txt
	@touch $@

$(VENV)/.extra-%: $(VENV)/.tools
	$(BIN)/python tools/requirements.py $* > $(VENV)/requirements-$*.txt
	$(BIN)/pip install --quiet --requirement $(VENV)/requirements-$*.txt
	@touch $@
