# `make help` lists what there is. Everything runs in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install repro audit report baselines table test test-all lint bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, got " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[dev,cluster]'
	@touch $@

install: $(INSTALLED) ## Make .venv with the pinned dependencies

repro: install ## Run the pipeline: dvc repro
	dvc repro

audit: install ## Audit your own images: make audit DATA=folder [DEFENSE=name] [BUDGET=rows] [OPTIONS=key=value] [RETRAIN=1]
	@python -m analysis.audit_images $(if $(RETRAIN),--retrain) --defense "$${DEFENSE:-whitened_mixture}" \
	  --budget "$${BUDGET:-auto}" --options "$$OPTIONS" -- "$$DATA"

report: install ## Draw results/ as one page: artifacts/report/index.html
	dvc repro analysis/dvc.yaml:report

baselines: install ## Make each cell of results/ a git tag for `dvc metrics diff`
	python -m analysis.baselines

table: install ## The experiments side by side: `dvc exp show` without columns of noise
	dvc exp show --no-pager --drop '.*(/|settings|filter|gap_|undefended|oracle|average|removed|audit|target_)|results|setting|defense$$|seed|Created|State|Executor'

test: install ## Run the tests, some minutes
	python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: install ## All tests; set BACKDOOR_DATA_ROOT for those on real data
	python -m pytest

lint: install ## Check the code with ruff
	ruff check .

bench: install ## Measure the training engine against a plain PyTorch loop, and the pipeline
	python -m benchmarks.training
	python -m benchmarks.pipeline

clean: ## Remove .venv and scratch checkpoints; artifacts and DVC's cache stay
	rm -rf $(VENV) .scratch
