# Octavo's commands. Each one sets up what it needs in .venv first; none needs root.

PYTHON ?= python3
VENV ?= .venv
# The torch to install, in pip's words. Unset, deploy/install_torch.py chooses: with CUDA where there is an NVIDIA GPU,
# else the smaller one without. For another one say for example `make serve TORCH=torch==2.14.1`.
TORCH ?=
# So that a GPU that was added later is noticed.
GPU := $(if $(wildcard /proc/driver/nvidia/version /dev/nvidia0 /dev/nvidiactl),gpu,no-gpu)
MODEL ?= demo
SERVE_FLAGS ?=
FAULTS ?=
GPU_FLAGS ?=
GPU_PYTHON ?= 3.12
SEEDS ?= 10000
FIRST ?= 0
PROCESSES ?= 1
PLANTED ?=
FUZZ_SECONDS ?= 60
# Where clients that nobody here wrote are installed, for tests/e2e/test_third_party.py and the gateway's test_agents.py.
THIRD_PARTY := build/third-party
# Where the engines that Octavo is measured against are installed.
PEERS ?= build/peers

# What is checked for misspelt words.
SPELLED := *.md docs services gpu_worker kernels protos/octavo src/octavo/ray tests benchmarks tools deploy examples helm

BIN := $(VENV)/bin

.PHONY: help serve setup setup-dev test test-quick packages lint typecheck protos chart chart-tools chart-values third-party images-pin bench bench-peers simulate planted fuzz sanitize soak faults batch-kills gpu-gates gpu-wheels gpu-packages gpu-check gpu-bench docs figures clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

serve: setup  ## Serve MODEL (default: demo) at 127.0.0.1:50051
	@exec $(BIN)/octavo serve $(MODEL) $(SERVE_FLAGS)

setup: $(VENV)/.serve  ## Make .venv with everything that serving needs

setup-dev: $(VENV)/.dev  ## Make .venv with everything that development needs

test: setup-dev lint typecheck  ## Run everything that must pass: linters, types, all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 -m "not gates" tests --ignore=tests/e2e
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 tests/e2e
	$(BIN)/python -m tests.sanitizers --quick

test-quick: setup-dev  ## Run the tests that take little time
	$(BIN)/python -m pytest -m "not slow and not gates"

packages: setup-dev  ## Build the wheel and the source distribution, and use them in clean environments of each Python
	$(BIN)/python -m tests.packaging

lint: setup-dev  ## Check style, formatting, protos, walls, spelling and links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/python tools/house.py > /dev/null
	$(BIN)/codespell $(SPELLED)
	$(BIN)/python -m pytest --quiet tests/test_docs.py

typecheck: setup-dev  ## Check types
	$(BIN)/mypy

protos: setup-dev  ## Generate the Python code of the protos, and docs/api.md
	$(BIN)/buf format -w
	$(BIN)/python protos/generate.py
	$(BIN)/python docs/generate.py

figures: setup-dev  ## Make the pictures of docs/ and its tables of benchmarks from text and JSON
	$(BIN)/python docs/figures.py

docs: setup-dev  ## Build the pages of docs/ as a web site, in build/site
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/zensical build --clean --strict

chart: setup-dev  ## Generate the schema and the README of the Helm chart
	$(BIN)/python helm/generate.py

chart-tools: setup-dev  ## Install what the chart's tests use if it is there: checkov and actionlint, 300 MB in your cache folder
	$(BIN)/python tests/helm/tools.py

chart-values: setup-dev  ## Render 200 sets of the chart's values, and check what comes out (a minute)
	$(BIN)/python -m tests.helm.pairwise

third-party: $(THIRD_PARTY)/.installed  ## Install the clients by others that tests use if they are there (6 GB)

images-pin:  ## Name the base of the images by the digest that its tag has now (needs docker)
	$(PYTHON) helm/pin_images.py

bench: setup-dev  ## Print some of the figures in docs/performance.md
	$(BIN)/python benchmarks/scheduler_step.py
	$(BIN)/python benchmarks/gateway_stream.py
	$(BIN)/python benchmarks/cpu_step.py

bench-peers: setup-dev  ## Measure Octavo beside vLLM, llama.cpp and OpenVINO, in turn (an hour; 15 GB in PEERS)
	$(BIN)/python benchmarks/peers/run.py --home $(PEERS)

