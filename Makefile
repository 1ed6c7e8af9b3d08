.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-cpu-engine check validate bench bench-profile bench-simulator matrix clean
BIN := .venv/bin

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## make .venv from the committed locks (about two minutes, once)
	@bash scripts/install.sh

demo: install ## real vLLM on emulated boards under three policies: a table and a figure, about five minutes; MODEL=qwen3-30b or deepseek-v3 for others
	@$(BIN)/pals demo $(if $(MODEL),--model $(MODEL))

test: install ## the tests
	$(BIN)/python -m pytest

test-slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-cpu-engine: ## the tests of what counts experts, in vLLM's CPU build, made in .venv-cpu (two to four minutes, once); two minutes
	@bash scripts/install_cpu_engine.sh
	.venv-cpu/bin/python -m pytest -m cpu_engine tests/cpu_engine --durations=0

check: install ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

validate: install ## the simulated boards and engines against measured data: tables and plots in out/plant; fails where a target is missed
	$(BIN)/pals plant validate

bench: install ## overhead of the plugin, the controller and the counting of experts (that in .venv-cpu), pacing of the emulated device
	$(BIN)/python -m benchmarks.plugin_overhead
	$(BIN)/python -m benchmarks.controller_step
	$(BIN)/python -m benchmarks.throughput_ratio
	$(BIN)/python -m benchmarks.pacing
	$(BIN)/python -m benchmarks.lowering
	@bash scripts/install_cpu_engine.sh
	.venv-cpu/bin/python -m benchmarks.expert_counting

bench-profile: install ## a profile learned in a closed loop against random arrivals on the simulated replica
	$(BIN)/python -m benchmarks.profile_arrivals

bench-simulator: install ## a day on the simulated replica, and policies on it: steps a second, times real time
	$(BIN)/python -m benchmarks.simulator
	$(BIN)/python -m benchmarks.simulated_policies

matrix: install ## every feature on vLLM 0.28 to 0.33, writes docs/releases.md; a quarter of an hour, not part of CI
	$(BIN)/python -m benchmarks.release_matrix

clean: ## remove .venv and caches
	rm -rf .venv .venv-cpu .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache out build
