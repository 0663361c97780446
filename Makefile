# `make demo` and `make test` set everything up by themselves: Python 3.11 or newer with pip is all they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The torch release that is tested; on a CPU machine its CPU build is the one without gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0

.PHONY: demo test lint help clean

demo: $(VENV)/installed
	$(BIN)/rae demo

test: $(VENV)/installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rae needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# Writes what is checked in of the commands' help and the recipes' keys.
help: $(VENV)/installed
	$(BIN)/python tests/test_cli.py > docs/help.txt
	$(BIN)/python tests/test_reproduction.py
	$(BIN)/python tests/test_docs.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
