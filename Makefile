# Two commands do everything: `make demo` shows the main job, `make test` runs all checks. Each makes its own .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
INPUTS = pyproject.toml constraints.txt
# The lowest versions that pyproject.toml allows. torch comes from constraints.txt: see constraints-lowest.txt.
LOWEST = $(VENV)-lowest
LOWEST_PIP = $(LOWEST)/bin/python -m pip install --disable-pip-version-check -q
LOWEST_INPUTS = pyproject.toml constraints.txt constraints-lowest.txt
# Of make faults: which parts (all), how many trials, and a folder of real questions in the BEIR format.
PARTS ?=
SCALE ?= 1
DATA ?=

.PHONY: demo test test-lowest faults lint format clean

demo: $(VENV)/.demo  ## index the Python language reference and rerank it, offline
	$(VENV)/bin/kalm-rag demo

test: $(VENV)/.dev lint  ## lint, types and all tests, three files at a time: some wait for processes that they start
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-lowest: $(LOWEST)/.dev  ## all tests with the lowest versions of everything that is declared
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.dev  ## kills, damage and hostile input, as a table (10 minutes); PARTS="kills flips" SCALE=0.2 DATA=FOLDER
	PYTHONPATH=tests:tests/index OMP_NUM_THREADS=1 $(VENV)/bin/python -m faults $(PARTS) --scale $(SCALE) $(DATA:%=--data %)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python $(INPUTS)
	@echo "Installing kalm-rag with its bundled model (a few minutes the first time) ..."
	$(PIP) torch
	$(PIP) -e '.[pico,files]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(INPUTS)
	@echo "Installing kalm-rag with everything its tests need (a few minutes the first time) ..."
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

$(LOWEST)/.dev: $(LOWEST_INPUTS)
	@echo "Installing kalm-rag with the lowest versions it allows (a few minutes the first time) ..."
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST_PIP) -c constraints.txt torch
	$(LOWEST_PIP) -c constraints-lowest.txt -e '.[all,test]'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache
