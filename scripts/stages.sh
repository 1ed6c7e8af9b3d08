# Sourced by the scripts that make an environment: $python checked, and `stage`, which runs one step of it and logs it in $log.

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  found="$python is not there"
  if command -v "$python" >/dev/null; then found="$python is $("$python" --version 2>&1 || echo no Python)"; fi
  echo "install: $found; Python 3.11 or newer is needed: name one with PYTHON=..., nothing was installed" >&2
  exit 1
}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONDONTWRITEBYTECODE # without compiled files vLLM starts in twice the time
index=()
if [ -n "${PALS_TORCH_INDEX:-}" ]; then index=(--extra-index-url "$PALS_TORCH_INDEX"); fi

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

pip() { "$venv/bin/python" -m pip install -q "$@"; }

open_venv() { # open_venv HASH: exit where $venv was made from the same files, else an environment to install into
  stamp=$venv/.installed
  wanted=$1
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
  began=$SECONDS
  rm -f "$stamp"
  [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  log=$venv/install.log
  : >"$log"
}

close_venv() { # everything is in it
  echo "$wanted" >"$stamp"
  echo "install: $venv done in $((SECONDS - began)) s"
}
