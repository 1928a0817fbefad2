# `make` lists the targets. Each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml streamconv/_kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[test,dev]"
	touch $@

test: $(VENV)/.ready ## run the tests (sets up .venv; no torch)
	$(BIN)/pytest -q

check: $(VENV)/.ready ## formatter, linter, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_imports.py

.PHONY: help test check
.DEFAULT_GOAL := help
