PYTHON ?= python3
SHELL  := bash
VENV   := .venv
BIN    := $(VENV)/bin
SYNC   := $(VENV)/.installed
EXTRAS := .venv-extras
NEWEST := .venv-newest
VLLM   := .venv-vllm
DOCS   := .venv-docs
BARE   := .venv-bare
UV     := .venv-lock/bin/uv
PIP    := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses auto --dist worksteal --durations 10
TESTS  := .[dev]
ALL    := .[dev,quantise,lmms]
SERVED := .[dev-vllm]
SITE   := mkdocs-material mkdocstrings[python]
LMMS   := lmms-eval==0.7.3
THEIRS := .upstream

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-wide test-all test-extras test-vllm test-newest test-upstream fuzz crash soak lint bench bench-full gpu-check coverage pages docs package lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# One lock for each environment: constraints.txt for .venv, constraints-NAME.txt for .venv-NAME.
#
# $(call install,LOCK,PACKAGES,PACKAGES WITHOUT THEIR DEPENDENCIES): a new environment from its lock alone, the tools that build
# this project included. Fails if the lock lacks anything that came in.
define install
	$(PYTHON) -m venv --clear $(@D)
	export PIP_CONSTRAINT=$(1) PIP_BUILD_CONSTRAINT=$(1); $(@D)/bin/python $(PIP) $(if $(filter .%,$(2)),-e) $(2:%='%') \
		$(if $(3),&& $(@D)/bin/python $(PIP) --no-deps $(3))
	! $(@D)/bin/python -m pip freeze --exclude-editable | sed 's/+.*//; s/_/-/g' | grep -vixFf <(sed 's/ *;.*//' $(1)) \
		|| { echo '$(1) lacks what is named above. To add it: make lock UPGRADE='; exit 1; }
	touch $@
endef

# $(call lock,...), as above: pins for every system and Python that the project allows. torch stays at what it is tested with.
# vLLM's wheels for CPUs ask for a build of torch that uv does not find: pip resolves these, for the machine that it runs on.
define lock
	printf '%s\n' $(2:%='%') $(if $(filter .%,$(2)),torch==2.13.0 hatchling editables) | $(UV) pip compile --quiet $(UPGRADE) --universal \
		--python-version 3.10 --no-annotate --no-emit-package modes-fx \
		--custom-compile-command 'make lock    (for Python 3.10 and newer; tested with 3.11)' --output-file $(1) -
	$(if $(3),echo $(3) >> $(1))
endef
UPGRADE ?= --upgrade

$(SYNC): pyproject.toml constraints.txt
	$(call install,constraints.txt,$(TESTS))

$(EXTRAS)/.installed: pyproject.toml constraints-extras.txt
	$(call install,constraints-extras.txt,$(ALL),$(LMMS))

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(call install,constraints-vllm.txt,$(SERVED))
	$(VLLM)/bin/python -m tests.serve.environment

$(DOCS)/.installed: constraints-docs.txt
	$(call install,constraints-docs.txt,$(SITE))

lock: $(UV)  ## renew all pins; with UPGRADE= only add and drop what pyproject.toml asks for
	$(call lock,constraints.txt,$(TESTS))
	$(call lock,constraints-extras.txt,$(ALL),$(LMMS))
	$(PYTHON) -m pip install --quiet --dry-run --ignore-installed --report .venv-lock/vllm.json \
		$(if $(UPGRADE),,--constraint constraints-vllm.txt) '$(SERVED)' torch==2.13.0 hatchling editables
	$(PYTHON) -m tests.serve.environment .venv-lock/vllm.json > constraints-vllm.txt
	$(call lock,constraints-docs.txt,$(SITE))

$(UV):
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) uv

$(THEIRS)/.fetched: $(SYNC)
	rm -rf $(THEIRS)
	mkdir -p $(THEIRS)/transformers_tests
	version=$$($(BIN)/python -c 'import transformers; print(transformers.__version__)') && \
		$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
			--dest $(THEIRS) transformers==$$version && \
		tar -xzf $(THEIRS)/transformers-$$version.tar.gz -C $(THEIRS)/transformers_tests --strip-components=2 \
			transformers-$$version/tests
	$(BIN)/python $(PIP) --no-deps --target $(THEIRS) parameterized==0.9.0
	touch $@

