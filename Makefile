# Two commands on a fresh machine: `make demo` and `make test`. Each sets up a virtual environment of its own in .venv.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= auto
# With the tests that are marked slow: make test SELECT=
SELECT  ?= -m 'not slow'
MINUTES ?= 30
BIN     := $(VENV)/bin
# A stamp per set of extras, renewed when what it was installed from changes.
INSTALL  = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e

.PHONY: help demo test test-matrix soak mutants check bench gpu clean

help:
	@echo "make demo    run the bundled checkpoint: text, a picture, backends, tokens per second, expert load"
	@echo "make test    the test suite, on the CPU (ARGS='-k cache' for a part of it)"
	@echo "make test-matrix  the suite as on other machines: LEGS='pinned avx2 newest py310 py313'"
	@echo "make soak    random examples of the properties in tests/properties, for MINUTES=30"
	@echo "make mutants do the tests notice 100 changes of one line each? (ARGS='--count 20 --area cache')"
	@echo "make check   ruff and pyright"
	@echo "make bench   the benchmarks that exist; make bench NAME=imports runs one (ARGS='--json out.json')"
	@echo "make gpu     kernels and speeds on a GPU in nine minutes; without one a small form (ARGS='--only moe', docs/guide/gpu.md)"
	@echo "make clean   remove .venv and what tools left behind"

demo: $(VENV)/demo.stamp
	@$(BIN)/python -m qwen35moe demo $(ARGS)

test: $(VENV)/test.stamp
	@$(BIN)/python -m pytest -q -rs -n $(WORKERS) $(SELECT) $(ARGS)

test-matrix:
	@VENV='$(VENV)' PYTHON='$(PYTHON)' WORKERS='$(WORKERS)' ARGS='$(ARGS)' LOGS='$(LOGS)' .ci/matrix $(LEGS)

soak: $(VENV)/test.stamp
	@$(BIN)/python -m tests.support.soak --minutes $(MINUTES) --workers $(WORKERS) $(ARGS)

mutants: $(VENV)/test.stamp
	@$(BIN)/python -m tests.support.mutants $(ARGS)

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/demo.stamp
	@$(BIN)/python -m benchmarks $(NAME) $(ARGS)

gpu: $(VENV)/test.stamp
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-py310 $(VENV)-py313 build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[text,vision]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@
