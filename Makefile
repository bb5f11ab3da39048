# make demo   pictures in out/index.html        make test   the tests
# make lint   style and types                   make setup  the environment alone (every other target needs it)
# make clean  removes the environment and all caches

# Interpreter for a new environment; found by itself when empty.
PYTHON ?=
# Test processes: one per core, as each runs torch on one thread.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

BIN := .venv/bin

.PHONY: setup demo test lint clean

setup:
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

demo: setup
	@$(BIN)/nextscale demo

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS)

lint: setup
	@status=0; \
	$(BIN)/ruff check || status=1; \
	$(BIN)/ruff format --check || status=1; \
	$(BIN)/mypy || status=1; \
	exit $$status

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
