# Every target sets up what it needs; none has to be run before another.
#   make demo    watch a student learn, synchronously and asynchronously
#   make test    the test suite          (make test ARGS="-k gather -x" passes arguments to pytest)
# On a machine with a GPU, bench/gpu.sh builds, tests and measures without a network and without make.
VENV := $(CURDIR)/.venv
PYTHON ?=
TORCH ?=
ARGS ?=

# One thread unless the caller says otherwise: the workers of the pipeline share the cores.
export OMP_NUM_THREADS ?= 1

ENVIRONMENT := $(VENV)/.environment-stamp
NATIVE := $(VENV)/.native-stamp
BUILD := $(VENV)/.build-stamp
SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitize bench bench-report gates check-gpu lint wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' $(MAKEFILE_LIST)

setup: $(BUILD) ## .venv with pinned packages and the compiled extension

$(ENVIRONMENT): requirements/lock.txt requirements/torch.txt requirements/setup_venv.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" requirements/setup_venv.sh "$(VENV)"
	@touch $@

# The extension is built in place, by ninja, before pip is asked: pip would hide what the build has to say.
$(NATIVE): $(ENVIRONMENT) setup.py $(SOURCES)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	@touch $@

# Editable, so that Python files need no rebuild.
$(BUILD): $(NATIVE) pyproject.toml
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

demo: $(BUILD) ## teacher, student and the pipeline on this machine's CPU; writes runs/demo-sync and runs/demo-async
	$(VENV)/bin/asyncopd demo

# One process a core, at most eight. The coverage threshold is for whole runs: ARGS that select tests leave it out.
test: $(BUILD) ## the test suite, with line coverage of asyncopd/
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal --cov=asyncopd --cov-report=term \
	  $(if $(ARGS),,--cov-fail-under=90) $(ARGS)

# A package of its own under build/, so that the ordinary extension stays. The sanitizer has to be loaded before Python,
# which itself never frees all it has (no leak check), and before torch, whose libraries it does not know.
SANITIZED := $(CURDIR)/build/sanitized
sanitize: $(BUILD) ## the kernels' tests with address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)
	ASYNCOPD_SANITIZE=1 $(VENV)/bin/python setup.py --quiet build --build-lib $(SANITIZED)
	cd tests && PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1 ASYNCOPD_SANITIZE=1 \
	  $(VENV)/bin/pytest -q -p no:cacheprovider --timeout 600 test_sanitizer.py $(or $(ARGS),backends ops losses)

# The suite's own table takes the place of pytest-benchmark's, whose options still work: make bench ARGS="--benchmark-autosave"
bench: $(BUILD) ## every kernel beside the machine's limit and its peers, on two threads, in under 10 minutes; writes bench/results
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m pytest bench/test_suite.py -q --benchmark-quiet $(ARGS)

bench-report: $(BUILD) ## README's table and the plots, from the newest results (a GPU's: ARGS="--keep build/gpu/results.jsonl")
	$(VENV)/bin/python -m bench.report --into README.md --plots bench/results $(ARGS)

gates: $(BUILD) ## the ratios that no kernel may lose, within one run: two threads, AVX-512
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m pytest bench/test_gates.py bench/test_small_gates.py bench/test_host_gates.py \
	  -q --benchmark-quiet $(ARGS)

check-gpu: $(BUILD) ## GPU kernels without a GPU: all compiled (no spills, no fp64, budgets), every op launched into nothing
	$(VENV)/bin/python -m bench.compile_gpu $(ARGS)
	$(VENV)/bin/python -m bench.launch_check

lint: $(BUILD) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(BUILD) ## a wheel for this machine in dist/
	rm -rf build/lib* build/bdist*
	$(VENV)/bin/python -m build --wheel --no-isolation

clean: ## remove what was built; keeps .venv and runs/
	rm -rf build dist *.egg-info asyncopd/_C.*.so .coverage .coverage.* coverage.xml htmlcov
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(NATIVE) $(BUILD)
