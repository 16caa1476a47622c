# `make demo` and `make test` work from a fresh clone: each makes .venv, installs what it needs
# (once per version of pyproject.toml), and runs. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN_STAMP) ## train MixLoRA on a tiny Llama, show what it learned, compare it with LoRA
	$(BIN)/python -m moe_jax.demo --output demo_output

# pytest comes last, so that its summary closes the output. A file's tests stay on one worker: what
# they share is made once.
test: lint ## format check, lint, types, import layers, tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(TEST_STAMP) ## everything of `make test` but the tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

format: $(TEST_STAMP) ## rewrite the code in the house format, with the fixes that ruff is sure of
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove caches and what the demo wrote; .venv stays
	rm -rf demo_output notebooks/output build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip is the last thing that `venv` writes: a folder without it is half made, and is made again.
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
	    else f"Python 3.11 to 3.13 is needed, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
endef

$(RUN_STAMP): pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST_STAMP): pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(RUN_STAMP) $@
