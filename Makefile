# The commands of this project. Paths are relative, so that a checkout may be anywhere.
PYTHON ?= python3
PORT ?= 8000
LOCAL_DIR ?= .local
MINUTES ?= 10

VENV := .venv
BIN := $(VENV)/bin
# A uv that works: version managers put programs on PATH that fail.
UV = uv="$$(uv --version >/dev/null 2>&1 && command -v uv || echo $(BIN)/uv)"; VIRTUAL_ENV= "$$uv"
UV_PIP = $(UV) pip install --quiet --python $(BIN)/python --require-hashes
UV_SELF = $(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
# A virtual environment works only where it was made, and with the Python that made it; .venv/.venv says where that was.
IS_USABLE := $(shell test "$$(cat $(VENV)/.venv 2>/dev/null)" = "$$(cd $(VENV) 2>/dev/null && pwd -P)" && \
  $(BIN)/python -I -c 'import os, sys, sysconfig; os.stat(sysconfig.get_path("purelib")); \
  sys.exit(sys.prefix == sys.base_prefix)' \
  2>/dev/null && echo yes)

.DEFAULT_GOAL := help
.PHONY: help setup setup-infra deploy run s3-rescue test test-fast pulumi s3-servers lint fuzz mutants bench package \
  docs lock clean FORCE

help: ## list these commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(VENV)/.dev ## install everything for development into .venv

setup-infra: $(VENV)/.infra ## install what `pulumi up` needs into .venv

deploy: $(if $(STAGE),$(VENV)/.infra) ## create or update a stack on AWS: STAGE=dev [STACK=NAME] [YES=1]
	@test -n "$(STAGE)" || \
	  { echo "STAGE is not set, expected dev, prod, local or pr-NAME: make deploy STAGE=dev" >&2; exit 2; }
	@$(BIN)/python -m infra.deploy --stage "$(STAGE)" $(if $(STACK),--stack "$(STACK)") $(if $(filter-out 0,$(YES)),--yes)

# The settings of `make run`, unless others are set.
RUN_SETTINGS = CRUDSTACK_STORAGE="$${CRUDSTACK_STORAGE:-$$(test -n "$$CRUDSTACK_OUTPUTS" || echo s3-sqlite)}" \
  CRUDSTACK_BUCKET="$${CRUDSTACK_BUCKET:-$$(test -n "$$CRUDSTACK_OUTPUTS" || echo crudstack)}" \
  CRUDSTACK_DATA_DIR="$${CRUDSTACK_DATA_DIR:-$(LOCAL_DIR)/data}"

run: $(VENV)/.local ## serve the API on PORT=8000, with an S3 server whose data is below LOCAL_DIR=.local
	@$(RUN_SETTINGS) exec $(BIN)/crudstack serve --host 127.0.0.1 --port $(PORT) --local-s3 --make-bucket

s3-rescue: $(VENV)/.local ## write lost changes of `make run` to FILE=lost.jsonl (RESUME=1: serve again)
	@test -n "$(FILE)" || { echo "FILE is not set, expected a new file: make s3-rescue FILE=lost.jsonl" >&2; exit 2; }
	@$(RUN_SETTINGS) $(BIN)/crudstack s3-rescue "$(FILE)" $(if $(filter-out 0,$(RESUME)),--resume)

# Three processes: on two cores, one of them mostly waits.
test: $(VENV)/.dev .local/checkov/.done ## the whole suite
	@$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

test-fast: $(VENV)/.dev ## the tests of single functions and of the layout, in seconds
	@$(BIN)/python -m pytest -m "not slow" tests/unit $(ARGS)

pulumi: $(VENV)/.venv ## build the pulumi commands of the tests into the user's cache (needs Go)
	@$(BIN)/python -m tests.engine.install

s3-servers: $(VENV)/.venv ## install the S3 servers of the tests into the user's cache (needs Go and npm)
	@$(BIN)/python -m tests.s3_servers.install

lint: $(VENV)/.dev ## format, rules, types, direction of dependencies
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fuzz: $(VENV)/.dev ## send unexpected requests to the API for MINUTES=10
	@FUZZ_EXAMPLES=$$(( 100 * $(MINUTES) )) FUZZ_SECONDS=$$(( 30 * $(MINUTES) )) FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} \
	  $(BIN)/python -m pytest -n 2 -s tests/fuzz tests/http/test_schemathesis.py $(ARGS)

mutants: $(VENV)/.dev ## check that the suite finds planted defects (takes long)
	@$(BIN)/python -m tests.mutants

bench: $(VENV)/.dev .local/bench/specstar/.done .local/bench/pocketbase/.done ## write benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks $(ARGS)

