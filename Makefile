# On a fresh machine, `make demo` runs data-free distillation and `make test` the tests.
# PYTHON is the interpreter for the virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ON_EVERY_CORE := -n auto --dist loadgroup
CSRC := $(shell find csrc -type f)
EMULATOR := $(shell find python_tests/cuda_host -type f)
DRIVER := bench/instructions/driver.cpp
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all lint bench bench-full bench-compare sanitize check-cuda-build gpu clean

help:
	@echo "make demo      distill a digit classifier without data and write build/demo/"
	@echo "make test      run the core tests: a few minutes on two cores"
	@echo "make test-all  run all tests: exhaustive grids, the emulator under its checkers, nvcc, the demo, clean installs,"
	@echo "               planted faults"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make bench     time the main functions against PyTorch and other packages, and write build/bench/"
	@echo "make bench-full  time all functions, shapes, dtypes and routines, and the growth of cost"
	@echo "make bench-compare BASE=revision  time this tree against another revision"
	@echo "make sanitize  test the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make check-cuda-build  build with nvcc against a CUDA version of PyTorch (downloads several GB) and test"
	@echo "make gpu       build, test and benchmark on a machine with an NVIDIA GPU, with its own python3; report in"
	@echo "               OUT (build/gpu); DRY=1 runs the steps that need no device, on any machine"

# Installed once: PyTorch, the build tools and the test tools.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing PyTorch, the build tools and the test tools"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r constraints.txt
	touch $@

# The package, installed in place; compiled again only if its C++ sources change.
$(VENV)/.build: $(VENV)/.dependencies setup.py $(CSRC)
	@echo "== compiling kdkernels (KDKERNELS_BUILD=$${KDKERNELS_BUILD:-auto})"
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.build
	@echo "== distilling a digit classifier without data: about half a minute, results in build/demo/"
	$(BIN)/python -m kdkernels demo

test: $(VENV)/.build
	@echo "== running the core tests on every core: about six minutes on two"
	$(BIN)/python -m pytest -q -m "not slow" $(ON_EVERY_CORE)

# One process for what uses every core itself.
test-all: test
	@echo "== running the exhaustive and the long tests"
	$(BIN)/python -m pytest -q -m slow
	@echo "== checking that the core tests catch planted faults"
	$(BIN)/python -m python_tests.planted.check

lint: $(VENV)/.dependencies
	@echo "== ruff, mypy, clang-format"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC) $(EMULATOR) $(DRIVER))

# Packages to compare with. A missing one is reported. None may install another PyTorch.
$(VENV)/.rivals: $(VENV)/.build pyproject.toml
	@echo "== installing the packages to compare with"
	for package in $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']\
	['optional-dependencies']['bench'])"); do \
		$(BIN)/python -m pip install -q --no-deps "$$package" || echo "== $$package could not be installed"; \
	done
	touch $@

bench: $(VENV)/.rivals
	@echo "== timing the main functions against PyTorch and other packages: some minutes, results in build/bench/"
	$(BIN)/python -m bench.run

bench-full: $(VENV)/.rivals
	@echo "== timing everything against PyTorch and other packages: half an hour or more, results in build/bench/"
	$(BIN)/python -m bench.run --full

# BASE is the revision to compare with. ONLY, if given, selects workloads by a part of their names.
bench-compare: $(VENV)/.build
	@echo "== timing this tree against $(BASE), which takes a minute or two to build; results in build/compare/"
	$(BIN)/python -m bench.compare.run --base "$(BASE)" --only "$(ONLY)"

SANITIZED := build/sanitize
sanitize: $(VENV)/.dependencies
	@echo "== building the kernels with ASan and UBSan and running their tests"
	cmake -S . -B $(SANITIZED) -G Ninja -DKDKERNELS_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build $(SANITIZED)
	cd kdkernels && find . -name '*.py' -exec cp --parents {} ../$(SANITIZED)/package/kdkernels/ \;
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/package \
	$(BIN)/python -m pytest -q -m "not slow" -k "not compile and not inductor and not export and not opcheck and not demo" \
		python_tests/ops python_tests/package/test_math.py

# Three equals signs, because a CPU version of PyTorch also satisfies two.
CUDA_VENV := build/cuda/venv
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_TORCH := torch===2.13.0
$(CUDA_VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "== creating $(CUDA_VENV) with $(CUDA_TORCH)"
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install -q "$(CUDA_TORCH)" -c constraints.txt
	$(CUDA_BIN)/python -m pip install -q -r constraints.txt
	touch $@

check-cuda-build: $(CUDA_VENV)/.dependencies $(VENV)/.build
	@echo "== building both libraries with nvcc and testing them with a CUDA version of PyTorch"
	rm -rf build/cuda/site && mkdir -p build/cuda/site && cp -r kdkernels build/cuda/site/
	rm -f build/cuda/site/kdkernels/*.so
	KDKERNELS_BUILD=cuda $(CUDA_BIN)/python setup.py -q build_ext --build-lib build/cuda/site --build-temp build/cuda/temp
	KDKERNELS_OTHER_LIBRARY="$$(ls $(CURDIR)/kdkernels/_C.*.so)" PYTHONPATH=$(CURDIR)/build/cuda/site \
	$(CUDA_BIN)/pytest -q python_tests/gpu/check_cuda_build.py
	PYTHONPATH=$(CURDIR)/build/cuda/site $(CUDA_BIN)/pytest -q -m "not slow" \
		python_tests/ops python_tests/package/test_math.py

# Needs no virtual environment and no network: tests with the packages that $(PYTHON) has.
OUT ?= build/gpu
gpu:
	@echo "== testing kdkernels $(if $(DRY),without a device,on a GPU: nine minutes at most), report in $(OUT)/"
	$(PYTHON) -m bench.gpu.run --output "$(OUT)" $(if $(DRY),--dry)

clean:
	rm -rf build $(VENV)/.build kdkernels/*.so
