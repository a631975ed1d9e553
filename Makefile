# `make help` lists the targets. Choose an interpreter with PYTHON=python3.12.
# uv is used where it works; `make UV= tour` takes venv and pip instead.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
UV     ?= $(shell uv --version >/dev/null 2>&1 && echo uv)

PY     := $(VENV)/bin/python
# One process a core; tests that share a notebook's run or a file stay together, and
# run in the order of tests/conftest.py: the longest first.
PARALLEL ?= -n auto --dist loadgroup --no-loadscope-reorder
REAL   := $(or $(GEOPEFT_REAL_DATA),../shared/data)

.DEFAULT_GOAL := help
.PHONY: help tour test quick lab real gpu gallery wheel lint clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

tour: $(VENV)/.notebooks ## Install, run the quickstart, write build/tour/00_quickstart.html
	$(PY) docs/export_notebook.py notebooks/00_quickstart.ipynb --out build/tour

test: $(VENV)/.dev ## Install, run the whole test suite
	$(PY) -m pytest $(PARALLEL)

quick: $(VENV)/.dev ## Run the everyday tests only (a few minutes)
	$(PY) -m pytest $(PARALLEL) -m "not slow and not real"

lab: $(VENV)/.notebooks ## Open JupyterLab at notebooks/
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks

real: $(VENV)/.dev ## Repeat the comparison on real pixels and real weights
	@test -d "$(REAL)" || { echo "No real data at '$(REAL)'." \
	"Set GEOPEFT_REAL_DATA to the folder that holds it."; exit 1; }
	GEOPEFT_REAL_DATA="$(abspath $(REAL))" $(PY) -m pytest -m real
	$(PY) benchmarks/real.py --data "$(REAL)" --out build/real

gpu: $(VENV)/.dev ## Write docs/results/gpu_memory.csv, run the tests that need a GPU
	@$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	'PyTorch sees no GPU here: run make gpu on a machine with a CUDA card.')"
	$(PY) benchmarks/gpu_memory.py
	$(PY) -m pytest -m gpu

gallery: $(VENV)/.notebooks ## Write every notebook, executed, to build/gallery/
	$(PY) docs/export_notebook.py notebooks/*.ipynb --out build/gallery

wheel: $(VENV)/.python ## Build dist/geopeft_kit-*.whl, which Colab can install
	$(build)

lint: $(VENV)/.dev ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## Remove build/ and caches; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# --- The environment: reinstalled only when pyproject.toml changes -----------

# A Python that is asked for by name must be the one of the environment that is there.
ifeq ($(origin PYTHON),command line)
ifneq ($(wildcard $(PY)),)
version = $(shell "$(1)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq ($(call version,$(PY)),$(call version,$(PYTHON)))
$(error $(VENV) has Python $(call version,$(PY)), which PYTHON=$(PYTHON) is not. \
Add VENV=.venv-other, or remove $(VENV))
endif
endif
endif

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was" \
	"found. Install one, or name it: make PYTHON=/path/to/python3.12 tour"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) \
	else "Python 3.11 or newer is needed; this is %d.%d." % v[:2] \
	+ " Name another: make PYTHON=/path/to/python3.12 tour")'
	@test -x $(PY) || { echo "Creating $(VENV)"; \
	if [ -n "$(UV)" ]; then $(UV) venv --python "$(PYTHON)" $(VENV); \
	else "$(PYTHON)" -m venv $(VENV); fi || { rm -rf $(VENV); exit 1; }; }
	@touch $@

ifneq ($(UV),)
install = $(UV) pip install --python $(PY) -e ".[$(1)]"
build = $(UV) build --wheel --python $(PY) --out-dir dist
else
pip := { $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip; } && $(PY) -m pip
install = $(pip) install -e ".[$(1)]"
build = $(pip) wheel --no-deps --wheel-dir dist .
endif

$(VENV)/.notebooks: pyproject.toml | $(VENV)/.python
	$(call install,notebooks)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.python
	$(call install,dev)
	@touch $@ $(VENV)/.notebooks
