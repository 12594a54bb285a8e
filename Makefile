# make demo   one video through a real ComfyUI on the CPU, with a tiny random model
# make test   all tests that this machine can run
# make lint   formatting, lint, types, spelling
# make clean  remove everything the others made
#
# Needs Python 3.10 or newer, git and make. Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV_PYTHON := $(if $(filter Windows_NT,$(OS)),.venv/Scripts/python.exe,.venv/bin/python)
# make test ARGS="-k loader -x"
ARGS ?=
# Test processes at once; 0: none but pytest's own, for a debugger.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -4

demo:
	@$(PYTHON) scripts/setup_env.py
	@$(VENV_PYTHON) -W ignore scripts/demo.py

test:
	@$(PYTHON) scripts/setup_env.py --dev
	@# A browser that draws takes what processors there are, so nothing runs beside it. 5: ARGS choose none of these tests.
	@$(VENV_PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile -m "not browser" $(ARGS) || rest=$$?; \
	[ $${rest:-0} = 0 ] || [ $$rest = 5 ] || exit $$rest; \
	$(VENV_PYTHON) -m pytest -m browser $(ARGS) || browser=$$?; \
	[ $${browser:-0} = 5 ] && exit $${rest:-0}; \
	exit $${browser:-0}

lint:
	@$(PYTHON) scripts/setup_env.py --dev
	@$(VENV_PYTHON) scripts/lint.py

format:
	@$(PYTHON) scripts/setup_env.py --dev
	@$(VENV_PYTHON) -m ruff check --fix --exit-zero --quiet .
	@$(VENV_PYTHON) -m ruff format .

clean:
	rm -rf .venv .work build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
