PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SYNC   := $(VENV)/.installed
EXTRAS := .venv-extras
LMMS   := lmms-eval==0.7.3

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-extras lint bench bench-full coverage clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(SYNC): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(EXTRAS)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quantise,lmms]'
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(LMMS)
	touch $@

demo: $(SYNC)  ## skip experts in the embedded model: calibrate, search, evaluate, time (4 minutes)
	$(BIN)/modes-fx demo --out out/demo

test: $(SYNC)  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "not slow"

test-all: $(SYNC)  ## run the slow tests too: every family in every form
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-extras: $(EXTRAS)/.installed  ## run the tests that need torchao and lmms-eval, in an environment of their own
	$(EXTRAS)/bin/python -c 'import lmms_eval.evaluator, torchao'  # without them, the tests would only skip
	$(EXTRAS)/bin/python -m pytest --numprocesses auto --dist loadfile tests/quantise tests/lmms

lint: $(SYNC)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SYNC)  ## time an MoE block of Qwen3-VL-30B-A3B against stock settings (2 minutes)
	$(BIN)/modes-fx bench --tokens 1 512 --rounds 5 --json out/bench/bench.json

bench-full: $(SYNC)  ## measure all: blocks on 1 and 2 threads, decoder layers, growth, overhead (12 minutes, 12 GB of memory)
	$(BIN)/modes-fx bench --parts block layers growth overhead --tokens 1 64 512 2048 --threads 1 2 \
		--json out/bench/bench-full.json --plot out/bench/bench-full.svg

coverage: $(SYNC)  ## write the README's table of model families anew
	$(BIN)/python -m tests.families.coverage --write README.md

clean:  ## remove the environment and all output
	rm -rf $(VENV) $(EXTRAS) out
