# Needs python3 (3.11 to 3.13) with pip and venv. Everything goes to .venv and
# .cache in this folder. On an accelerator: make quickstart EXTRAS=dev,cuda12

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# Worker processes of the tests.
JOBS ?= 2
WORKDIR ?= runs/quickstart
# What `make schedule` compiles for.
TOPOLOGIES ?= v5p:2x2x1 v6e:2x2

# The newest JAX and Flax of this Python: make test JAX=newest VENV=.venv-newest
JAX ?= pinned

comma := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(JAX)-$(subst $(comma),-,$(EXTRAS))
CONSTRAINTS := $(VENV)/constraints-$(JAX).txt
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: install quickstart test slow test-all parity schedule lint format clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --upgrade -c $(CONSTRAINTS) \
	  -e ".[$(EXTRAS)]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints-pinned.txt: constraints.txt | $(BIN)/python
	cp constraints.txt $@

$(VENV)/constraints-newest.txt: constraints.txt | $(BIN)/python
	grep -v -E '^(flax|jax|jaxlib)==' constraints.txt > $@

quickstart: $(STAMP)
	$(BIN)/python -m experiments.quickstart --workdir=$(WORKDIR) $(ARGS)

# Tests compile far more than they compute: compile quickly. `test-all` and
# `parity` compile as programs do.
test: $(STAMP)
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" $(PYTEST) $(ARGS)

# The long ones: the quickstart's smoke run, the notebook, every mesh and stage.
slow: $(STAMP)
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" \
	  $(PYTEST) -m "slow and not parity" $(ARGS)

# Everything, the slowest and the comparisons with other implementations too.
test-all:
	$(MAKE) install EXTRAS=dev,parity
	$(PYTEST) -m "" $(ARGS)

parity:
	$(MAKE) install EXTRAS=dev,parity
	$(PYTEST) -m parity $(ARGS)

# The TPU kernels compiled for chips that are not there, against their budget of
# bundles. Renew the budget with ARGS=--write_budget.
schedule:
	$(MAKE) install VENV=.venv-tpu EXTRAS=dev,tpu
	for topology in $(TOPOLOGIES); do \
	  .venv-tpu/bin/python -m experiments.kernels --mode=schedule \
	    --platform=tpu:$$topology --budget=pallas_kernels/budgets.json \
	    $(ARGS) || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache
