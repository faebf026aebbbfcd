# All development tasks. Needs GCC's C++ compiler, make, and Python 3.11 to 3.14 with its headers and venv module.
#   make serve ARGS="--model-id org/name --port 8080"      make test PYTEST_ARGS="-k stop"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
# One process per core, at most four, each running whole files.
SPREAD = -n auto --maxprocesses 4 --dist loadfile
TORCH ?= torch==2.13.0
# PyTorch's CPU builds if no NVIDIA GPU is found, because PyPI's builds include gigabytes of CUDA. Empty: no extra index.
TORCH_INDEX ?= $(if $(wildcard /dev/nvidia[0-9]*),,https://download.pytorch.org/whl/cpu)
# An index that does not answer within 5 seconds is skipped, because pip itself would retry it for minutes.
PROBE = import urllib.request; urllib.request.urlopen('$(TORCH_INDEX)/torch/', timeout=5)
TORCH_FLAGS = $(if $(TORCH_INDEX),$(shell $(PYTHON) -c "$(PROBE)" 2>&- && echo --extra-index-url $(TORCH_INDEX)))
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module when it is first imported; pip would compile all that it installs, which takes 45 s.
PIP_INSTALL = $(PIP) install --no-compile
# Empty: the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
INSTALL = $(PIP_INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SOURCES = setup.py pyproject.toml requirements.txt constraints.txt $(wildcard csrc/*.h csrc/*.def csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h csrc/*/*/*.cpp)

.PHONY: serve test test-all test-faults test-install test-lowest test-image test-agents test-models test-page test-deploy test-cluster test-offline cuda-link constraints picture docs soak sanitize nightly install lint format cuda-check bench clean

# Kernels for this machine's processor are enough, which takes a third of the time; the other targets compile all.
serve: $(VENV)/.native
	$(BIN)/tgi-asgi $(ARGS)

# For a single process: PYTEST_ARGS="-n 0". The tests and the hundreds of programs that they start are compiled once,
# even where the environment keeps Python from writing that.
test: $(VENV)/.test-tools
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

# With the tests that are marked `thorough`, as in CI: whole models on the emulated GPU, the commands of all documents,
# kernels in plain C++, and others that take long for what they add.
test-all:
	$(MAKE) test PYTEST_ARGS='-m "thorough or not thorough" $(PYTEST_ARGS)'

# Installation without make, in clean environments: from the sources, git, a source distribution, a wheel; with uv; and
# the container's steps. build/install.json records how long each took.
test-install: $(VENV)/.package-tools
	$(if $(TORCH_FLAGS),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(BIN)/python -m pytest -m install $(PYTEST_ARGS)

# Each of some hundred faults, planted in a CUDA kernel that is then compiled for the emulated GPU: its tests must find it.
test-faults: $(VENV)/.test-tools
	$(BIN)/python -m pytest -n auto --maxprocesses 4 tests/cuda -m faults $(PYTEST_ARGS)

# The oldest versions that requirements.txt allows (except torch's), in a separate environment.
test-lowest: $(VENV)/.package-tools
	$(BIN)/python -m tests.lowest $(PYTEST_ARGS)

# The CPU image on a root that debootstrap makes, without a container engine (`apt-get install buildah debootstrap
# runc`; as root): built, run as user 1000 on a read-only root, and queried. build/install.json records the times.
test-image: $(VENV)/.test-tools
	$(BIN)/python -m pytest -m image $(PYTEST_ARGS)

# Installs Codex CLI and Claude Code from npm (0.8 GB, in build/agents) and lets them edit a file through the server.
test-agents: $(VENV)/.test-tools
	$(BIN)/python -m pytest tests/agents -m agents $(PYTEST_ARGS)

# The pages in Debian's Chromium (`apt-get install chromium`; CHROMIUM names another binary).
test-page: $(VENV)/.page-tools
	$(BIN)/python -m pytest tests/page -m page $(PYTEST_ARGS)

# The files of deploy/ with the programs they are written for: Debian's nginx-light, caddy, prometheus, docker-compose
# and systemd, and kubectl 1.21 or later. A test whose program is missing is skipped and names it.
test-deploy: $(VENV)/.deploy-tools
	$(BIN)/python -m pytest tests/deploy -m deploy $(PYTEST_ARGS)

# Replicas as actors of Ray Serve; one of them is killed.
test-cluster: $(VENV)/.cluster-tools
	$(BIN)/python -m pytest tests/cluster -m cluster $(PYTEST_ARGS)

# The README's screenshot of the chat page, with the demonstration model.
picture: $(VENV)/.page-tools
	$(BIN)/python -m tests.page.screenshot docs/page.webp

# The documentation site, in build/site. `make test` checks the documents' links, anchors and commands.
docs: $(VENV)/.docs-tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest tests/docs -m docs $(PYTEST_ARGS)

# Small models of every family and weight format against independent readers. `make test` runs a selection of these.
# First what is marked `models`, in all folders, then the other tests of the files about models. If PYTEST_ARGS selects
# no test of one run (pytest's status 5), the other decides.
MODEL_FILES = tests/models tests/*/test_*famil*.py tests/*/test_encoders.py tests/*/test_shards.py
test-models: $(VENV)/.test-tools
	$(BIN)/python -m pytest $(SPREAD) -m 'models and (thorough or not thorough)' $(PYTEST_ARGS) || test $$? -eq 5
	$(BIN)/python -m pytest $(SPREAD) $(MODEL_FILES) -m 'not models and (thorough or not thorough)' $(PYTEST_ARGS) || test $$? -eq 5

soak: $(VENV)/.test-tools
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

# The kernels under ASan and UBSan, built in a copy of the tree; libstdc++ is preloaded for its exceptions. The thread
# sanitizer, which cannot be combined with these, has a test of its own (test_team_races.py). The sanitizers keep freed
# memory, so that tests of what the system gets back are left out. An impossible allocation fails, as without them.
OF_MEMORY = tests/ops/test_drafter.py::test_a_short_sequence_does_not_keep_the_memory_of_a_long_one \
  tests/runner/test_handoff.py::test_an_idle_thread_returns_the_memory_of_dropped_tensors
sanitize: $(VENV)/.test-tools
	rm -rf build/sanitized; mkdir -p build/sanitized; git ls-files -z | xargs -0 cp --parents -t build/sanitized
	cd build/sanitized && TGI_SANITIZE=1 TGI_CUDA=0 $(abspath $(BIN))/python setup.py build_ext --inplace
	cd build/sanitized && LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 TGI_SANITIZE=1 $(abspath $(BIN))/python -m pytest \
	  tests/ops tests/csrc tests/runner/test_inputs.py tests/runner/test_handoff.py -m 'thorough or not thorough' \
	  --ignore tests/csrc/test_team_races.py $(addprefix --deselect ,$(OF_MEMORY)) $(PYTEST_ARGS)

# Without a network and without cached downloads: the tests that `-m "not demo"` selects, in a copy of the tree and in a
# network namespace with only a loopback device. The copy is a repository, because some tests ask git what belongs to it.
test-offline: $(VENV)/.test-tools
	rm -rf build/offline; mkdir -p build/offline; git ls-files -z | xargs -0 cp --parents -t build/offline
	cd build/offline && git init --quiet && git add .
	cp tgi_asgi/*.so build/offline/tgi_asgi/
	cd build/offline && XDG_CACHE_HOME=$(abspath build/offline)/cache unshare --net --map-root-user sh -c \
	  'ip link set lo up && exec $(abspath $(BIN))/python -m pytest $(SPREAD) -m "not demo and (thorough or not thorough)" $(PYTEST_ARGS)'

# Everything that takes too long for `make test`, one part after the other whatever fails, with a table at the end: the
# thorough tests, faults planted in the CUDA kernels, storms, the kernels of x86-64 and, under qemu, of Arm
# (aarch64-linux-gnu-g++ and qemu-aarch64 must be installed), every model family, the pages in Chromium, the files of
# deploy/, a Ray cluster, packages in clean environments, the oldest dependencies, the image, agents, a run without
# network, the documentation site, the sanitizers, and the CUDA kernels compiled and linked.
NIGHTLY = test-all test-faults soak test-models test-page test-deploy test-cluster test-install test-lowest test-image \
  test-agents test-offline docs sanitize cuda-check cuda-link
nightly:
	$(PYTHON) .ci/nightly $(NIGHTLY)

install: $(VENV)/.installed

lint: $(VENV)/.lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

cuda-check: $(VENV)/.installed
	$(BIN)/python -m tests.cuda.nvcc_check

# The CUDA kernels compiled and linked against torch's CUDA wheel (0.5 GB, from PyPI), with every symbol looked up.
cuda-link: $(VENV)/.installed
	$(BIN)/python -m tests.cuda.link_check

# Regenerates constraints.txt for all extras and Pythons, without torch and its dependencies. ARGS=--upgrade: newest.
constraints: $(VENV)/.package-tools
	mkdir -p build; echo "torch; python_version < '3'" > build/overrides.txt
	printf '%s\n' setuptools ninja pybind11 > build/tools.txt
	UV_CUSTOM_COMPILE_COMMAND='make constraints' $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	  --all-extras --override build/overrides.txt --no-emit-package pip --no-annotate $(ARGS) \
	  pyproject.toml build/tools.txt --output-file constraints.txt

bench: $(VENV)/.test-tools
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf build dist *.egg-info tgi_asgi/*.so $(VENV)/.native $(VENV)/.installed $(VENV)/.test-tools $(VENV)/.page-tools $(VENV)/.deploy-tools $(VENV)/.package-tools $(VENV)/.docs-tools $(VENV)/.cluster-tools \
	  $(VENV)/.lint-tools

# What is missing is said before anything is downloaded.
$(VENV)/.torch:
	@$(PYTHON) -c "import os, sys, sysconfig; found = sys.version_info[:2]; (3, 11) <= found <= (3, 14) or sys.exit( \
	  '$(PYTHON) is Python %d.%d. Choose one from 3.11 to 3.14: make $(MAKECMDGOALS) PYTHON=python3.12' % found); \
	  sysconfig.get_config_var('Py_GIL_DISABLED') and sys.exit( \
	  '$(PYTHON) is free-threaded. Choose one with a GIL: make $(MAKECMDGOALS) PYTHON=python3.12'); \
	  os.path.exists(sysconfig.get_path('include') + '/Python.h') or sys.exit( \
	  'The headers of $(PYTHON) are missing. Debian and Ubuntu: apt-get install python3-dev')"
	@command -v $${CXX:-c++} > /dev/null || { echo >&2 "There is no C++ compiler ($${CXX:-c++}). Debian and Ubuntu:" \
	  'apt-get install build-essential python3-dev python3-venv'; exit 1; }
	@! $${CXX:-c++} -dM -E -x c++ /dev/null | grep -q __clang__ || { echo >&2 "$${CXX:-c++} is Clang, which the" \
	  "kernels are not written for. Choose GCC: make $(MAKECMDGOALS) CXX=g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH) $(TORCH_FLAGS) || $(PIP_INSTALL) $(TORCH)
	touch $@

define INSTALL_EDITABLE
$(INSTALL) 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13'
@echo 'Compiling the kernels, without further output: two to five minutes on two free cores.'
TGI_KERNEL_SETS=$(1) $(INSTALL) --no-build-isolation --editable .
PYTHONDONTWRITEBYTECODE= $(BIN)/python -c '$(IMPORT)'
endef
# Compiles the Python modules that the server imports. Where PYTHONDONTWRITEBYTECODE is set, each start would otherwise
# compile them, which takes about as long as the rest of a start.
IMPORT = import compileall, tgi_asgi.runner.load, tgi_asgi.serve.server; compileall.compile_dir("tgi_asgi", quiet=1)

$(VENV)/.native: $(VENV)/.torch $(SOURCES)
	$(call INSTALL_EDITABLE,native)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(call INSTALL_EDITABLE,all)
	touch $(VENV)/.native $@

$(VENV)/.test-tools: $(VENV)/.installed tests/server/node/package.json tests/server/tgi_clients/requirements.txt
	$(INSTALL) --no-build-isolation --editable '.[test]'
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --no-compile -r tests/server/tgi_clients/requirements.txt
	if ! command -v nvcc && ! test -x $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc; then \
	  $(INSTALL) --no-build-isolation --editable '.[nvcc]' || echo 'No nvcc: its tests are skipped.'; fi
	if command -v npm; then npm install --prefix tests/server/node --no-audit --no-fund --no-package-lock \
	  || echo 'No SDK for Node: its tests are skipped.'; fi
	touch $@

$(VENV)/.page-tools: $(VENV)/.test-tools
	$(INSTALL) --no-build-isolation --editable '.[page]'
	touch $@

$(VENV)/.package-tools: $(VENV)/.test-tools
	$(INSTALL) --no-build-isolation --editable '.[packages]'
	touch $@

$(VENV)/.deploy-tools: $(VENV)/.test-tools
	$(INSTALL) --no-build-isolation --editable '.[deploy]'
	touch $@

$(VENV)/.docs-tools: $(VENV)/.test-tools
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	touch $@

$(VENV)/.cluster-tools: $(VENV)/.test-tools
	$(INSTALL) --no-build-isolation --editable '.[ray]'
	touch $@

$(VENV)/.lint-tools: $(VENV)/.installed
	$(INSTALL) --no-build-isolation --editable '.[lint,test]'  # mypy reads the tests as well
	touch $@
