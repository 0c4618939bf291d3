PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help
help:
	@echo "make demo   install, build the mini checkpoint's engines, serve them, ask one question per modality"
	@echo "make test   the whole test suite"
	@echo "make lint   ruff and mypy --strict"
