# Needs python3 (3.11 to 3.13) with pip and venv. Everything goes to .venv and
# .cache in this folder. On an accelerator: make quickstart EXTRAS=dev,cuda12

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# Worker processes of the tests.
JOBS ?= 2
WORKDIR ?= runs/quickstart
# What `make schedule` compiles for, and which cases of pallas_kernels/cases.py:
# "long" has one for each kernel, against the longest context.
GENERATIONS ?= v5p v6e
SHAPES ?= long
TOPOLOGY_v5e := v5e:2x2
TOPOLOGY_v5p := v5p:2x2x1
TOPOLOGY_v6e := v6e:2x2
TOPOLOGY_7x := tpu7x:2x2x1
BUDGETS := pallas_kernels/budgets.json

# The newest JAX and Flax of this Python: make test JAX=newest VENV=.venv-newest
JAX ?= pinned

comma := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(JAX)-$(subst $(comma),-,$(EXTRAS))
CONSTRAINTS := $(VENV)/constraints-$(JAX).txt
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: install quickstart test slow test-all parity schedule machine-code \
  machine-code-budget hopper hopper-budget pods compile-pods lint format clean

install: $(STAMP)

# Python compiles what is imported, a tenth of what pip would: half the time.
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade \
	  -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
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

# The long ones: the quickstart's smoke run, the notebooks, every mesh and stage.
slow: $(STAMP)
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" \
	  $(PYTEST) -m "slow and not parity" $(ARGS)

# Everything, the slowest and the comparisons with other implementations too, and
# the kernels compiled for every device.
test-all:
	$(MAKE) install EXTRAS=dev,parity
	$(PYTEST) -m "" $(ARGS)
	$(MAKE) schedule GENERATIONS="v5e v5p v6e 7x" SHAPES=long ARGS=
	$(MAKE) schedule GENERATIONS="v5e v5p v6e 7x" SHAPES=real ARGS=
	$(MAKE) machine-code ARGS=
	$(MAKE) machine-code-budget
	if $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 12))"; then \
	  $(MAKE) machine-code JAX=newest ARGS=; \
	fi

parity:
	$(MAKE) install EXTRAS=dev,parity
	$(PYTEST) -m parity $(ARGS)

# The TPU kernels compiled for chips that are not there, against their budget of
# bundles. Renew the budget with JOBS=1 ARGS=--write_budget.
schedule:
	$(MAKE) -j$(JOBS) VENV=.venv-tpu EXTRAS=tpu $(GENERATIONS:%=schedule-%)

schedule-%: $(STAMP)
	$(BIN)/python -m experiments.kernels --mode=schedule --shapes=$(SHAPES) \
	  --platform=tpu:$(TOPOLOGY_$*) --budget=$(BUDGETS) $(ARGS)

# The GPU kernels compiled for Hopper, no GPU needed, and their machine code.
machine-code:
	$(MAKE) hopper VENV=.venv-hopper-$(JAX) EXTRAS=dev,hopper

# The same at real shapes, against the budget where the versions are those it
# was written with.
machine-code-budget:
	$(MAKE) hopper-budget VENV=.venv-hopper-$(JAX) EXTRAS=dev,hopper

# Without the compiler the tests would be skipped.
hopper: $(STAMP)
	$(BIN)/python -c "import jax_cuda13_plugin"
	$(PYTEST) -m "" tests/pallas_kernels/test_gpu_machine_code.py $(ARGS)

hopper-budget: $(STAMP)
	$(BIN)/python -m experiments.kernels --mode=schedule --shapes=real \
	  --platform=gpu:h200 $(if $(filter pinned,$(JAX)),--budget=$(BUDGETS))

# The 671B model's step compiled for whole pods; the table goes to the README.
pods:
	$(MAKE) compile-pods VENV=.venv-tpu EXTRAS=tpu,agents

compile-pods: $(STAMP)
	$(BIN)/python -m experiments.compile_table --workdir=runs/pods \
	  --write_to=README.md $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache
