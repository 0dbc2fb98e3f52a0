# make demo   set up, train a small H-Net on Python's standard library (about four minutes), show what it learned
# make test   set up, run all tests
# make gate   compile every Triton kernel for every GPU target (no GPU needed); fails on a register spill
# make check  ruff and mypy          make bench  the benchmarks (results: make bench RESULTS=cpu)
# make gpu    on a machine with a GPU: build for the torch that PYTHON has, run the GPU tests, the GPU benchmarks, and
#             print their table. Downloads nothing. Alone: make gpu-build, make gpu-test, make gpu-bench
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test gate check bench smoke clean gpu gpu-build gpu-test gpu-bench

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hnet-kernels needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# the CPU build of torch does not bring triton, which the interpreter and the compile gate need
	@if [ "$$(uname -s)" = Linux ]; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^triton==' constraints.txt)"; \
	else echo "triton is left out: it has no build for $$(uname -s)"; fi
	touch $@

demo: setup
	$(BIN)/hnet demo

test: setup
	$(BIN)/python -m pytest

gate: setup
	$(BIN)/python -m hnet_kernels.info --compile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks -q -s -m "not gpu" $(if $(RESULTS),--results $(RESULTS))
	$(if $(RESULTS),$(BIN)/python -m benchmarks.table)

smoke: setup
	$(BIN)/python -m pytest benchmarks -q --smoke

# --- on a machine with a GPU: no environment of our own, no build isolation, no index to download from ---------------
HAS_GPU = $(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else sys.executable + ": torch " + torch.__version__ + " sees no CUDA device")'
CARD = $(shell $(PYTHON) -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' 2>/dev/null)
WORKERS = $(shell $(PYTHON) -c 'import os, xdist; print("-n", min(12, os.cpu_count()), "--dist loadgroup")' 2>/dev/null)

gpu:
	$(MAKE) gpu-build
	$(MAKE) gpu-test
	$(MAKE) gpu-bench

gpu-build:
	@$(HAS_GPU)
	CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_CUDA_ARCHITECTURES=$(CARD)" $(PYTHON) -m pip install --quiet \
	  --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m hnet_kernels.info

gpu-test:
	@$(HAS_GPU)
	TORCHINDUCTOR_COMPILE_THREADS=2 $(PYTHON) -m pytest tests -q -m gpu $(WORKERS)

gpu-bench:
	@$(HAS_GPU)
	$(PYTHON) -m pytest benchmarks -q -s -m gpu --benchmark-disable --results card $(if $(ALL),--compile-all)
	$(PYTHON) -m benchmarks.table
	$(PYTHON) -m benchmarks.table card

clean:
	rm -rf .venv build
