# The front door. `make help` says what there is.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
.PHONY: help setup check format unit fv test soak lab down bench

help: ## Say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: ## Install what development needs (root; Debian packages and .venv)
	@bash -c 'set -euo pipefail; root=$$PWD; . labs/bootstrap.sh; bootstrap dev'

check: ## Format, lint, types and import rules
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: ## Format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

unit: ## The tests that need nothing, in seconds
	$(PYTHON) -m pytest -m "not root and not etcd and not peers"

fv: ## The tests in a whole lab (root)
	./tests/run tests/fv

test: ## Everything (root): what CI runs
	./tests/run

soak: ## Policy on real packets and on rendered rules, for long, from a new seed (root)
	CYMRIC_SOAK=1 HYPOTHESIS_PROFILE=thorough $(PYTHON) -m pytest -s tests/fv/test_felix_verdicts.py tests/unit/test_felix_journey.py

lab: ## Build the lab and show it (root)
	./labs/quickstart

down: ## Take the lab away (root)
	./labs/lab down

bench: ## Measure, each line with a peer beside us (root)
	./bench/run
