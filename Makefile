# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12 (venv, shared libpython), make and gcc.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A machine with a normal connection may name PyTorch's CPU index here, to spare the CUDA build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help install demo test bench lint format clean

help:
	@echo "make demo    install, build the mini checkpoint's engines, serve them, ask one question per modality"
	@echo "make test    the whole test suite, in two processes"
	@echo "make bench   the benchmarks, 15 minutes at most; needs 16 GiB of free memory and 18 GB of disk"
	@echo "make lint    ruff and mypy --strict"
	@echo "make format  ruff format and its safe fixes"
	@echo "make clean   remove the environment and the demo's files"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/preflight.sh
	@python=$$(sh tools/preflight.sh) && { test -x $(BIN)/python || "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_TORCH) --editable '.[cpu,dev]'
	@touch $@

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/demo.py

test: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

bench: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/suite.py --minutes 15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo
