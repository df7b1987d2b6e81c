# Needs python3 (3.11 to 3.13) and make. Another interpreter: make PYTHON=python3.12 demo
# More options for pip: make PIP_OPTIONS="--index-url ..." demo
PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS ?=
MODEL ?= tiny-minicpm
PROMPT ?= Tell me a story about a fox.

BIN := $(VENV)/bin
DEMO := $(VENV)/$(MODEL).ark

.PHONY: demo install test lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.build
	$(BIN)/arkinfer build $(MODEL) --target cpu -o $(DEMO) --force
	$(BIN)/arkinfer run --artifact $(DEMO) "$(PROMPT)"

install: $(VENV)/.build

# Code for aarch64 is run, not only compiled.
test: $(VENV)/.test
	@$(BIN)/python -c 'from arkinfer.exporters import emulator; emulator.command("max", emulator.root())' 2>/dev/null || \
	  { echo "make test needs qemu: sudo apt-get install qemu-user-static libc6-arm64-cross"; exit 1; }
	$(BIN)/python -m pytest -n 2 $(PYTEST_OPTIONS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typetree.py
	$(BIN)/mypy

# The stamps stand for an environment with these extras; they are redone when the dependencies may have changed.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "arkinfer needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -e '.[build]'
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -e '.[test,lint]'
	touch $(VENV)/.build $@

clean:
	rm -rf $(VENV) .types build *.egg-info
