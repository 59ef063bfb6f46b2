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

# The path is quoted for the parser of -S, to which commas, brackets and apostrophes mean something.
audit: install ## Audit your own images: make audit DATA=folder [DEFENSE=name] [BUDGET=rows] [RETRAIN=1]
	@test -e "$$DATA" || { echo "make audit: DATA=$$DATA is not there; give a folder, or an .npz file: make audit DATA=folder"; exit 1; }
	@bad=$$(find -L "$$DATA" \( -type l -o -type p -o -type s -o ! -perm -400 \) | head -n 1); test -z "$$bad" \
	  || { echo "make audit: DVC stops at $$bad, a link to nothing, a pipe, or not readable; move it out of the folder"; exit 1; }
	$(if $(RETRAIN),,rm -f artifacts/audit/seed*/$(or $(DEFENSE),whitened_mixture)/accuracy.json)
	case "$$DATA" in *.npz) source=npz;; *) source=folder;; esac; \
	  dvc exp run -S settings.own.data.path="'$$(realpath -- "$$DATA" | sed "s/'/\\\\'/g")'" -S settings.own.data.source=$$source \
	  -S audit.budget=$(or $(BUDGET),auto) -S defense=$(or $(DEFENSE),whitened_mixture) analysis/dvc.yaml:$(if $(RETRAIN),audit_retrain,audit)

report: install ## Draw results/ as one page: artifacts/report/index.html
	dvc repro analysis/dvc.yaml:report

baselines: install ## Make each cell of results/ a git tag for `dvc metrics diff`
	python -m analysis.baselines

table: install ## The experiments side by side: `dvc exp show` without columns of noise
	dvc exp show --no-pager --drop '.*(/|settings|filter|gap_|undefended|oracle|average|removed)|results|cell|Created'

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
