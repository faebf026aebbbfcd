# The one task runner. Needs a C++ compiler, make, and Python 3.11 to 3.13 with its headers and venv module.
#   make serve ARGS="--model-id org/name --port 8080"      make test PYTEST_ARGS="-k stop"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
TORCH ?= torch==2.13.0
# PyTorch's CPU builds, where no NVIDIA GPU is found: PyPI's own bring gigabytes of CUDA. Empty: do not ask.
TORCH_INDEX ?= $(if $(wildcard /dev/nvidia[0-9]*),,https://download.pytorch.org/whl/cpu)
# An index that does not answer within 5 seconds is left out: pip alone would retry it for minutes.
PROBE = import urllib.request; urllib.request.urlopen('$(TORCH_INDEX)/torch/', timeout=5)
TORCH_FLAGS = $(if $(TORCH_INDEX),$(shell $(PYTHON) -c "$(PROBE)" 2>&- && echo --extra-index-url $(TORCH_INDEX)))
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
SOURCES = setup.py pyproject.toml requirements.txt $(wildcard csrc/*.h csrc/*.def csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h csrc/*/*/*.cpp)

.PHONY: serve test test-install test-agents test-models test-page test-cluster picture soak sanitize nightly install lint format cuda-check bench clean

serve: $(VENV)/.installed
	$(BIN)/tgi-asgi $(ARGS)

test: $(VENV)/.test-tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What users do without make, in clean environments: `pip install .`, and the container's steps.
test-install: $(VENV)/.test-tools
	$(if $(TORCH_FLAGS),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(BIN)/python -m pytest -m install $(PYTEST_ARGS)

# Installs Codex CLI and Claude Code from npm (0.8 GB, in build/agents) and lets them edit a file with our server.
test-agents: $(VENV)/.test-tools
	$(BIN)/python -m pytest tests/agents -m agents $(PYTEST_ARGS)

# The pages in Debian's Chromium (`apt-get install chromium`, or name another in CHROMIUM).
test-page: $(VENV)/.page-tools
	$(BIN)/python -m pytest tests/page -m page $(PYTEST_ARGS)

# Replicas as actors of Ray Serve, of which one is killed.
test-cluster: $(VENV)/.cluster-tools
	$(BIN)/python -m pytest tests/cluster -m cluster $(PYTEST_ARGS)

# The README's picture, from the chat page before the demonstration model.
picture: $(VENV)/.page-tools
	$(BIN)/python -m tests.page.picture docs/page.webp

# Small models of every family and of every weight format against independent readers, of which the normal run has some.
test-models: $(VENV)/.test-tools
	$(BIN)/python -m pytest tests/models -m 'models or not models' $(PYTEST_ARGS)

soak: $(VENV)/.test-tools
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

# The kernels under ASan and UBSan, built in a copy of the tree; libstdc++ is loaded early for its exceptions. The
# team's races are looked for with the thread sanitizer, which does not go together with these.
sanitize: $(VENV)/.test-tools
	rm -rf build/sanitized; mkdir -p build/sanitized; git ls-files -z | xargs -0 cp --parents -t build/sanitized
	cd build/sanitized && TGI_SANITIZE=1 TGI_CUDA=0 $(abspath $(BIN))/python setup.py build_ext --inplace
	cd build/sanitized && LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest tests/ops tests/csrc \
	  tests/runner/test_inputs.py tests/runner/test_jobs.py \
	  --ignore tests/csrc/test_team_races.py $(PYTEST_ARGS)

# All that takes too long for `make test`, one after the other: storms, the kernels of x86-64 and, under qemu, of Arm
# (aarch64-linux-gnu-g++ and qemu-aarch64 must be installed), every family of models,
# the pages in Chromium, a cluster of Ray's, the sanitizers.
nightly:
	CI=1 $(MAKE) soak
	CI=1 $(MAKE) test-models
	CI=1 $(MAKE) test-page
	CI=1 $(MAKE) test-cluster
	CI=1 $(MAKE) sanitize

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

bench: $(VENV)/.test-tools
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf build dist *.egg-info tgi_asgi/*.so $(VENV)/.installed $(VENV)/.test-tools $(VENV)/.page-tools $(VENV)/.cluster-tools $(VENV)/.lint-tools

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(TORCH_FLAGS) || $(PIP) install $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install 'setuptools>=77' wheel 'ninja>=1.11' 'pybind11>=2.13'
	$(PIP) install --no-build-isolation --editable .
	touch $@

$(VENV)/.test-tools: $(VENV)/.installed tests/server/node/package.json tests/server/tgi_clients/requirements.txt
	$(PIP) install --no-build-isolation --editable '.[test]'
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install -r tests/server/tgi_clients/requirements.txt
	if command -v npm; then npm install --prefix tests/server/node --no-audit --no-fund --no-package-lock; fi
	touch $@

$(VENV)/.page-tools: $(VENV)/.test-tools
	$(PIP) install --no-build-isolation --editable '.[page]'
	touch $@

$(VENV)/.cluster-tools: $(VENV)/.test-tools
	$(PIP) install --no-build-isolation --editable '.[ray]'
	touch $@

$(VENV)/.lint-tools: $(VENV)/.installed
	$(PIP) install --no-build-isolation --editable '.[lint,test]'  # mypy reads the tests as well
	touch $@
