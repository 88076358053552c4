# Sourced by ./scripts/demo and ./scripts/test: makes .venv with what REQUIREMENTS pins, on a machine with only Python.
#
# Everything is skipped when a stamp says that it was done for these very files. Needs Python 3.11 or newer with venv;
# CONCORD_PYTHON names one that is not found by itself.

find_python() {
  local candidate without_venv=""
  for candidate in ${CONCORD_PYTHON:+"$CONCORD_PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
    # A name on PATH may be a shim for a version that is not there, so each is run.
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
    without_venv=${without_venv:-$candidate}
  done
  if [ -n "$without_venv" ]; then
    echo "$without_venv cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2
  else
    echo "Python 3.11 or newer was not found. Install it (on Debian and Ubuntu: apt-get install python3 python3-venv)" >&2
    echo "or name it: CONCORD_PYTHON=/path/to/python3" >&2
  fi
  return 1
}

# set_up REQUIREMENTS: .venv with these packages and with `concord` itself. The current directory is the project's.
set_up() {
  install_pinned "$1"
  # A system is a dozen processes. Where Python may not write what it has compiled (PYTHONDONTWRITEBYTECODE, as in many
  # containers), each would compile everything anew at each of its starts. It is for speed alone, and may fail.
  .venv/bin/python -m compileall -q actors infra schemas scripts streams || true
}

install_pinned() {
  local requirements=$1 pip_options=(--disable-pip-version-check --no-input --quiet) python wanted
  wanted=$(cat "$requirements" pyproject.toml | cksum)
  if [ -x .venv/bin/concord ] && [ "$(cat ".venv/stamp-$requirements" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear .venv
  fi
  echo "Installing what $requirements pins (a few minutes the first time)" >&2
  .venv/bin/python -m pip install "${pip_options[@]}" --require-hashes -r "$requirements"
  .venv/bin/python -m pip install "${pip_options[@]}" --no-deps --no-build-isolation -e .
  echo "$wanted" > ".venv/stamp-$requirements"
}
