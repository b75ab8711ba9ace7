# make train   the user's environment, then the main job on the data that ship
# make test    the tests' environment, then lint, types and tests
# PYTHON=python3.12 make test   another interpreter. Each interpreter has its own two environments, made once.
# The tests' environment holds libtpu, which looks for a TPU and warns. So programs run in the user's.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
TEST_VENV ?= .venv-$(VERSION)-test
CONFIG ?= configs/r2_balanced.py
ARGS ?=
# Compiled programs are kept, so that resuming and scoring do not compile again what training did.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/runs/compiled
# glibc keeps freed pages: large arrays are not mapped afresh in every step, which is 4 to 12 % faster on CPUs.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: train lint test test-slow clean

train: $(VENV)/installed
	$(VENV)/bin/python train.py --config=$(CONFIG) $(ARGS)

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

# The run ends if a worker crashes: pytest-xdist can wait for ever for the next one (its issue 1378).
test: lint
	JAX_PLATFORMS=cpu $(TEST_VENV)/bin/python -m pytest -n auto --dist=loadfile --no-loadscope-reorder \
	  --max-worker-restart=0

test-slow: $(TEST_VENV)/installed
	JAX_PLATFORMS=cpu $(TEST_VENV)/bin/python -m pytest -m slow

$(VENV)/installed: REQUIREMENTS = requirements.txt
$(TEST_VENV)/installed: REQUIREMENTS = requirements-dev.txt
$(VENV)/installed $(TEST_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

clean:
	rm -rf .venv-*
