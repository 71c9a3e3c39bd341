# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Any torch >= 2.6 serves; this is the one the tests are run with.
TORCH  ?= torch==2.13.0
VENV   ?= .venv

BIN     := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format install all-arch clean

demo: install
	$(BIN)/medusa models fetch
	$(BIN)/medusa generate "Explain how a rainbow forms." --compare

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

install: $(VENV)/.installed

# torch comes first, alone: another package's request for it would fetch a build with several GB of CUDA libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# Serves `install` too, so that the kernels are compiled once.
$(VENV)/.installed-test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# Every architecture that the CUDA kernels support, compiled; needs nvcc 13.
all-arch: $(VENV)/.installed
	MEDUSA_CUDA=on MEDUSA_CUDA_ARCHS="80;86;89;90;100;120" $(BIN)/python -m pip install --quiet --editable .

clean:
	rm -rf build $(VENV) medusa_kernels/_C*.so
