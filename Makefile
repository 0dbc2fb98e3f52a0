# make demo   set up, train a small H-Net on Python's standard library (about four minutes), show what it learned
# make test   set up, run all tests
# make gate   compile every Triton kernel for every GPU target (no GPU needed); fails on a register spill
# make check  ruff and mypy          make bench  the benchmarks (results: make bench RESULTS=cpu)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test gate check bench smoke clean

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
	$(BIN)/python -m pytest benchmarks -q -s $(if $(RESULTS),--results $(RESULTS))
	$(if $(RESULTS),$(BIN)/python -m benchmarks.table)

smoke: setup
	$(BIN)/python -m pytest benchmarks -q --smoke

clean:
	rm -rf .venv build
