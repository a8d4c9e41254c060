# Every target makes its own environment from a bare Python 3.11 with pip; the second time costs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Every role is a process of its own: without the compiled modules each spends a fifth of a second on compiling them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install serve test coverage lint format bench loadtest docs lock clean
.DEFAULT_GOAL := install

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

serve: $(READY)
	@$(BIN)/auction-timer serve

test: $(READY)
	$(BIN)/python -m pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder

# Measured in every process that a test starts, so it takes half as long again.
coverage: $(READY)
	$(BIN)/python -m pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

# Scenarios against a running system, held to budgets; OPTIONS="--url http://… --watchers 500" for somebody else's.
loadtest: $(READY)
	$(BIN)/python -m loadtests $(OPTIONS)

docs: $(READY)
	$(BIN)/python -m auction_timer.reference

# Needs uv; only for maintainers who change pyproject.toml.
lock:
	uv pip compile --python-version 3.11 --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --no-strip-extras \
		--group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
