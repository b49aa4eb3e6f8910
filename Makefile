# make demo and make test set up everything they need in .venv. make gpu installs nothing: it uses the Python it finds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One architecture keeps the set-up quick; a wheel for others sets this variable.
export RDS_FAST_CUDA_ARCHITECTURES ?= 90
NATIVE_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test bench gpu lint format clean

help:
	@echo 'make demo    train on real digits and show what the penalty does (sets up .venv first)'
	@echo 'make test    run the tests (sets up .venv first)'
	@echo 'make bench   measure kernels and steps on this machine, append to bench/results'
	@echo 'make gpu     build, test and measure on the GPU with the Python at hand; installs nothing'
	@echo 'make lint    ruff, mypy, clang-format'
	@echo 'make clean   remove what was built, the virtual environment and the runs of the demo'

$(VENV)/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'rds_fast needs Python 3.11 or later; name one: make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'Setting up $(VENV): PyTorch and the libraries of the extras triton, train, attacks, test and lint (some minutes once).'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel cmake ninja pybind11
	@RDS_FAST_NATIVE=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
	  -e '.[triton,train,attacks,test,lint]'
	@touch $@

$(VENV)/.native: $(VENV)/.dependencies $(NATIVE_SOURCES)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

setup: $(VENV)/.native

demo: setup
	@$(BIN)/rds-fast demo

test: setup
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
	@if [ -f build/CTestTestfile.cmake ]; then $(BIN)/ctest --test-dir build --output-on-failure --no-tests=error; \
	  else echo 'The native kernels were not built, so the tests of csrc/numerics.h were left out.'; fi

bench: setup
	@$(BIN)/python bench/kernels.py
	@$(BIN)/python bench/traffic.py
	@$(BIN)/python bench/objectives.py
	@$(BIN)/python bench/step.py --without one_graph

# For the GPUs present, and failing rather than going on without the kernels that it is to test.
gpu: export RDS_FAST_CUDA_ARCHITECTURES =
gpu: export RDS_FAST_NATIVE = 1
gpu: export RDS_FAST_CUDA = 1
gpu:
	$(PYTHON) tests/gpu/everything.py

lint: $(VENV)/.dependencies
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.dependencies
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f rds_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
