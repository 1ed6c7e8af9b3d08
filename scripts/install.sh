#!/usr/bin/env bash
# Makes .venv from the committed locks: CPU torch, vLLM without native code, tools, and this package. Safe to repeat.
#
# PYTHON            which Python to use (default: python3; 3.11 or newer)
# PALS_TORCH_INDEX  where torch's CPU build comes from, e.g. https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/stages.sh

venv=.venv
open_venv "$(cat requirements/*.lock pyproject.toml scripts/install.sh scripts/stages.sh | sha256sum | cut -d' ' -f1)"
vllm() {
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.32.0 CARGO_NET_OFFLINE=true \
    pip --no-deps --no-build-isolation --no-binary vllm vllm==0.32.0
}

stage "torch and build tools" pip ${index[@]+"${index[@]}"} -r requirements/build.lock
stage "vLLM's dependencies" pip --no-deps -r requirements/engine.lock
stage "vLLM 0.32.0, no native code" vllm
stage "tests and checks" pip --no-deps -r requirements/dev.lock
stage "this package" pip --no-deps --no-build-isolation -e .
close_venv
