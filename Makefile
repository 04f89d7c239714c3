PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint clean

# The main job: experts over satellite passes beside conventional federated learning.
demo: $(READY)
	$(BIN)/flwr-moe demo

test: $(READY)
	FLWR_TELEMETRY_ENABLED=0 $(BIN)/python -m pytest -n auto --dist loadgroup

# What takes minutes: faults at random moments, many drawn orbits.
test-slow: $(READY)
	FLWR_TELEMETRY_ENABLED=0 $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch goes first and alone: whatever needs it later then finds this version in place.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flwr-moe needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
