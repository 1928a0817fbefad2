# `make` lists the targets. Each target makes the environment it needs; nothing is installed outside this folder. One rule
# makes an environment, with all that any target wants of it: a target that passes does so in a fresh clone, too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard streamconv/ggml/kernels/*.[ch] streamconv/files/*.c)
CONVERSIONS := tests/golden $(patsubst %,tests/unit/test_%.py,convert adapter merge verify batch_dask sources cli vocab*)
TORCH ?= torch==2.13.0
PYRIGHT ?= basedpyright==1.40.2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[test,dev]"
	touch $@

.venv-demo/.ready: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet -e .
	touch $@

.venv-parity/.ready: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet "$(TORCH)"
	.venv-parity/bin/pip install --quiet -e ".[test,parity]"
	touch $@

.venv-types/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-types
	.venv-types/bin/pip install --quiet "$(PYRIGHT)"
	touch $@

.venv-lowest/.ready .venv-newest/.ready: .venv-%/.ready: pyproject.toml $(KERNELS) $(VENV)/.ready
	$(BIN)/python -m tests.tools.environment $* .venv-$*
	touch $@

demo: .venv-demo/.ready ## a small LFM2 checkpoint becomes BF16 and Q8_0 files; shows what is in them and what it cost
	.venv-demo/bin/python -m benchmarks.demo

test: $(VENV)/.ready ## the tests (no torch)
	$(BIN)/pytest -q

test-all: $(VENV)/.ready ## the tests, those that take minutes included
	$(BIN)/pytest -q -m "not parity"

parity: .venv-parity/.ready ## against live llama.cpp converters, transformers and PEFT, on published weights too (downloads torch and 1 GB of models; an hour): FAMILIES="qwen3 gemma3"
	.venv-parity/bin/pytest -q -m parity tests/parity

fuzz: $(VENV)/.ready ## every parser on mutated files: SECONDS_PER_TARGET=60, or EXECUTIONS=100000 of each, TARGET=gguf SEED=7
	$(BIN)/python -m tests.fuzz $(if $(EXECUTIONS),--executions $(EXECUTIONS),--seconds $(or $(SECONDS_PER_TARGET),60)) $(addprefix --target ,$(TARGET)) $(addprefix --seed ,$(SEED))

kills: $(VENV)/.ready ## SIGKILL, SIGINT, SIGTERM, and changes of a shard, at random moments: KILLS=500 CHANGES=300 DIRECTORY=ON-A-DISK-TO-TRY
	$(BIN)/python -m tests.fault.kills --kills $(or $(KILLS),500) $(addprefix --directory ,$(DIRECTORY))
	$(BIN)/python -m tests.fault.signals --signals $(or $(KILLS),500) $(addprefix --directory ,$(DIRECTORY))
	$(BIN)/python -m tests.fault.shards --changes $(or $(CHANGES),300) $(addprefix --directory ,$(DIRECTORY))

check: $(VENV)/.ready ## formatter, linter, types, import rules, generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_imports.py tests/unit/test_docs_json.py \
	  tests/unit/test_cli.py::test_the_page_is_what_the_parser_says

types: $(VENV)/.ready .venv-types/.ready ## the public names as mypy and pyright see them (downloads node)
	$(BIN)/pytest -q tests/unit/test_typing.py
	.venv-types/bin/basedpyright -p tests/typing --pythonpath $(BIN)/python

lowest: .venv-lowest/.ready ## the conversions with the oldest Python here and the lowest versions that pyproject.toml admits
	.venv-lowest/bin/pytest -q $(CONVERSIONS)

newest: .venv-newest/.ready ## the conversions with the newest Python here and the newest version of everything
	.venv-newest/bin/pytest -q $(CONVERSIONS)

docs: $(VENV)/.ready ## the pages made of the source: docs/cli.md, docs/errors.md, docs/architectures.md
	$(BIN)/python -m tests.tools.cli_docs
	$(BIN)/python -m tests.tools.error_docs
	$(BIN)/python -m tests.tools.architecture_docs

package-check: $(VENV)/.ready ## wheel and sdist install and run in fresh environments, on every Python that is here
	$(BIN)/python -m tests.tools.package_check

bench: $(VENV)/.ready ## speed and memory: MODELS="350m 1.2b 2.6b 8b-a1b" OUTTYPES="bf16 f16 q8_0" LLAMA_CPP=FOLDER PAIRS=9
	$(BIN)/python -m benchmarks.run

bench-smoke: $(VENV)/.ready ## the benchmark in seconds, so that it cannot rot
	$(BIN)/python -m benchmarks.run --smoke

clean: ## remove environments and made files
	rm -rf $(VENV) .venv-demo .venv-parity .venv-types .venv-lowest .venv-newest .demo .cache build dist *.egg-info

.PHONY: help demo test fuzz kills check docs package-check bench bench-smoke clean test-all parity lowest newest types
.DEFAULT_GOAL := help
