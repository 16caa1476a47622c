# Each target works from a fresh clone: it creates .venv, installs what it needs (once per version of
# pyproject.toml), and runs. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
BROWSER_STAMP := $(VENV)/.installed-browser
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo compare test test-browser fuzz docs lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN_STAMP) ## train MixLoRA on a tiny Llama and show what it learned
	$(BIN)/moe-jax demo

compare: $(RUN_STAMP) ## compare MixLoRA with LoRA of the same size, three seeds each
	$(BIN)/python -m moe_jax.demo.compare --output demo_output

# pytest runs last, so that its summary ends the output. The tests of one file stay on one worker,
# because they share fixtures.
test: lint docs ## format check, lint, types, import layers, documentation, tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-browser: $(BROWSER_STAMP) ## the page of `moe-jax serve` in Debian's Chromium
	@command -v chromium > /dev/null || \
	    { echo 'test-browser needs the program chromium: apt-get install chromium' >&2; exit 1; }
	$(BIN)/python -m pytest tests/browser

fuzz: $(TEST_STAMP) ## 100,000 almost valid inputs: configurations, rows, checkpoints (an hour on two cores)
	$(BIN)/python tests/fuzz/run.py

docs: $(DOCS_STAMP) ## build the documentation in docs/_build/html, with warnings as errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html

lint: $(TEST_STAMP) ## format check, lint, types, import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

format: $(TEST_STAMP) ## format the code and apply ruff's safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove caches, builds and the demo's output; .venv stays
	rm -rf demo_output notebooks/output docs/_build build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# `venv` writes pip last: a folder without pip is incomplete, and is created again.
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

$(BROWSER_STAMP): pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	@touch $(RUN_STAMP) $(TEST_STAMP) $@

$(DOCS_STAMP): pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $(RUN_STAMP) $@
