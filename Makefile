# make setup | up | down | test | lint | loadtest; `make help` lists them.

PYTHON ?= python3
# Where torch comes from: empty is what pip is configured for. PyTorch's own index of CPU builds,
# https://download.pytorch.org/whl/cpu, saves gigabytes on a machine without a GPU.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# The two onnxruntimes overwrite each other's files, so the machine decides which one it gets.
ONNX := $(shell nvidia-smi -L >/dev/null 2>&1 && echo onnx-gpu || echo onnx)
STAMP := $(VENV)/.set-up-$(ONNX)
TORCH := $(shell sed -n 's/^torch = \["\(torch[^"]*\)".*/\1/p' pyproject.toml)
# The exact version of everything, so that one commit is tested with the same packages everywhere.
CONSTRAINTS := constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# What starts whole farms or an engine; everything else runs first.
REAL := tests/farm tests/compose

.DEFAULT_GOAL := help
.PHONY: help setup lock up down test test-fast test-real lint format loadtest

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## nginx and .venv with everything in it; nothing to do the second time
	@deploy/install-system-packages $(PYTHON)

$(STAMP): pyproject.toml $(CONSTRAINTS) Makefile deploy/install-system-packages
	deploy/install-system-packages $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.set-up-*
	$(PIP) uninstall --quiet --yes $(if $(filter onnx,$(ONNX)),onnxruntime-gpu,onnxruntime) 2>/dev/null
	$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps -c $(CONSTRAINTS) --index-url $(TORCH_INDEX) "$(TORCH)")
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[speech,torch,$(ONNX),loadtest,dev]'
	touch $@

# With the oldest Python that is supported: newer ones have the same versions, but not the reverse.
# torch keeps its version, which is changed by hand. The onnxruntimes and CUDA's packages are left
# out, since a machine has one kind or the other.
lock: ## refresh constraints.txt with the newest versions that pyproject.toml allows
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "lock: Python 3.11 is needed; name it with PYTHON=...")'
	rm -rf build/lock
	mkdir -p build/lock
	grep '^torch==' constraints.txt > build/lock/torch.txt
	$(MAKE) setup VENV=build/lock/venv CONSTRAINTS=build/lock/torch.txt
	build/lock/venv/bin/python -m pip freeze --all --exclude-editable \
		--exclude pip --exclude onnxruntime --exclude onnxruntime-gpu > build/lock/installed.txt
	sed -E -e 's/\+[a-z0-9.]+$$//' -e '/^(nvidia-(c|n)|cuda-|triton)/d' \
		build/lock/installed.txt > constraints.txt
	rm -r build/lock

up: setup ## set up, then start the farm; ends when it is ready
	$(BIN)/gpufarm up

down: ## stop the farm
	$(BIN)/gpufarm down

test: test-fast test-real ## the quick tests, then those with whole farms

test-fast: setup
	$(PYTEST) -n 2 --dist loadfile $(addprefix --ignore=,$(REAL))

test-real: test-fast
	$(PYTEST) $(REAL)

lint: setup ## what the gate checks before it tests
	$(BIN)/ruff format --check . .ci/audit
	$(BIN)/ruff check . .ci/audit
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run deploy/install-system-packages
	if [ -e deploy/Dockerfile ]; then $(BIN)/hadolint deploy/Dockerfile; fi

format: setup ## put the sources in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

loadtest: setup ## two minutes of load, a table and a report
	$(BIN)/python -m loadtest.stepped
