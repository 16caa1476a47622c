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

# Where uv is installed, it makes the environment of `make demo`, with the versions of
# constraints.txt. The tools of the other targets are installed by pip, whose configuration may name
# a CPU build of PyTorch that uv does not find: it would fetch the one with CUDA, several GB.
# `make test USE_UV=1` uses uv all the same.
UV := $(shell command -v uv 2> /dev/null)
USE_UV ?=

.DEFAULT_GOAL := help
.PHONY: help demo compare test pytest test-browser prereleases \
    fuzz docs lint format wheel constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN_STAMP) ## train MixLoRA on a tiny Llama and show what it learned
	$(BIN)/moe-jax demo

compare: $(RUN_STAMP) ## compare MixLoRA with LoRA of the same size, three seeds each
	$(BIN)/python -m moe_jax.demo.compare --output demo_output

# pytest runs last, so that its summary ends the output.
test: lint docs ## format check, lint, types, import layers, documentation, tests
	@$(MAKE) --no-print-directory pytest

# The tests of one file stay on one worker, because they share fixtures.
pytest: $(TEST_STAMP) ## the tests alone
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

prereleases: $(TEST_STAMP) ## the tests with the heads of jax and flax, which stay in .venv
	$(BIN)/python -m pip install --quiet --upgrade --pre jaxlib \
	    'jax @ git+https://github.com/jax-ml/jax' 'flax @ git+https://github.com/google/flax'
	@$(MAKE) --no-print-directory pytest

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

# Wheel and sdist are those of a release; the former is tested outside the checkout.
wheel: $(RUN_STAMP) ## build wheel and sdist in dist/, and use the wheel in an empty environment
	rm -rf dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist > /dev/null
	scripts/check_wheel.sh dist/*.whl $(PYTHON)

constraints: ## write constraints.txt anew, with the newest versions for Python 3.11 to 3.13
	@test -n '$(UV)' || { echo 'make constraints needs uv: pip install uv' >&2; exit 1; }
	$(UV) pip compile --quiet --no-config --universal --python-version 3.11 --all-extras --upgrade \
	    --no-annotate --no-header --output-file constraints.txt pyproject.toml

clean: ## remove caches, builds and the demo's output; .venv stays
	rm -rf demo_output notebooks/output docs/_build build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# `venv` writes pip last: a folder without pip is incomplete, and is created again.
define make_venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
	    else f"Python 3.11 to 3.13 is needed, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
endef

# $(call install,EXTRA,UV): the project with an extra, by uv if UV is not empty, else by pip.
define install
	$(make_venv)
	$(if $(2),$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt,\
	    $(BIN)/python -m pip install --quiet) --editable '.$(1:%=[%])'
endef

$(RUN_STAMP): pyproject.toml
	$(call install,,$(UV))
	@touch $@

$(TEST_STAMP): pyproject.toml
	$(call install,test,$(USE_UV))
	@touch $(RUN_STAMP) $@

$(BROWSER_STAMP): pyproject.toml
	$(call install,browser,$(USE_UV))
	@touch $(RUN_STAMP) $(TEST_STAMP) $@

$(DOCS_STAMP): pyproject.toml
	$(call install,docs,$(USE_UV))
	@touch $(RUN_STAMP) $@
