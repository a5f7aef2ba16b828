# Two commands do everything on a machine with Python 3.11 and a C++ compiler: `make demo` and
# `make test`. Each creates .venv, installs and compiles as needed, then runs. What is done is noted
# in stamp files inside .venv, so that a second run starts at once and an edit under csrc/ compiles
# again without installing again.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test lint format demo study bench gpu gpu-offline clean distclean FORCE

VENV ?= .venv
BIN := $(VENV)/bin

# The first interpreter that is new enough; 3.11 is tried first because constraints.txt was made with
# it. Each candidate is run, not looked up: a name on PATH may be a launcher for nothing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# Warnings and errors still appear; the list of every package and its progress bar does not.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input \
	-c constraints.txt
SAY := @printf '==> %s\n'

# Given on the command line of make; empty means the program's own default.
SEEDS ?=
DATA ?=
OUT ?=
GARMENTS ?=
ARGS ?=
DEMO_OPTIONS = $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data "$(DATA)") \
	$(if $(OUT),--out "$(OUT)") $(if $(GARMENTS),--garments "$(GARMENTS)")

VENV_STAMP := $(VENV)/.stamp-venv
DEPS_STAMP := $(VENV)/.stamp-packages
EXT_STAMP := $(VENV)/.stamp-extension
SOURCES := $(shell find csrc -type f 2>/dev/null)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(EXT_STAMP) ## create .venv, install everything, build the C++ extension

# A process a core, which computes with one thread: two that wait for each other are slower. A worker
# that is done takes over half of what another has left. Not more than 8: each holds its own PyTorch.
test: install ## run every test that a machine without a GPU can run (ARGS=... goes to pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(DEPS_STAMP) ## check style and types: ruff, clang-format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))
	$(BIN)/pyright

format: $(DEPS_STAMP) ## mend what ruff and clang-format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

demo: install ## train teacher and students, write a report (SEEDS=3 DATA=easy-vqa|FOLDER OUT=dir GARMENTS=dir)
	$(BIN)/python -m training demo $(strip $(DEMO_OPTIONS) $(ARGS))

study: install ## many ways to train one student, in one table: hours, resumable (the demo's options)
	$(BIN)/python -m training study $(strip $(DEMO_OPTIONS) $(ARGS))

bench: install ## measure time, memory and accuracy against plain PyTorch (ARGS=... is passed on)
	$(BIN)/python -m benchmarks all $(ARGS)

# The machine's own Python, because there PyTorch and Triton are those that its driver needs.
gpu: ## on a machine with a GPU: its tests and benchmark, with no virtual environment (ARGS="--stages bench")
	PYTHONPATH=. python3 -m tests.gpu $(ARGS)

gpu-offline: install ## compile every GPU kernel for NVIDIA's and AMD's without a GPU (ARGS="--arch 90,gfx942")
	$(BIN)/python -m tests.gpu.offline $(ARGS)

clean: ## remove the compiled extension, build folders and caches; keep .venv, data and runs/
	rm -rf build/temp.* build/lib.* build/bdist.* dist *.egg-info mllmkd_kernels/_C*.so mllmkd_kernels/_left_out.json
	rm -rf .pytest_cache .ruff_cache .hypothesis $(EXT_STAMP)
	find mllmkd_kernels training benchmarks tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv and downloaded data too, so that the next command starts afresh
	rm -rf $(VENV) build

# --- stamps ----------------------------------------------------------------------------------------

$(VENV_STAMP):
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	$(SAY) "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@touch $@

# torch comes first: the extension is compiled against the installed torch, in the same environment,
# hence --no-build-isolation below and the build tools here (they are build-system.requires).
$(DEPS_STAMP): $(VENV_STAMP) pyproject.toml constraints.txt
	$(SAY) "Installing PyTorch and build tools (the first time takes minutes)"
	@$(PIP) torch ninja setuptools pybind11
	$(SAY) "Installing the package and what training, benchmarks and tests need (minutes, once)"
	@MLLMKD_NO_EXT=1 $(PIP) --no-build-isolation -e ".[train,eval,bench,examples,dev]"
	@touch $@

# Compiled in place and by setup.py itself rather than through pip: ninja then compiles only what
# changed, and a missing compiler is reported on the terminal, where pip would swallow the message.
# torch looks for ninja on PATH only, and without it compiles one file after another.
# FORCE: without a built module (no compiler yet, or a mistake in csrc/) every run tries again.
$(EXT_STAMP): $(DEPS_STAMP) setup.py $(SOURCES) $(if $(wildcard mllmkd_kernels/_C*.so),,FORCE)
	$(SAY) "Building the C++ extension (a minute or two the first time)"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

FORCE:
