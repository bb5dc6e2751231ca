# Sourced by quickstart.sh, test.sh and .ci/run: makes environments with exact versions, once.
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

# The S3 server of the tests, apart from .venv because it asks for older packages than we do.
# Without it those tests are skipped.
setup_moto() {
  local stamp=.venv-moto/installed-5.2.5
  [ -e "$stamp" ] && return
  "${PYTHON:-python3}" -m venv .venv-moto
  .venv-moto/bin/python -m pip install --quiet --disable-pip-version-check \
    "moto[s3]==5.2.5" flask flask-cors
  touch "$stamp"
}

# The browser of one test, which is skipped without it.
setup_chromium() {
  command -v chromium > /dev/null && return
  timeout 60 apt-get update -qq > /dev/null 2>&1 &&
    DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y -qq --no-install-recommends \
      chromium fonts-dejavu-core > /dev/null 2>&1 ||
    echo "Without Chromium: it cannot be installed here." >&2
}