demo: $(SYNC)  ## skip experts in the embedded model: calibrate, search, evaluate, time (4 minutes)
	$(BIN)/modes-fx demo --out out/demo

test: $(SYNC)  ## run the tests (4 minutes on 2 cores, 5 the first time)
	$(BIN)/python $(PYTEST) -m "not slow and not wide"

test-wide: $(SYNC)  ## run the tests that `make test` leaves out and CI does not: more cases, several processes, whole models
	$(BIN)/python $(PYTEST) -m "wide and not slow"

test-all: $(SYNC)  ## run the slow tests too: every family in every form
	$(BIN)/python $(PYTEST)

test-extras: $(EXTRAS)/.installed  ## run the tests that need torchao and lmms-eval, in an environment of their own
	$(EXTRAS)/bin/python -c 'import lmms_eval.evaluator, torchao'  # without them, the tests would only skip
	$(EXTRAS)/bin/python $(PYTEST) tests/quantise tests/lmms

test-vllm: $(VLLM)/.installed  ## serve by a real vLLM on this CPU, in an environment of its own (5 minutes; 3.5 GB to install)
	$(VLLM)/bin/python -m pytest tests/serve/engine -m "not slow" --durations 10 -o filterwarnings=ignore  # vLLM's own are many

test-newest:  ## run the tests with the newest release of every dependency, in an environment of their own
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(PIP) -e '.[dev]'
	$(NEWEST)/bin/python $(PYTEST) -m "not slow"

test-upstream: $(THEIRS)/.fetched  ## run transformers' own model tests on optimised models (5 minutes; FAMILIES='gpt_oss or mixtral' picks)
	$(BIN)/python -m pytest --numprocesses auto tests/upstream/common.py $(if $(FAMILIES),-k '$(FAMILIES)') \
		-o addopts='-p no:cacheprovider' -o filterwarnings=ignore  # they have markers of their own, and warn

fuzz: $(SYNC)  ## damage the files that are read 100,000 times: each is refused, or read as what it was (5 minutes)
	$(BIN)/python -m tests.fuzz

crash: $(SYNC)  ## kill calibrate, search and compare 50 times each and go on: the result of an uncut run (an hour)
	$(BIN)/python -m tests.crash

soak: $(SYNC)  ## thousands of random models, plans and calls against the oracle, then four threads and a plan a second (an hour)
	$(BIN)/python -m tests.soak

lint: $(SYNC)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SYNC)  ## time an MoE block of Qwen3-VL-30B-A3B against stock settings (2 minutes)
	$(BIN)/modes-fx bench --tokens 1 512 --rounds 5 --json out/bench/bench.json

bench-full: $(SYNC)  ## measure all: blocks on 1 and 2 threads, decoder layers, growth, overhead (12 minutes, 12 GB of memory)
	$(BIN)/modes-fx bench --parts block layers growth overhead --tokens 1 64 512 2048 --threads 1 2 \
		--json out/bench/bench-full.json --plot out/bench/bench-full.svg

gpu-check:  ## on a machine with a GPU: its tests, then times against goals (8 minutes at most; runs PYTHON as it is)
	$(PYTHON) -m benchmarks.gpu_check --json out/gpu_check.json

coverage: $(SYNC)  ## write the table of model families in docs/supported-models.md anew
	$(BIN)/python -m tests.families.coverage --write docs/supported-models.md

pages: $(SYNC)  ## write the parts of docs/ that are made of the code anew
	$(BIN)/python -m tests.generated

docs: $(DOCS)/.installed  ## build the documentation's site in out/site; fails where a link or a name leads nowhere
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

package: $(UV)  ## build the source package and, from it, the wheel, in out/dist; install that alone in .venv-bare
	rm -rf out/dist
	$(UV) build --quiet --build-constraints constraints.txt --out-dir out/dist
	diff <(tar -tzf out/dist/*.tar.gz | cut -d/ -f2- | grep -v '^PKG-INFO$$' | sort) <(git ls-files --cached --others --exclude-standard | sort)
	$(PYTHON) -m venv --clear $(BARE)
	PIP_CONSTRAINT=constraints.txt $(BARE)/bin/python $(PIP) --no-compile out/dist/*.whl

clean:  ## remove the environments and all output
	rm -rf .venv .venv-* $(THEIRS) out
