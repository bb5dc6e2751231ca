# Sourced by quickstart.sh and test.sh: makes .venv with exact versions, once.
# Usage: setup_venv EXTRAS   (as "" or "[dev]")
setup_venv() {
  local extras=$1 python=${PYTHON:-python3} stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=..." >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  stamp=".venv/installed$extras-$(cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)"
  [ -e "$stamp" ] && return
  echo "Installing into .venv (about a gigabyte, minutes) ..."
  # torch by its exact version first: a resolver that sees only ">=" may fetch a newer build.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".$extras"
  touch "$stamp"
}
