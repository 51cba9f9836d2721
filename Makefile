PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: serve test lint clean compiler redis

serve: $(VENV)/.serve-stamp compiler
	$(BIN)/prefixserve serve --host $(HOST) --port $(PORT) --publish-examples examples/prefixes

test: $(VENV)/.test-stamp compiler redis lint
	$(BIN)/prefixserve model fetch
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not program"
	$(BIN)/python -m pytest -m program

lint: $(VENV)/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint docker/Dockerfile

# For the CPU kernels; the server does without, more slowly.
compiler:
	@command -v cc > /dev/null || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; } \
		|| echo 'No C compiler: install gcc and libc6-dev, or the server computes more slowly.'

# The tests start one of their own; Debian's service is not used.
redis:
	@command -v redis-server > /dev/null || { apt-get update && apt-get install -y --no-install-recommends redis-server; }

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.test-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
