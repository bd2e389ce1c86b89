# `make demo` and `make test` need Python >= 3.10 with its venv module and headers, a C compiler
# with OpenMP, and PyPI; everything else goes into .venv. Another interpreter or environment:
#     make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
EDITABLE ?= --editable
ARGS ?=
# Processes that `make test` spreads test files over; 0: none but its own, for a debugger.
WORKERS ?= 2
DEBUG ?=
# What the demo learns: digits (or nothing), mnist.
DATA :=
BENCH_VENV ?= .venv-bench
ZOO_VENV ?= .venv-zoo
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ONEDNN ?= onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0
ONNX ?= onnx onnxruntime onnxscript
JAX ?= jax
MPI4PY ?= mpi4py>=4
FORMATS ?= safetensors keras h5py jax flax
SIMDE ?= simde-py>=0.8.2
# Interpreters to make wheels for; those of 3.10 to 3.15 that are found, if none are named.
WHEEL_PYTHONS ?=
WHEELHOUSE ?= wheelhouse
# The OpenMP runtime that wheels carry: this machine's, if none is named.
LIBGOMP ?=

PY := $(VENV)/bin/python
CREATED := $(VENV)/.bnfast-created
INSTALLED := $(VENV)/.bnfast-installed
PIP := $(VENV)/.bnfast-pip
COMPILED_FROM := setup.py pyproject.toml $(wildcard src/*.[ch] src/*.inc bnfast/torch/*.[ch] bnfast/*.pyx bnfast/*.pxd)
# What is copied, not linked, into an environment is copied again when it changes.
COMPILED_FROM += $(if $(EDITABLE),,$(wildcard bnfast/*.py bnfast/*/*.py))
C_SOURCES := $(wildcard src/*.[ch] bnfast/torch/*.[ch] bench/*/*.c tests/kernels/*.[ch])
WORKFLOWS := $(wildcard .github/workflows/*.yml)
CYTHON_SOURCES := $(wildcard bnfast/*.pyx bnfast/*.pxd)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo build build-debug test smoke test-torch test-zoo zoo-tests test-distributed \
    test-onnx test-neon test-arm64 test-windows check-macos test-avx512-emulated test-wide \
    sanitize sanitize-test sanitize-torch sanitize-torch-test coverage coverage-test tsan \
    tsan-python tsan-python-test matrix mutants lint format docs bench \
    bench-compare bench-suite bench-pytest instructions \
    instructions-since dist sdist wheels cross-wheels test-wheels clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22
	@echo 'Arguments are passed on: make test ARGS="-k fold -x", make demo ARGS="--quick"'

demo: $(VENV)/.bnfast-$(or $(filter mnist,$(DATA)),demo)  ## the paper's experiment on handwritten digits; DATA=mnist: on MNIST's
	$(PY) examples/paper.py $(if $(DATA),--data $(DATA)) $(ARGS)

test: $(VENV)/.bnfast-test $(VENV)/.bnfast-simde  ## the whole test suite
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

build: $(VENV)/.bnfast-build  ## compile in place what an edit of C or Cython needs; DEBUG=1: a debug build
	$(if $(filter 1,$(DEBUG)),BNFAST_DEBUG=1) $(PY) setup.py --quiet build_clib build_ext --inplace
	@test ! -e $(INSTALLED) -o pyproject.toml -nt $(INSTALLED) || touch $(INSTALLED)

build-debug:  ## the same with -Og, -g and assertions, for gdb; `make build` puts the usual one back
	@$(MAKE) --no-print-directory build DEBUG=1

smoke: $(VENV)/.bnfast-test  ## each part of the library once, in seconds
	$(PY) -m pytest -m smoke $(ARGS)

test-neon: $(VENV)/.bnfast-test  ## AArch64's kernels, under qemu
	@command -v aarch64-linux-gnu-gcc qemu-aarch64 >/dev/null && test -d /usr/aarch64-linux-gnu || { \
	    echo "bnfast: test-neon needs a cross compiler and an emulator (Debian, Ubuntu: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)" >&2; \
	    exit 1; }
	$(PY) -m pytest tests/test_kernel_program.py tests/test_isa_operations.py tests/test_driver_program.py -k "NEON or aarch64" $(ARGS)

test-arm64: $(VENV)/.bnfast-test $(VENV)/.bnfast-build  ## the package cross-built for AArch64, and the quick tests, under qemu: hours
	$(PY) tools/arm64.py test $(ARGS)

test-windows: $(VENV)/.bnfast-test $(VENV)/.bnfast-build $(VENV)/.bnfast-cross  ## bnfast for Windows: built by clang, its suite run by wine; ARGS="tests/test_half.py"
	$(PY) tools/windows test $(ARGS)

test-avx512-emulated: $(VENV)/.bnfast-test $(VENV)/.bnfast-simde  ## AVX-512's kernels on AVX2, their intrinsics emulated by SIMDe
	@$(PY) -c "import sys; sys.path[:0] = ['tests/kernels', 'tests']; import program; sys.exit(program.find_simde()[1])"
	$(PY) -m pytest tests/test_kernel_program.py tests/test_isa_operations.py -k emulated $(ARGS)

test-wide: $(VENV)/.bnfast-test  ## float64 judged as where longdouble is no wider (Windows, Apple): in double-doubles
	BNFAST_WIDE=double-double $(PY) -m pytest -m "not slow" $(ARGS)

# Headers alone. Where they cannot be installed, the tests say what to do, and are skipped.
$(VENV)/.bnfast-simde: $(INSTALLED)
	-$(if $(SIMDE),$(PY) -m pip install --quiet "$(SIMDE)")
	@touch $@

sanitize:  ## the test suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p .sanitize
	@BNFAST_SANITIZE=address,undefined $(MAKE) --no-print-directory VENV=.sanitize/venv \
	    EDITABLE= sanitize-test

# Python itself is not instrumented, so the runtimes come before it; what it never frees is not
# ours; and a MemoryError must stay one.
SANITIZED := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONMALLOC=malloc

sanitize-test: $(VENV)/.bnfast-test
	cd $(dir $(VENV)) && $(SANITIZED) \
	    $(abspath $(PY)) -m pytest -c ../pyproject.toml --rootdir=.. ../tests -m "not slow" $(ARGS)

sanitize-torch:  ## PyTorch's operators on such a build
	@mkdir -p .sanitize
	@BNFAST_SANITIZE=address,undefined $(MAKE) --no-print-directory VENV=.sanitize/venv \
	    EDITABLE= sanitize-torch-test

# Those that run in one process: PyTorch itself is not built for sanitizers.
sanitize-torch-test: $(VENV)/.bnfast-pytorch
	cd $(dir $(VENV)) && $(SANITIZED) \
	    $(abspath $(PY)) -m pytest -c ../pyproject.toml --rootdir=.. $(addprefix ../tests/pytorch/test_, \
	    fused.py enable_values.py enable_saved.py convert.py half_tensors.py) -m "not slow" $(ARGS)

coverage:  ## which lines of Python, Cython and C the tests run
	@mkdir -p .cover
	@BNFAST_COVERAGE=1 $(MAKE) --no-print-directory VENV=.cover/venv EDITABLE= .cover/venv/.bnfast-coverage
	@$(MAKE) --no-print-directory VENV=.cover/venv EDITABLE= coverage-test

# One run, measured three ways: Python by coverage.py, Cython and C by gcov, and the kernels, which
# are compiled many times, for each instruction set and type.
COVERAGE = COVERAGE_FILE=$(abspath .cover/data) $(abspath $(PY)) -m coverage
# Cython's functions have names that gcovr takes for the compiler's own, and NumPy's headers are gone
# with the environment of the build.
GCOVR = --root . --merge-lines --include-internal-functions --gcov-ignore-errors=source_not_found
coverage-test: $(if $(TORCH),$(VENV)/.bnfast-pytorch) $(VENV)/.bnfast-engines $(VENV)/.bnfast-formats
	rm -f .cover/data*
	find build/coverage -name '*.gcda' -delete
	@# A test that fails does not keep the report back.
	-cd .cover && $(COVERAGE) run --rcfile=../pyproject.toml -m pytest -c ../pyproject.toml --rootdir=.. ../tests -m "not slow" $(ARGS)
	$(COVERAGE) combine --quiet .cover
	$(COVERAGE) report
	$(VENV)/bin/gcovr $(GCOVR) --filter src/ --filter bnfast/ build/coverage
	$(PY) tools/kernel_coverage.py build/coverage

matrix: $(VENV)/.bnfast-test $(VENV)/.bnfast-simde  ## how many tests each kernel has; writes tests/MATRIX.md
	$(PY) -m pytest --matrix tests/MATRIX.md $(ARGS)

mutants: $(VENV)/.bnfast-test $(VENV)/.bnfast-build $(VENV)/.bnfast-pytorch $(VENV)/.bnfast-simde  ## mistakes made on purpose, each of which a test must notice: hours
	$(PY) tests/kernels/mutants.py
	$(PY) tests/mutants.py $(ARGS)

check-macos: $(VENV)/.bnfast-cross $(VENV)/.bnfast-build  ## compiles and links for macOS, by a compiler from PyPI; nothing runs
	$(PY) tools/check_macos.py

tsan: $(VENV)/.bnfast-test  ## whole calls in a C program under ThreadSanitizer, by clang and its OpenMP
	@$(PY) -c "import sys; sys.path[:0] = ['tests/kernels', 'tests']; import targets; \
	    sys.exit(targets.ARCHER is None and 'bnfast: tsan needs clang with ThreadSanitizer and OpenMP (Debian, Ubuntu: apt install clang libclang-rt-dev libomp-dev)')"
	$(PY) -m pytest tests/test_driver_program.py -k ThreadSanitizer $(ARGS)

tsan-python:  ## calls from Python's threads under ThreadSanitizer: PYTHON=python3.14t, a free-threaded one
	@mkdir -p .sanitize
	@# The newest NumPy and hypothesis have no wheels for 3.13t; older ones have.
	@BNFAST_SANITIZE=thread PIP_PREFER_BINARY=1 $(MAKE) --no-print-directory \
	    VENV=.sanitize/venv-thread EDITABLE= tsan-python-test

# Python itself is not instrumented, nor is libgomp, so teams have one thread: races between calls.
tsan-python-test: $(INSTALLED)
	$(PY) -m pip install --quiet pytest pytest-timeout hypothesis
	@$(PY) -c "import sysconfig, sys; \
	    sys.exit(None if sysconfig.get_config_var('Py_GIL_DISABLED') else 'bnfast: tsan-python needs a free-threaded Python: PYTHON=python3.14t')"
	cd .sanitize && LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" PYTHON_GIL=0 OMP_THREAD_LIMIT=1 \
	    TSAN_OPTIONS="report_signal_unsafe=0 suppressions=$(abspath tests/tsan.txt)" \
	    $(abspath $(PY)) -m pytest -c ../pyproject.toml --rootdir=.. ../tests/test_threads_at_once.py $(ARGS)

test-torch: $(VENV)/.bnfast-pytorch  ## the PyTorch drop-in; TORCH=, TORCH_INDEX= say which PyTorch and where from
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile tests/pytorch $(ARGS)

test-zoo:  ## some seventy architectures of torchvision, timm, ultralytics, transformers
	@$(MAKE) --no-print-directory VENV=$(ZOO_VENV) zoo-tests

zoo-tests: $(VENV)/.bnfast-zoo
	$(PY) -m pytest tests/zoo $(ARGS)

test-distributed: $(VENV)/.bnfast-test $(VENV)/.bnfast-engines  ## over torch.distributed, MPI and Dask, on real processes
	$(PY) -m pytest tests/distributed $(ARGS)

test-onnx: $(VENV)/.bnfast-test $(VENV)/.bnfast-formats  ## ONNX models; Keras, Flax and safetensors files
	$(PY) -m pytest tests/formats $(ARGS)

# What cannot be installed is skipped in the tests, with a reason.
$(VENV)/.bnfast-formats: $(INSTALLED)
	-$(if $(ONNX),$(PY) -m pip install --quiet $(ONNX))
	-$(if $(FORMATS),$(PY) -m pip install --quiet $(FORMATS))
	@touch $@

lint: $(VENV)/.bnfast-dev  ## ruff, cython-lint, clang-format, codespell, mypy, stubtest, zizmor
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint $(CYTHON_SOURCES)
	$(VENV)/bin/clang-format --dry-run --Werror $(C_SOURCES)
	$(VENV)/bin/codespell
	$(PY) -m mypy
	$(PY) -m mypy.stubtest bnfast._core --allowlist tests/typing/stubtest.txt --ignore-unused-allowlist
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/zizmor --offline --quiet .github

format: $(VENV)/.bnfast-dev  ## rewrite Python and C in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(C_SOURCES)

docs: $(VENV)/.bnfast-docs  ## the documentation, into docs/_build/html
	$(PY) -m sphinx --fail-on-warning --keep-going --fresh-env docs docs/_build/html $(ARGS)

bench:  ## against NumPy, PyTorch, oneDNN, JAX and others, and memory; writes bench/results/
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) bench-compare

bench-compare: $(VENV)/.bnfast-bench $(VENV)/.bnfast-peers
	$(PY) -m bench.compare --json bench/results/results.json --markdown bench/results/RESULTS.md \
	    --figures bench/results/figures $(ARGS)

bench-suite:  ## pytest-benchmark; ARGS="--benchmark-autosave", then, changed, "--benchmark-compare"
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) bench-pytest

bench-pytest: $(VENV)/.bnfast-bench
	$(PY) -m pytest bench/suite $(ARGS)

instructions: $(INSTALLED)  ## instruction counts of small calls under valgrind, against their pins; ARGS=--write
	$(PY) -m bench.instructions $(ARGS)

# Counts depend on the environment, so that both commits are counted in this one.
BASE ?= HEAD^
instructions-since: $(INSTALLED)  ## the same against another commit: BASE=HEAD^
	rm -rf build/base && mkdir -p build && git worktree prune
	git worktree add --quiet --detach build/base "$(BASE)"
	cd build/base && $(abspath $(PY)) setup.py --quiet build_clib build_ext --inplace
	rm -f build/base-pins.json
	cd build/base && $(abspath $(PY)) -m bench.instructions --write --pins ../base-pins.json
	git worktree remove --force build/base
	$(PY) -m bench.instructions --pins build/base-pins.json

# Peers of the comparison. One that cannot be installed is left out of it, and said to be: libxsmm
# comes from the system (Debian, Ubuntu: apt install libxsmm-dev), and torch.compile needs a C++
# compiler. The PyTorch of PyPI brings gigabytes of GPU libraries along; PyTorch's own index for the
# CPU does not.
$(VENV)/.bnfast-peers: $(INSTALLED)
	-$(PY) -m pip install --quiet $(ONEDNN)
	-$(PY) -m pip install --quiet $(ONNX)
	-$(if $(JAX),$(PY) -m pip install --quiet $(JAX))
	-$(if $(TORCH),$(PY) -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))
	@touch $@

$(VENV)/.bnfast-pytorch: pyproject.toml $(INSTALLED) | $(PIP)
	$(PY) -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PY) -m pip install --quiet --group test-torch
	@touch $@

# A torchvision fits one PyTorch. Naming that again keeps the one that is there, instead of the
# newest with gigabytes of GPU libraries, and finds the torchvision for it.
$(VENV)/.bnfast-zoo: pyproject.toml $(INSTALLED) | $(PIP)
	$(PY) -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PY) -m pip install --quiet $(TORCH) --group zoo
	@touch $@

# What work is spread over processes with. Tests of one that cannot be installed are skipped, and
# say so; MPI itself comes from the system (Debian, Ubuntu: apt install openmpi-bin libopenmpi-dev).
$(VENV)/.bnfast-engines: $(VENV)/.bnfast-distributed
	-$(PY) -m pip install --quiet "dask[dataframe]" zarr
	-$(if $(MPI4PY),$(PY) -m pip install --quiet "$(MPI4PY)")
	-$(if $(TORCH),$(PY) -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))
	@touch $@

dist: $(VENV)/.bnfast-dev  ## sdist and wheel into dist/
	$(PY) -m build $(ARGS)

sdist: $(VENV)/.bnfast-dev  ## the sdist alone
	$(PY) -m build --sdist $(ARGS)

wheels: $(VENV)/.bnfast-wheels  ## for every Python found (or WHEEL_PYTHONS), into wheelhouse/
	$(PY) tools/wheels.py build $(WHEELHOUSE) $(if $(LIBGOMP),--libgomp $(LIBGOMP)) $(WHEEL_PYTHONS)
	@echo 'make cross-wheels adds those for other systems'

# Each says what it needs.
cross-wheels: $(VENV)/.bnfast-wheels $(VENV)/.bnfast-build $(VENV)/.bnfast-cross  ## for Linux on AArch64 and for Windows, into wheelhouse/
	$(PY) tools/arm64.py wheel $(WHEELHOUSE)
	$(PY) tools/windows build $(WHEELHOUSE)

test-wheels: $(VENV)/.bnfast-wheels  ## the suite, each of these wheels installed by itself
	$(PY) tools/wheels.py test $(WHEELHOUSE) $(WHEEL_PYTHONS) $(if $(ARGS),-- $(ARGS))

clean:  ## everything made here but the virtual environment
	rm -rf build dist wheelhouse docs/_build .sanitize .cover *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f bnfast/*.so bnfast/torch/*.so bnfast/_core.c $(INSTALLED)
	find bnfast tests bench examples tools docs -name __pycache__ -type d -prune -exec rm -rf {} +

# Says what is missing and how to get it, before pip fails with a page of something else.
# Plain enough to run on any Python, since the wrong version is one of the things it reports.
define CHECK
import os, shutil, sys, sysconfig
problems = []
if sys.version_info < (3, 10):
    problems.append("Python >= 3.10 is needed and %s is %s: install a newer one and name it, "
                    "as in 'make test PYTHON=python3.11'" % (sys.executable, sys.version.split()[0]))
try:
    import ensurepip, venv
except ImportError:
    problems.append("no venv with ensurepip in %s: install it (Debian, Ubuntu: apt install python%d.%d-venv)"
                    % ((sys.executable,) + sys.version_info[:2]))
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
if not os.path.exists(header):
    problems.append("no Python headers (%s): install them (Debian, Ubuntu: apt install python%d.%d-dev; "
                    "Fedora: dnf install python3-devel)" % ((header,) + sys.version_info[:2]))
compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
if not shutil.which(compiler):
    problems.append("no C compiler (%s): install one (Debian, Ubuntu: apt install gcc; "
                    "Fedora: dnf install gcc) or name yours in CC" % compiler)
for problem in problems:
    sys.stderr.write("bnfast: " + problem + "\n")
sys.exit(bool(problems))
endef
export CHECK

$(CREATED):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "bnfast: no $(PYTHON): install Python >= 3.10, or name it as in 'make test PYTHON=python3.11'" >&2; \
	    exit 1; }
	@"$(PYTHON)" -c "$$CHECK"
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(INSTALLED): $(COMPILED_FROM) | $(CREATED)
	$(PY) -m pip install --quiet $(EDITABLE) .
	@touch $@

# A venv starts with the pip that came with its Python; groups are read since 25.1.
$(PIP): | $(CREATED)
	$(PY) -m pip install --quiet "pip>=25.1"
	@touch $@

# Without bnfast, which is to be built.
$(VENV)/.bnfast-build: pyproject.toml | $(PIP)
	$(PY) -m pip install --quiet --group build
	@touch $@

# An extra of bnfast, which is already installed, so this adds the packages and compiles nothing.
$(addprefix $(VENV)/.bnfast-,demo mnist distributed): $(VENV)/.bnfast-%: pyproject.toml $(INSTALLED)
	$(PY) -m pip install --quiet "bnfast[$*]"
	@touch $@

# Any other name is a developers' group of pyproject.toml.
$(VENV)/.bnfast-%: pyproject.toml $(INSTALLED) | $(PIP)
	$(PY) -m pip install --quiet --group $*
	@touch $@
