# Two commands for users: `make demo` and `make test`. Both create the environment when it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt

.PHONY: demo test test-matrix test-slow test-gpu bench lint clean env

env: $(VENV)/.ready

# torch goes first and pinned: an open range pulls gigabytes of another build.
$(VENV)/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) -c $(CONSTRAINTS) torch
	$(PIP) -c $(CONSTRAINTS) pybind11 ninja
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[test]"
	touch $@

test: env lint
	$(BIN)/python -m pytest -n 2 -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q -m interpreter

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-* build *.egg-info runs
