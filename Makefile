# Every target sets up what it needs. PYTHON: the interpreter of the environment, 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests in a process per core, of which each has servers of its own: not too many. A file's tests share them.
SHARED := -n auto --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all lint types bench wheel clean

demo: $(VENV)/serve.stamp
	$(BIN)/tunefleet demo

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not slow" $(SHARED)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(SHARED)

lint: $(VENV)/dev.stamp types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p tunefleet
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/dev.stamp
	$(BIN)/python -m tests.benchmarks $(ARGS)

wheel: $(VENV)/dev.stamp
	rm -rf dist && $(BIN)/python -m build --wheel

# Type checkers don't follow an editable install's mapping: a tree of links looks to them like the package.
types:
	rm -rf build/types && mkdir -p build/types/tunefleet
	ln -s $(CURDIR)/framework/* build/types/tunefleet/
	ln -s $(CURDIR)/runtime $(CURDIR)/adapters_store $(CURDIR)/examples build/types/tunefleet/

$(VENV)/serve.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[serve,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
