# SPDX-License-Identifier: Apache-2.0
# Every command makes or completes .venv first, which takes no time when it is up to date.

# Any Python 3 will do: a newer or older one than 3.10 to 3.12 looks for those on PATH.
PYTHON ?= python3
# Processes for the tests. 1 runs them in order, torch using all cores; JOBS=4 gives each one core.
JOBS ?= 1

VENV := .venv/bin/python
ifeq ($(JOBS),1)
PYTEST := $(VENV) -m pytest
else
PYTEST := OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(JOBS)
endif

.DEFAULT_GOAL := help
.PHONY: help install repair quickstart quickstart-seg quickstart-rotated test test-all check format doctor clean

help: ## Show this list
	@echo "mmeformer: the first of these commands to run also installs what is missing into .venv."
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
		| awk 'BEGIN {FS = ":.*## "} {printf "  make %-20s %s\n", $$1, $$2}'

install: ## Make .venv or bring it up to date (10 minutes the first time, mostly compiling)
	@$(PYTHON) tools/bootstrap.py

repair: ## Install again whatever was changed or damaged inside .venv
	@rm -f .venv/mmeformer-stamp.json
	@$(PYTHON) tools/bootstrap.py

quickstart: install ## Train and evaluate a small Mask R-CNN on generated images, with pictures
	@$(VENV) tools/quickstart.py detection

quickstart-seg: install ## The same for Semantic FPN
	@$(VENV) tools/quickstart.py segmentation

quickstart-rotated: install ## The same for rotated boxes
	@$(VENV) tools/quickstart.py rotated

test: install ## Run the tests, without the slow ones
	@$(PYTEST) -m "not slow"

test-all: install ## Run all tests, on newly drawn inputs where inputs are drawn
	@$(PYTEST) --hypothesis-profile=explore

check: install ## Check code style (ruff)
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .

format: install ## Mend code style (ruff)
	@$(VENV) -m ruff check --fix .
	@$(VENV) -m ruff format .

doctor: ## Print versions and name every problem of the environment with its mend
	@test -x $(VENV) || $(PYTHON) tools/bootstrap.py
	@$(VENV) -m mmeformer.doctor

clean: ## Remove build products and caches; data, work_dirs and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	@find mmeformer configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
