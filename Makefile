# Each target works from a fresh clone on a bare Linux x86-64 machine with Python 3.11, 3.12 or 3.13; the first one installs
# everything into .venv, later ones see that nothing changed and go straight to work.
#
#   make demo     train a 135M model with PPO through `ray job submit`, on CPU, and show what it learned
#   make pipeline SFT, a reward model, PPO and DPO in a chain on the same model, on CPU
#   make test     unit and integration tests (real Ray, Serve, vLLM and DeepSpeed)
#   make test-long the integration tests that `make test` leaves out for time, a few hours
#   make gpu-check the CUDA paths on one GPU, in 15 minutes; GPU_CHECK_ARGS="--device cpu" the same, small, without one
#   make bench    rayrlhf measured next to TRL and other peers on CPUs, about 90 minutes; BENCH_ARGS="--quick" one short pair
#   make check    lint, formatting, types, import layers
#   make rendered the examples of cluster/, from the jobs' own files, and docs/migration.md
#   make lock     requirements/*.lock from the ranges in pyproject.toml; LOCK_ARGS=--upgrade for newer versions
#   make clean    remove what the others made, except .venv
#
# No parameter is needed. For those who want another way (requirements/install.sh):
#   make install PYTHON=/opt/python3.12/bin/python3.12     another interpreter
#   make install LOCK=gpu                                  what a machine with GPUs needs; later targets keep it
#   make install INSTALLER=pip                             without uv

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pytest: make test PYTEST_ARGS="tests/algorithms -x"
PYTEST_ARGS ?=
# Arguments for the resolver: make lock LOCK_ARGS="gpu --upgrade-package ray"
LOCK_ARGS ?=
# Cases and options of the benchmarks: make bench BENCH_ARGS="sft-packed --pairs 3"
BENCH_ARGS ?=
# Options of the GPU check: make gpu-check GPU_CHECK_ARGS="--budget 840 --only cumem"
GPU_CHECK_ARGS ?=
export PYTHON LOCK INSTALLER

.PHONY: help install model demo pipeline test test-long gpu-check bench check rendered format lock clean

help:
	@sed -n 's/^#   make/make/p' Makefile

install:
	@requirements/install.sh $(VENV)

lock:
	@$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo python3) -m requirements.lock $(LOCK_ARGS)

model: install
	@$(BIN)/python -m jobs.demo.model

demo: install
	@$(BIN)/python -m jobs.demo.run

pipeline: model
	@$(BIN)/python -m jobs.pipeline.run --fresh

test: model
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: model
	$(BIN)/python -m pytest -m "long and not gpu" --ignore=tests/integration/test_presets.py $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "not gpu" tests/integration/test_presets.py $(PYTEST_ARGS) # all: they are compared

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

gpu-check:
	@$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo python3) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

bench: model
	@$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

rendered: install
	@cluster/render.sh
	@$(BIN)/python -m rayrlhf.migration.page docs/migration.md
	@$(BIN)/python -m rayrlhf.commands.estimators_page docs/estimators.md

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf runs models jobs/demo/data .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find rayrlhf jobs cluster tests -type d -name __pycache__ -prune -exec rm -rf {} +
