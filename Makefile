# make demo   set up, train a small H-Net on Python's standard library (about four minutes), show what it learned
# make test   set up, run all tests
# make check  ruff and mypy          make bench  the benchmarks (results: make bench RESULTS=cpu)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check bench smoke clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hnet-kernels needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/hnet demo

test: setup
	$(BIN)/python -m pytest

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
