# Every target sets up .venv by itself; all it needs is make and Python 3.11 or newer.
#   make test PYTHON=python3.12 JOBS=0 ARGS='-k spec'

PYTHON ?= python3
ARGS ?=
JOBS ?= auto
BENCH ?=
RUNTIMES ?=
CLIENTS ?=
FIDELITY ?=
CRASH ?=
KERNELS ?=
PREDICTED ?=

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types coverage docs bench runtimes predicted kernels \
    fidelity hostile crash clients clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## turn a trained model into an fp16w tier and prove what changed
	$(BIN)/python fixtures/demo.py

test: $(READY) ## run the tests on all processors, JOBS=0 ARGS='-k name' for some of them
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: lint types test ## lint, types and tests: what must be green before a commit

lint: $(READY) ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the mapping of passes/ to onnxforge.passes in place, so it reads an
# installed wheel. The old build/ goes first: setuptools packs whatever it finds in there.
types: $(READY) ## mypy on the wheel, as a user gets it
	rm -rf build
	mkdir -p build/types/empty
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w build/types .
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/types/site build/types/*.whl
	cd build/types/empty && MYPYPATH=../site ../../../$(BIN)/mypy \
	    --config-file ../../../pyproject.toml --cache-dir ../../../.mypy_cache -p onnxforge

coverage: $(READY) ## run the tests and say which lines they never reach
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage report

docs: $(READY) ## write the pages about passes and rules from their docstrings
	$(BIN)/python docs/generate.py

bench: $(READY) ## compare speed and memory with other tools, BENCH='...' for options
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/bench.py $(BENCH)

runtimes: $(READY) ## try the fixtures on onnxruntime 1.17 to newest, RUNTIMES='...' for options
	$(BIN)/python benchmarks/runtimes.py $(RUNTIMES)

predicted: $(READY) ## what `support` tells, against 16 onnxruntimes, PREDICTED='...' for options
	$(BIN)/python benchmarks/predicted.py $(PREDICTED)

fidelity: $(READY) ## 2,033 models through load and save, FIDELITY='*.onnx' for more
	$(BIN)/python tests/sweeps/fidelity.py $(FIDELITY)

hostile: $(READY) ## damaged and hostile models beside what other tools do with them
	$(BIN)/python tests/sweeps/hostile.py

crash: $(READY) ## kill 200 overwrites at random moments, CRASH='...' for options
	$(BIN)/python tests/sweeps/crash.py $(CRASH)

kernels: $(READY) ## ask each onnxruntime what it can load, KERNELS='--repository CLONE' for CUDA
	$(BIN)/python benchmarks/kernels.py $(KERNELS)

clients: $(READY) ## try models in Chromium, node, Rust and Python, CLIENTS='...' for options
	$(BIN)/python tests/clients/run.py $(CLIENTS)

clean: ## remove what make made
	rm -rf .venv build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache \
	    .clients .runtimes fixtures/built

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "onnxforge needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test,dev]'
	@touch $@