simulate: setup-dev  ## Run the scheduler among simulated faults, SEEDS times (default: 10000) from FIRST (0) on, in PROCESSES (1)
	$(BIN)/python -m tests.simulation --first $(FIRST) --seeds $(SEEDS) --processes $(PROCESSES)

planted: setup-dev  ## Plant known bugs in a copy, those with PLANTED in their name or file, and see that tests notice each
	$(BIN)/python -m tests.planted $(PLANTED)

fuzz: setup-dev  ## Fuzz each thing that strangers' bytes reach, FUZZ_SECONDS each (default: 60), guided by coverage
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	$(BIN)/python -m tests.fuzz all -max_total_time=$(FUZZ_SECONDS)

sanitize: setup-dev  ## Run the CPU kernels' tests with sanitizers: addresses, undefined behaviour, threads (half an hour)
	$(BIN)/python -m tests.sanitizers

soak: setup-dev  ## Serve 64 mixed streams for ten minutes and check that nothing is lost
	$(BIN)/python benchmarks/soak.py --minutes 10

faults: setup-dev  ## Break everything under load, FAULTS="--worker-kills 200 ...", and check that nothing is lost
	$(BIN)/python benchmarks/faults.py $(FAULTS)

batch-kills: setup-dev  ## Kill the gateway of a stored batch of 10,000 requests 50 times, and count the results
	$(BIN)/python -m tests.services.gateway.batch_kills

gpu-gates: setup-dev  ## Check the GPU path without a GPU: values, machine code, plans; prints the time
	$(BIN)/python -m pytest --durations=8 tests/kernels/triton tests/gpu_worker/cuda tests/gpu_worker/test_cuda_graphs.py tests/gpu_worker/test_cuda_step.py

# gpu-check and gpu-bench need a GPU, and a Python with torch, triton and benchmarks/gpu/requirements.txt; they install
# nothing. Without a GPU: make gpu-check GPU_FLAGS=--interpret. For a machine without a network run gpu-wheels on one
# that has it (GPU_PYTHON is the other's version), carry build/gpu-wheels over, and there run gpu-packages, then
# make gpu-check PYTHON=build/gpu/bin/python
gpu-wheels:  ## Collect the wheels that an image with PyTorch lacks for gpu-check, in build/gpu-wheels (60 MB)
	$(PYTHON) -m pip download --quiet --only-binary :all: --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest build/gpu-wheels --requirement benchmarks/gpu/requirements.txt

gpu-packages:  ## Make build/gpu, an environment that has those of build/gpu-wheels beside what PYTHON has
	$(PYTHON) -m venv --system-site-packages build/gpu
	build/gpu/bin/python -m pip install --quiet --no-index --find-links build/gpu-wheels --requirement benchmarks/gpu/requirements.txt

gpu-check:  ## Check every kernel and the cuda device on the GPU of this machine
	PYTHONPATH=src:. $(PYTHON) benchmarks/gpu check $(GPU_FLAGS)

gpu-bench:  ## Measure kernels, steps and start-up on the GPU of this machine
	PYTHONPATH=src:. $(PYTHON) benchmarks/gpu bench $(GPU_FLAGS)

clean:  ## Remove .venv and what builds left
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(THIRD_PARTY)/.installed: tests/e2e/third_party/requirements.txt tests/e2e/third_party/package.json
	$(PYTHON) -m venv $(THIRD_PARTY)
	$(THIRD_PARTY)/bin/python -m pip install --quiet uv
	$(THIRD_PARTY)/bin/uv pip install --quiet --python $(THIRD_PARTY)/bin/python --requirement $<
	for client in "guidellm>=0.8.1,<0.9" "instructor>=1.17,<2"; do \
	  place=$(THIRD_PARTY)/$${client%%>*}; $(THIRD_PARTY)/bin/uv venv --quiet --allow-existing $$place && \
	  $(THIRD_PARTY)/bin/uv pip install --quiet --python $$place/bin/python "$$client" || exit 1; \
	done
	cp tests/e2e/third_party/package.json $(THIRD_PARTY)/
	cd $(THIRD_PARTY) && npm install --no-fund --no-audit --ignore-scripts && npm run --silent programs
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-$(GPU): | $(VENV)/bin/python
	$(BIN)/python deploy/install_torch.py --torch '$(TORCH)'
	@touch $@

$(VENV)/.serve: pyproject.toml $(VENV)/.torch-$(GPU)
	$(BIN)/python -m pip install --quiet --editable ".[serve]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch-$(GPU)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.serve
