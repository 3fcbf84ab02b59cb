# Every target creates .venv when it is missing; `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help serve test lint protos bench gpu-check clean
.DEFAULT_GOAL := help

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-9s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Shoal needs Python 3.11 or newer: install it or run make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -e '.[test]'
	touch $(STAMP)

serve: $(STAMP)  ## Start Shoal on this machine: HTTP on port 8000, gRPC on port 9000
	$(BIN)/shoal serve $(ARGS)

lint: $(STAMP)  ## Style, types and import order
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Everything CI runs: lint and all tests (ARGS: those of one pytest run)
	$(BIN)/python tools/run_tests.py $(ARGS)

protos: $(STAMP)  ## Regenerate cluster/protos from the .proto files
	$(BIN)/python tools/generate_protos.py

bench: $(STAMP)  ## Serving benchmark, both sizes, medians
	$(BIN)/python benchmarks/bench_serving.py $(ARGS)

gpu-check: $(STAMP)  ## Kernels and engine on this machine's GPU: checks and times
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
