# The two commands of the README, and nothing that they do not need.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test

# Install, train the quickstart grid (five minutes on two cores), draw its report.
demo: $(VENV)/installed
	$(RUN)/ablate run grids/quickstart.yaml --workers 2
	$(RUN)/ablate report results/quickstart

# Lint, types, tests, and a wheel that works away from the sources.
test: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m pytest

# pip and not uv, and torch first, with its pin: a CPU build that the index or a wheel folder offers is then taken.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes, and 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
