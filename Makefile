# Two doors: `make demo` and `make test`. Both set up .venv first; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench-transport clean

demo: $(STAMP)
	$(BIN)/otcclip demo $(DEMO)

# One thread a worker: runs are bit-identical on resume with one thread, and two workers fill two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
	  --cov=otcclip --cov-report=term:skip-covered --cov-fail-under=85 $(TEST)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-transport: $(STAMP)
	$(BIN)/python benchmarks/transport.py

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "otcclip needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a minute or two, most of it torch"
# pip compiles what it installs on one core; on all of them it is 20 seconds shorter. What cannot be compiled is not used.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs corpora
