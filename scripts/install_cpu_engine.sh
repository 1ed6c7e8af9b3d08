#!/usr/bin/env bash
# Makes .venv-cpu: vLLM's CPU build, whose MoE layers compute, for the tests marked cpu_engine. Apart from .venv because the
# CPU build and vLLM without native code are the same files. Safe to repeat; PYTHON and PALS_TORCH_INDEX as in install.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/stages.sh

venv=.venv-cpu
open_venv "$(cat requirements/cpu/*.lock requirements/cpu/shim/pyproject.toml pyproject.toml scripts/*.sh | sha256sum | cut -d' ' -f1)"
stage "torch" pip ${index[@]+"${index[@]}"} -r requirements/cpu/torch.lock
stage "vLLM 0.32.0's CPU build and its dependencies" pip --no-deps -r requirements/cpu/engine.lock
stage "the name vllm for it" pip --no-deps --no-build-isolation ./requirements/cpu/shim
stage "this package" pip --no-deps --no-build-isolation -e .
close_venv
