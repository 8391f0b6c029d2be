# SPDX-License-Identifier: Apache-2.0
# Every command makes or completes .venv first, which takes no time when it is up to date.

# Any Python 3 will do: one outside of 3.10 to 3.14 looks for another on PATH.
PYTHON ?= python3
# Processes for the tests, each with one core.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

VENV := .venv/bin/python
ifeq ($(JOBS),1)
PYTEST := $(VENV) -m pytest
PARALLEL := $(PYTEST)
else
PYTEST := OMP_NUM_THREADS=1 $(VENV) -m pytest
PARALLEL := $(PYTEST) -n $(JOBS) --dist worksteal
endif

.DEFAULT_GOAL := help
.PHONY: help install install-compiled repair quickstart quickstart-light quickstart-seg \
	quickstart-rotated quickstart-cls test test-all test-install smoke soak check format doctor lock clean

help: ## Show this list
	@echo "mmeformer: the first of these commands to run also installs what is missing into .venv."
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
		| awk 'BEGIN {FS = ":.*## "} {printf "  make %-20s %s\n", $$1, $$2}'

install: ## Make .venv or bring it up to date; nothing is compiled
	@$(PYTHON) tools/bootstrap.py

install-compiled: install ## Compile mmcv's own operators: 10 to 60 minutes, a C++ compiler, nvcc for GPUs
	@$(VENV) -m pip install -q -c constraints.txt setuptools wheel ninja psutil
	@$(VENV) -m pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall \
		-c constraints.txt onedl-mmcv

repair: ## Remove .venv and install again
	@rm -rf .venv
	@$(PYTHON) tools/bootstrap.py

quickstart: install ## Train and evaluate a small Mask R-CNN on generated images, with pictures
	@$(VENV) tools/quickstart.py detection

quickstart-light: install ## The same for a light detector of boxes
	@$(VENV) tools/quickstart.py detection --light

quickstart-seg: install ## The same for Semantic FPN
	@$(VENV) tools/quickstart.py segmentation

quickstart-rotated: install ## The same for rotated boxes
	@$(VENV) tools/quickstart.py rotated

quickstart-cls: install ## The same for a classifier, on crops of ten photographs
	@$(VENV) tools/quickstart.py classification

# The selection of `make test`, by pytest's markers.
TESTS ?= not slow and not install

test: install ## Run the tests, without the slow ones
	@$(PARALLEL) -m "$(TESTS)"

test-all: install ## Run all tests, on newly drawn inputs where inputs are drawn
	@$(PARALLEL) --hypothesis-profile=explore

test-install: install ## Install the built wheel into fresh environments (Python 3.10, 3.13, 3.14) and use it
	@$(PARALLEL) -m "install and not slow"

smoke: install ## Import everything and run each task once, in a minute
	@$(VENV) tests/smoke.py

soak: install ## Kill trainings at 100 random moments and measure memory, in 20 minutes
	@OMP_NUM_THREADS=1 $(VENV) tests/soak.py

check: install ## Check code style and types (ruff, mypy)
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy

format: install ## Fix code style (ruff)
	@$(VENV) -m ruff check --fix .
	@$(VENV) -m ruff format .

doctor: ## Print versions and name every problem of the environment with its fix
	@test -x $(VENV) || $(PYTHON) tools/bootstrap.py
	@$(VENV) -m mmeformer.doctor

# torch itself brings the CUDA libraries that fit it; a CPU build has none.
lock: install ## Write constraints.txt anew, with the newest versions within the ranges of setup.py
	@$(VENV) -m pip install -q uv
	@mkdir -p build
	@$(VENV) -m uv pip compile -q --universal --python-version 3.10 --extra all --extra dev --upgrade \
		--no-annotate --no-header setup.py -o build/resolved.txt
	@grep '^#' constraints.txt > build/constraints.txt
	@sed -E -e '/^(cuda|nvidia|triton)/d' \
		-e "s/ (and|;) \((sys_platform == '[a-z]+'|[ ]or[ ])+\)//" \
		-e "s/python_full_version < '3.15' and //; s/ (and|;) python_full_version < '3.15'//" \
		-e 's/ ; /; /' -e '/^hf-xet/s/;.*//' build/resolved.txt >> build/constraints.txt
	@mv build/constraints.txt constraints.txt

clean: ## Remove build products and caches; data, work_dirs and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	@find mmeformer configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
