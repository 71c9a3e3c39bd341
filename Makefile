# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Any torch >= 2.6 decodes; `medusa train`, and so the tests, need >= 2.9. This is the one the tests are run with. On Linux
# PyPI's is a build with several GB of CUDA libraries; this takes the CPU's instead:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test TORCH=torch==2.13.0+cpu
TORCH  ?= torch==2.13.0
VENV   ?= .venv

BIN     := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test sanitize lint format install all-arch gpu clean

demo: install
	$(BIN)/medusa models fetch
	$(BIN)/medusa generate "Explain how a rainbow forms." --compare

# In several processes: much of the time one core emulates a GPU, interprets Triton or waits for a compiler.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

install: $(VENV)/.installed

# torch comes first, alone: another package's request for it would take the index's default build, whatever TORCH says.
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

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, their threads under ThreadSanitizer.
sanitize: $(VENV)/.installed-dev
	for check in address thread; do \
	  folder=build/sanitize-$$check && \
	  PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $$folder -G Ninja -DMEDUSA_SANITIZE=$$check && \
	  $(BIN)/cmake --build $$folder && $$folder/sanitize || exit 1; \
	done

# Every architecture that the CUDA and the Triton kernels support, compiled; needs nvcc 13, but no GPU. The Triton
# kernels' registers, spills and shared memory go to bench/results/triton-aot.jsonl.
all-arch: $(VENV)/.installed-test
	$(BIN)/python -m bench.triton_aot --targets sm_80,sm_90,sm_100,gfx942 --record
	MEDUSA_CUDA=on MEDUSA_CUDA_ARCHS="80;86;89;90;100;120" $(BIN)/python -m pip install --quiet --editable .

# Everything that needs a GPU, in one call of less than ten minutes, with the Python and the packages that are there:
# nothing is fetched, and only the GPU at hand is compiled for. What the build cannot give is measured without it.
# Options: make gpu GPU="--only kernels,decoding"; `python -m bench.gpu --help` names the parts.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: export PATH := $(PATH):/usr/local/cuda/bin
gpu: export PYTHONPATH := .:python
gpu:
	began=$$(date +%s); \
	$(GPU_PYTHON) -m bench.gpu.build || echo "going on with what was built before, or without it"; \
	$(GPU_PYTHON) -m bench.gpu --began $$began $(GPU)

clean:
	rm -rf build $(VENV) medusa_kernels/_C*.so
