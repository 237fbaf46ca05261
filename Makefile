# `make demo` runs the main job, `make test` checks everything; both set up the virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint types layers tests clean

demo: $(INSTALLED)
	$(BIN)/python -m fedomc_speech compare --name demo

test: lint types layers tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

tests: $(INSTALLED)
	$(BIN)/pytest -n 2

$(INSTALLED): pyproject.toml apps/speech/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedomc needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(BIN)/pip install --constraint constraints.txt --editable '.[flower,dev]' --editable apps/speech
	touch $@

clean:
	rm -rf $(VENV) runs build dist
