# The everyday commands. A .venv that exists is kept with what is installed in it, a CPU-only torch for instance.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --editable
# One stamp for each set of extras, so that a second run installs nothing.
STAMP := $(VENV)/.installed
# mmengine asks for the OpenCV with windows, whose libraries (libGL) a machine without a desktop lacks.
HEADLESS_OPENCV = $(BIN)/python -m pip install --force-reinstall --no-deps opencv-python-headless

.PHONY: help demo dev test lint audit docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   train and evaluate a small segmentation network on the embedded MRI, and draw a report"
	@echo "make dev    set up for changes: everything installed, the hook of pre-commit too"
	@echo "make test   run the tests"
	@echo "make lint   run ruff, and mypy on the built wheel"
	@echo "make audit  look for known vulnerabilities of what is installed, where an index of them can be reached"
	@echo "make docs   build the documentation site into docs/_build/html"
	@echo "make clean  remove build leftovers and caches (the environment stays)"
	@echo "PYTHON=python3.12 make ...  chooses the interpreter of a new .venv (3.10 or newer)"

demo: $(STAMP)-all
	$(BIN)/vision-ssm quickstart

dev: $(STAMP)-dev
	$(BIN)/pre-commit install

test: $(STAMP)-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses auto --durations 10

lint: $(STAMP)-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYTHON=$(CURDIR)/$(BIN)/python .ci/typecheck

audit: $(STAMP)-dev
	$(BIN)/python .ci/audit

docs: $(STAMP)-docs
	$(BIN)/sphinx-build -q --fresh-env --fail-on-warning --keep-going docs docs/_build/html

clean:
	rm -rf build dist docs/_build docs/_generated *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(STAMP)-*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP)-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP_INSTALL) '.[$*]'
	$(BIN)/python -c 'import cv2' 2>/dev/null || $(HEADLESS_OPENCV)
	touch $@
