# make demo   sets everything up and runs the main job on simulated tissue
# make test   sets everything up and passes the tests
# make lint   ruff and pyright
# make audit  asks the public lists of known faults for what is installed (needs a network)
# make docs   builds the pages into docs/_build/html; a warning is an error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint audit docs clean

# modules are compiled when they are first imported: of the packages' 20,000 few are. That must be allowed, then: else
# each process compiles them anew, and takes twice the time to start
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# each set of packages holds the one before
$(VENV)/.package: pyproject.toml | $(BIN)/pip
	$(PIP) -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/pip
	$(PIP) -e '.[test]'
	touch $(VENV)/.package $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(PIP) -e '.[dev]'
	touch $(VENV)/.package $(VENV)/.test $@

demo: $(VENV)/.package
	rm -rf genar-demo/run  # of an earlier demo
	$(BIN)/genar demo --out genar-demo

# two processes of one thread each: a test's matrices are small, and threads would wait for each other (numba, under
# scanpy, takes all cores otherwise, and leaves them set for torch)
test: $(VENV)/.test
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

audit: $(VENV)/.package
	$(PIP) 'pip-audit>=2.7'
	$(BIN)/pip-audit --skip-editable

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html

clean:
	rm -rf $(VENV) genar-demo
