# make demo   set up, train a small H-Net on Python's standard library (about four minutes), show what it learned
# make test   set up, run the tests but for those marked slow      make test-slow   those
#             make test-long   two that take minutes each, which run weekly
# make gate   compile every Triton kernel for every GPU target (no GPU needed); fails on a register spill or few warps;
#             make gate TRITON=3.6.0 again under that version, which it downloads
# make check  ruff, mypy, schema        make bench  the benchmarks (results: make bench RESULTS=cpu)
# make learning DATA=FILE   what an H-Net learns in equal time beside other models: tables and curves (docs/learning.md),
#             under an hour on a machine with nothing else to do; says how long at the start
# make wheel  build the wheel and one of the ops alone, install each apart from the sources and use it
# make gpu    on a machine with a GPU: scripts/gpu_harvest.sh all, which builds for the torch that PYTHON has, tests and
#             measures, downloads nothing; then the tables. Apart and in full: make gpu-build, make gpu-test, make gpu-bench
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-long gate check bench learning smoke wheel sanitize clean gpu gpu-build gpu-test gpu-bench

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

# A process for each core with one thread: small tensors gain nothing from a second. A file stays in one process, where
# its tests share what is costly. (xdist 3.8 does not see xdist_group under pytest 9.2.) All in one: JOBS=0
JOBS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup  # minutes each: none waits for another of its file
	$(PYTEST) --dist worksteal -m "slow and not long"

test-long: setup
	$(PYTEST) --dist worksteal -m long

gate: setup
	$(BIN)/python -m hnet_kernels.info --compile
	$(if $(TRITON),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/triton-$(TRITON) triton==$(TRITON))
	$(if $(TRITON),$(BIN)/python -m hnet_kernels.info --compile --triton build/triton-$(TRITON))

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

bench: setup
	$(BIN)/python -m pytest benchmarks -q -m "not gpu" $(if $(RESULTS),--full --results $(RESULTS))
	$(if $(RESULTS),$(BIN)/python -m benchmarks.table && $(BIN)/python -m benchmarks.plots)

LEARNING := $(BIN)/python -m benchmarks.learning
learning: setup
	@test -f "$(DATA)" || { echo "make learning DATA=FILE: the text to learn from, such as tinyshakespeare.txt"; exit 1; }
	$(LEARNING) --data "$(DATA)"
	$(LEARNING) plot

smoke: setup
	$(PYTEST) benchmarks -q --smoke

# The packages of .venv lend what the wheel depends on; its own hooks, such as our editable install, stay behind. What is
# compiled for one wheel serves the other
wheel: setup
	rm -rf build/wheel
	set -e; for kind in all ops; do \
	  $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel/$$kind . \
	    -C build-dir=build/wheel/build \
	    -C cmake.define.HNET_OPS_ONLY=$$(test $$kind = ops && echo ON || echo OFF); \
	  $(BIN)/python -m venv build/wheel/$$kind/venv; \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    > $$(echo build/wheel/$$kind/venv/lib/python*/site-packages)/dependencies.pth; \
	  build/wheel/$$kind/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
	    --ignore-installed build/wheel/$$kind/*.whl; \
	  build/wheel/$$kind/venv/bin/python .ci/smoke_wheel.py $$kind; \
	done

# The CPU kernels once more, built to stop at any access outside of an array and any undefined behaviour (GCC)
SANITIZED := build/sanitize
SANITIZED_TESTS := test_properties test_bad_input test_strides test_route test_entropy test_pool test_dechunk test_ema \
  test_layer_ops test_attention test_linear ../model/test_native_step
sanitize: setup
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps . -w $(SANITIZED) -C build-dir=$(SANITIZED)/cmake \
	  -C cmake.define.HNET_SANITIZE=ON -C cmake.define.HNET_CUDA=OFF -C cmake.build-type=None
	set -e; usable=$$($(BIN)/python -m tests.kernels.sanitized); test -n "$$usable"; for isa in $$usable; do \
	  echo "== $$isa"; \
	  HNET_CPU_ISA=$$isa HNET_SANITIZED=$(SANITIZED)/cmake OMP_NUM_THREADS=2 PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(BIN)/python -m pytest -q --capture=sys -p tests.kernels.sanitized -p no:cacheprovider -m "not gpu" -k "not (emulated or reference)" \
	    $(SANITIZED_TESTS:%=tests/kernels/%.py); \
	done

# --- on a machine with a GPU: no environment of our own, no build isolation, no index to download from ---------------
HAS_GPU = $(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else sys.executable + ": torch " + torch.__version__ + " sees no CUDA device")'
WORKERS = $(shell $(PYTHON) -c 'import os, xdist; print("-n", min(12, os.cpu_count()), "--dist loadfile")' 2>/dev/null)

gpu:
	@$(HAS_GPU)
	PYTHON=$(PYTHON) scripts/gpu_harvest.sh all
	$(PYTHON) -m benchmarks.table

gpu-build:
	@$(HAS_GPU)
	PYTHON=$(PYTHON) scripts/gpu_harvest.sh build

gpu-test:
	@$(HAS_GPU)
	TORCHINDUCTOR_COMPILE_THREADS=2 $(PYTHON) -m pytest tests -q -m gpu $(WORKERS)

gpu-bench:
	@$(HAS_GPU)
	$(PYTHON) -m pytest benchmarks -q -s -m gpu --benchmark-disable --results card $(if $(ALL),--compile all)
	$(PYTHON) -m benchmarks.table
	$(PYTHON) -m benchmarks.table card

clean:
	rm -rf .venv build
