# make test    build the sdist, from it the wheel, and run all tests on the installed wheel
# make demo    the main job: LUKE on real sentences, beside the one of transformers
# Each needs Linux, Python 3.11 or later, make and a C++ compiler, and installs the rest into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the CUDA kernels are built for here, where there is nvcc; `pip install .` takes all architectures.
export LUKE_KERNELS_CUDA_ARCHS ?= 80 90a
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Triton of the GPU machines' PyTorch, for compiling the kernels; the newest, in .venv, interprets them.
TRITON36 := build/triton-3.6.0
# The other transformers whose checkpoints and users there are, and the oracle of the tokenizer.
TRANSFORMERS4 := build/transformers-4.57.6
SOURCES := $(shell find luke_kernels csrc -name '*.py' -o -name '*.pyi' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' \
	-o -name '*.json' -o -name '*.jsonl' -o -name '*.txt' -o -name '*.md') setup.py pyproject.toml MANIFEST.in README.md LICENSE

.PHONY: test test-all demo lint sanitize build clean

test: $(VENV)/wheel $(VENV)/tools $(TRITON36) $(TRANSFORMERS4)
	LUKE_KERNELS_TEST_INSTALLED=1 LUKE_KERNELS_TRITON36=$(abspath $(TRITON36)) $(BIN)/pytest -n auto --dist worksteal $(PYTEST_ARGS)
	LUKE_KERNELS_TEST_INSTALLED=1 PYTHONPATH=$(TRANSFORMERS4) $(BIN)/pytest -n auto --dist worksteal $(PYTEST_ARGS) tests/parity

test-all: PYTEST_ARGS += -m "slow or not slow"
test-all: test

demo: $(VENV)/wheel
	$(BIN)/luke-kernels demo

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, in C++ and from Python; and under valgrind, which
# knows no AVX-512.
SANITIZE := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/tools
	rm -rf build/sanitize
	LUKE_KERNELS_CUDA=0 CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(INSTALL) --no-deps --target build/sanitize .
	CXXFLAGS="$(SANITIZE)" PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		LUKE_KERNELS_TEST_INSTALLED=1 $(BIN)/pytest -n auto --dist worksteal -p no:cacheprovider tests/ops -k cpu
	$${CXX:-c++} -std=c++17 -g -O1 -march=x86-64-v3 -DLUKE_ISA=avx2 tests/cpp/test_kernels.cpp -o build/sanitize/test_kernels
	valgrind --quiet --error-exitcode=1 build/sanitize/test_kernels

# For development: the source tree itself, extension built in place.
build: $(VENV)/tools
	rm -f $(VENV)/wheel
	$(INSTALL) --no-deps --editable .

$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	# torch for CUDA has brought its own triton; torch for the CPU needs one for the interpreter.
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) triton==3.9.0
	$(INSTALL) typer rich numpy safetensors huggingface_hub tokenizers transformers build "setuptools>=77"
	touch $@

$(VENV)/tools: $(VENV)/ready
	$(INSTALL) pytest pytest-xdist pytest-benchmark hypothesis pybind11 peft matplotlib ruff mypy import-linter \
		onnx onnxscript onnxruntime
	touch $@

# From the sdist, so that what it lacks is missed.
$(VENV)/wheel: $(VENV)/ready $(SOURCES)
	rm -rf dist build/lib* build/temp.*
	$(BIN)/python -m build --outdir dist .
	$(INSTALL) --no-deps --force-reinstall dist/*.whl
	touch $@

$(TRITON36): $(VENV)/ready
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0
	touch $@

# With what it depends on, which the newer one has in other versions; torch and numpy stay those of .venv.
$(TRANSFORMERS4): $(VENV)/ready
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ transformers==4.57.6 numpy==$(shell \
		sed -n 's/^numpy==//p' constraints.txt)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info luke_kernels/_C.*.so
