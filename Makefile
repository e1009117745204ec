# Two commands do everything: `make demo` shows the main job, `make test` runs all checks. Each makes its own .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
INPUTS = pyproject.toml constraints.txt

.PHONY: demo test lint format clean

demo: $(VENV)/.demo  ## index the Python language reference and rerank it, offline
	$(VENV)/bin/kalm-rag demo

test: $(VENV)/.dev lint  ## lint, types and all tests
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest

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

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
