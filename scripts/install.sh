#!/usr/bin/env bash
# Makes .venv from the committed locks: CPU torch, vLLM without native code, tools, and this package. Safe to repeat.
#
# PYTHON            which Python to use (default: python3; 3.11 or newer)
# PALS_TORCH_INDEX  where torch's CPU build comes from, e.g. https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  found="$python is not there"
  if command -v "$python" >/dev/null; then found="$python is $("$python" --version 2>&1 || echo no Python)"; fi
  echo "install: $found; Python 3.11 or newer is needed: name one with PYTHON=..., nothing was installed" >&2
  exit 1
}
venv=.venv
stamp=$venv/.installed
wanted=$(cat requirements/*.lock pyproject.toml scripts/install.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

began=$SECONDS
rm -f "$stamp"
[ -x $venv/bin/python ] && $venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear $venv
log=$venv/install.log
: >"$log"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONDONTWRITEBYTECODE # without compiled files vLLM starts in twice the time

stage() { # stage NAME COMMAND...: run it, show one line, and the log's end where it fails
  printf 'install: %s ... ' "$1"
  local since=$SECONDS
  shift
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed\n'
    grep -v '^WARNING: Location' "$log" | cut -c1-300 | tail -n 25 >&2
    echo "install: the whole log is in $log; run the same command again once the cause is gone" >&2
    exit 1
  fi
  printf '%d s\n' $((SECONDS - since))
}

pip() { $venv/bin/python -m pip install -q "$@"; }
index=()
if [ -n "${PALS_TORCH_INDEX:-}" ]; then index=(--extra-index-url "$PALS_TORCH_INDEX"); fi
vllm() {
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.32.0 CARGO_NET_OFFLINE=true \
    pip --no-deps --no-build-isolation --no-binary vllm vllm==0.32.0
}

stage "torch and build tools" pip ${index[@]+"${index[@]}"} -r requirements/build.lock
stage "vLLM's dependencies" pip --no-deps -r requirements/engine.lock
stage "vLLM 0.32.0, no native code" vllm
stage "tests and checks" pip --no-deps -r requirements/dev.lock
stage "this package" pip --no-deps --no-build-isolation -e .
echo "$wanted" >"$stamp"
echo "install: done in $((SECONDS - began)) s"