# The virtual environment, and uv if PATH has none. Stamps, not directories, mark what is complete; they go with the
# environment.
$(VENV)/.venv: $(if $(IS_USABLE),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "crudstack needs Python 3.11 or later as '$(PYTHON)': install it, or run make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@case "$$(pwd -P)" in *:*) echo "this checkout lies in $$(pwd -P), and Python makes no virtual environment below" \
	  "a path with a colon: move it to a path without one" >&2; exit 1;; esac
	@if test -L $(VENV); then rm $(VENV); fi
	@said="$$($(PYTHON) -m venv --clear $(VENV) 2>&1)" || { case "$$said" in \
	  *"ensurepip is not"*) reason="it has no ensurepip, which is in the package python3-venv of Debian and Ubuntu" ;; \
	  *ensurepip*) \
	    reason="$$($(BIN)/python -m ensurepip 2>&1 | grep -v '^$$\|^ \|^Traceback\|^subprocess' | tail -n 1)" ;; \
	  *) reason="$$(printf '%s\n' "$$said" | tail -n 1)" ;; \
	  esac; rm -rf $(VENV); echo "'$(PYTHON)' cannot make a virtual environment: $$reason" >&2; exit 1; }
	@uv --version >/dev/null 2>&1 || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt || \
	  { echo "pip cannot install uv, for the reason above. If it cannot be mended, install uv, and try again" >&2; \
	  exit 1; }
	@(cd $(VENV) && pwd -P) > $@.new && mv $@.new $@

$(VENV)/.local: requirements/local.txt pyproject.toml $(VENV)/.venv
	@$(UV_PIP) -r requirements/local.txt
	@$(UV_SELF)
	@touch $@

$(VENV)/.infra: requirements/infra.txt $(VENV)/.local
	@$(UV_PIP) -r requirements/infra.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt requirements/examples.txt $(VENV)/.local $(VENV)/.infra
	@$(UV_PIP) -r requirements/dev.txt
	@$(UV_PIP) --no-deps -r requirements/examples.txt
	@touch $@

.local/checkov/.done: requirements/checkov.txt $(VENV)/.venv
	@$(UV) venv --quiet --clear --python $(BIN)/python $(@D)
	@$(UV) pip install --quiet --python $(@D)/bin/python --require-hashes -r $<
	@touch $@

.local/bench/%/.done: requirements/%.txt $(VENV)/.venv
	@$(UV) venv --quiet --clear --python $(BIN)/python $(@D)
	@$(UV) pip install --quiet --python $(@D)/bin/python --require-hashes -r $<
	@touch $@

LOCK = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --no-annotate

# What single storages add to requirements/app.txt, a file each.
DRIVERS = amqp postgres redis

package: $(VENV)/.local ## the zip for AWS Lambda into dist/lambda.zip (ARGS=--host: one that runs here)
	@$(BIN)/python -m infra.artifact $(ARGS)

docs: $(VENV)/.infra ## write docs/config.md and docs/costs.md, which are made from what infra/ says
	@page="$$($(BIN)/python -m infra.reference)" && printf '%s\n' "$$page" > docs/config.md
	@page="$$($(BIN)/python -m infra.costs)" && printf '%s\n' "$$page" > docs/costs.md

lock: $(VENV)/.venv ## lock the newest versions that the ranges in pyproject.toml allow
	@$(LOCK) pyproject.toml --extra local --group dev -o requirements/dev.txt --upgrade
	@$(LOCK) pyproject.toml --extra local -c requirements/dev.txt -o requirements/local.txt --upgrade
	@$(LOCK) pyproject.toml --extra s3 --extra lambda -c requirements/dev.txt -o requirements/app.txt --upgrade
	@for extra in $(DRIVERS); do $(LOCK) pyproject.toml --extra $$extra -c requirements/dev.txt \
	  -o requirements/app-$$extra.txt --upgrade \
	  $$(sed -nE 's/^([a-z0-9-]+)==.*/--no-emit-package \1/p' requirements/app.txt) || exit 1; done
	@$(LOCK) --group infra -c requirements/dev.txt -o requirements/infra.txt --upgrade
	@$(LOCK) --group examples --no-deps -o requirements/examples.txt --upgrade
	@$(LOCK) --group specstar -o requirements/specstar.txt --upgrade
	@$(LOCK) --group pocketbase -o requirements/pocketbase.txt --upgrade
	@$(LOCK) --group checkov -o requirements/checkov.txt --upgrade
	@$(LOCK) --group localstack -o requirements/localstack.txt --upgrade --exclude-newer 2026-02-20
	@$(LOCK) --group rclone -o requirements/rclone.txt --upgrade
	@echo uv | { $(LOCK) - -o requirements/uv.txt --upgrade; }

clean: ## remove .venv and caches; data in LOCAL_DIR stays
	@rm -rf $(VENV) .local/bench .local/checkov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.local/*' -prune -exec rm -rf {} +
