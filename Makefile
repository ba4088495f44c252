# All that has to be there is make and Python 3.11 or newer; the rest goes into $(VENV).
#
#   make test VENV=/tmp/other      another virtual environment
#   make test ARGS="-k batch_norm" further arguments of the command behind a target

VENV ?= .venv
BIN := $(VENV)/bin
ZOO ?= .venv-zoo
TORCH := torch==2.13.0
JOBS ?= 2
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# One thread per process: the tests run in $(JOBS) processes, and results do not depend on the number of cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format bench bench-ranks frameworks soak zoo docs rules opacus-suite clean
.SECONDARY:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo  ## train on brain volumes, and per patient, with and without differential privacy (a few minutes)
	$(BIN)/python examples/vnet.py --out demo_output $(ARGS)
	$(BIN)/python examples/volumes.py $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

slow: $(VENV)/.installed-dev  ## run the long tests too
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow" $(ARGS)

lint: $(VENV)/.installed-dev  ## check format, style, docstrings and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## format the code and sort the imports
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev  ## measure: side by side with Opacus, cost of the audit, speed of the engines
	$(ONE_THREAD) $(BIN)/python -m benchmarks.opacus_comparison --write $(ARGS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.real_scripts --write
	$(ONE_THREAD) $(BIN)/python -m benchmarks.coupled --write docs/coupled.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.legacy_weights --write docs/weights.md
	-$(ONE_THREAD) $(BIN)/python -m benchmarks.audit_cost --write docs/checks.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.noise_cost --write docs/noise.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.simsiam_digits --write docs/detach.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.augmentation_digits --write docs/augmentation.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.people_digits --write docs/people.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.norms_digits --write docs/norms.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.engine_speed --write

bench-ranks: $(VENV)/.installed-dev  ## measure: a step on 1, 2 and 4 processes, beside torch's DDP and FSDP; the model of costs
	$(ONE_THREAD) $(BIN)/python -m benchmarks.ranks_cost --write docs/ranks.md $(ARGS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.fsdp_memory --write docs/sharded.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks.scaling_model --write docs/scaling.md

frameworks: $(VENV)/.installed-dev  ## measure small scripts on Lightning, MONAI, ignite and others (a few minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.frameworks --write docs/frameworks.md $(ARGS)

soak: $(VENV)/.installed-dev  ## measure long use: memory, interrupts, hostile files, noise, a canary (an hour or more)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.soak --write docs/reliability.md $(ARGS)

zoo: $(VENV)/.installed-dev $(ZOO)/.installed-zoo  ## train the networks of MONAI and of public families (an hour or more)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.zoo --write $(ARGS)
	$(ONE_THREAD) $(ZOO)/bin/python -m benchmarks.zoo.families --write $(ARGS)

opacus-suite: $(VENV)/.installed-dev  ## run the tests that Opacus ships, with SafePrivacyEngine in its place
	$(ONE_THREAD) $(BIN)/python -m tests.end_to_end.opacus_suite --backend dpfix $(ARGS)

rules: $(VENV)/.installed-dev  ## write the pages of the rules from their files
	$(BIN)/python -m docs.generate_rules

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	$(BIN)/python -m docs.generate_rules
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site $(ARGS)

clean:  ## remove what was built, but not the virtual environment
	rm -rf site demo_output .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: none found on PATH (or pass PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo '*' > $(VENV)/.gitignore

# An environment of its own. torch comes first, and then what asks for a torch of its own, without its dependencies: these
# are dpfix's, transformers' (which asks for none) and the few that are named.
$(ZOO)/.installed-zoo: requirements-zoo.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: none found on PATH (or pass PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(ZOO)
	@echo '*' > $(ZOO)/.gitignore
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-zoo.txt
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 pillow psutil -e .
	@touch $@

# torch comes first and alone: with this version plain pip takes the build that fits the machine.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
