# SPDX-License-Identifier: Apache-2.0
# Two commands for users: `make demo` and `make test`. Both create the environment when it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
OLDEST := 5.17.0
SEED   ?= 0
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: env demo test test-matrix test-slow test-faults test-gpu gpu sanitize bench families recipes guide docs lint clean

env: $(VENV)/.ready

# torch goes first and pinned: an open range pulls gigabytes of another build. deepspeed is built from
# source by what is installed then.
$(VENV)/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) -c $(CONSTRAINTS) torch
	$(PIP) -c $(CONSTRAINTS) pybind11 ninja
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[test]"
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

demo: env
	$(BIN)/python -m fastgrpo.demo --out runs/demo --seed $(SEED)

# Each worker takes half of the files and steals from the other at the end: what a file's tests share
# is made once.
PYTEST := -m pytest -q -n 2 --dist worksteal
test: env lint
	$(BIN)/python $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) -m interpreter $$(grep -l mark.interpreter tests/test_*.py)

# Engine and trainer tests in two environments: the oldest transformers, and what a user's own
# `pip install` resolves today, without a constraints file.
MATRIX_TESTS := $(shell grep -lE "mark\.engine" tests/test_*.py) $(wildcard tests/test_trl_*.py)
test-matrix: .venv-$(OLDEST)/.ready .venv-user/.ready
	.venv-$(OLDEST)/bin/python $(PYTEST) $(MATRIX_TESTS)
	$(USER_PIP) --no-deps --force-reinstall .
	.venv-user/bin/python $(PYTEST) $(MATRIX_TESTS)

OLD_PIP := .venv-$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check
.venv-$(OLDEST)/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	$(PYTHON) -m venv .venv-$(OLDEST)
	sed "s/^transformers==.*/transformers==$(OLDEST)/" $(CONSTRAINTS) > .venv-$(OLDEST)/constraints.txt
	$(OLD_PIP) --upgrade pip "setuptools>=77" wheel
	$(OLD_PIP) -c $(CONSTRAINTS) torch
	$(OLD_PIP) -c $(CONSTRAINTS) pybind11 ninja
	$(OLD_PIP) -c .venv-$(OLDEST)/constraints.txt --no-build-isolation -e ".[test]"
	touch $@

# README's two lines, then what runs the tests. It is no editable installation: `test-matrix` installs
# the sources as they are.
USER_PIP := .venv-user/bin/python -m pip install --quiet --disable-pip-version-check
.venv-user/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	$(PYTHON) -m venv --clear .venv-user
	$(USER_PIP) $$(grep "^torch==" $(CONSTRAINTS))
	$(USER_PIP) ".[trl]"
	$(USER_PIP) pytest pytest-timeout pytest-xdist
	touch $@

test-slow: env
	$(BIN)/python $(PYTEST) -m slow

# kill -9 at KILLS random moments, over every kind of run and mode.
KILLS ?= 100
test-faults: env
	FASTGRPO_KILLS=$(KILLS) $(BIN)/python -m pytest -q -s -m slow tests/test_trl_kills.py

test-gpu: env
	$(BIN)/python -m pytest -q -m gpu

# Tests, sanitizer, benchmarks and the table of goals, on a GPU: see docs/gpu.md.
gpu: env
	PYTHON="$(abspath $(BIN))/python" bench/gpu.sh

# memcheck and racecheck of every kernel on tiny inputs; needs a CUDA device.
sanitize: env
	PATH="$(BIN):$$PATH" bench/sanitize.sh

bench: env
	$(BIN)/fastgrpo bench --save

# What each family's tests showed, on the oldest transformers and on today's. RESULTS keeps them: a
# run that was cut goes on. What fails is in the table.
RESULTS ?= build/families
families: env .venv-$(OLDEST)/.ready
	-.venv-$(OLDEST)/bin/python docs/families.py run $(RESULTS)
	-$(BIN)/python docs/families.py run $(RESULTS)
	$(BIN)/python docs/families.py table $(RESULTS) > docs/families.md

recipes: env
	$(BIN)/python -m fastgrpo.recipes > docs/recipes.md

# The pages of the guide that are made from the source.
guide: recipes
	$(BIN)/python -m fastgrpo.cli.reference > docs/settings.md
	$(BIN)/python docs/messages.py > docs/troubleshooting.md

# The guide as a site in site/: nothing is fetched while it is built or read.
docs: env
	$(PIP) -c $(CONSTRAINTS) -e ".[docs]" --no-build-isolation
	$(BIN)/mkdocs build --strict

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-* build *.egg-info runs
