#!/usr/bin/env bash
# What only a GPU can show, within 8 minutes: one JSON object on stdout, sentences on stderr.
#
#   tests/gpu/check.sh [--only NAME ...] [--minutes M] > gpu.json
#
# On any machine with a CUDA build of torch, from a checkout. PYTHON: the interpreter, default that of
# .venv, else python3. Where the rest of the requirements is missing and no network either, carry
# their wheels along (pip wheel --no-deps, for that machine's Python), DeepSpeed, pydantic and pytest
# among them; no check needs those of wandb and matplotlib:
#
#   WHEELS=/path/of/wheels tests/gpu/check.sh > gpu.json
#
# makes a virtual environment in a temporary folder from them, on top of what PYTHON has. Checks for
# which there are too few GPUs are skipped by name. Exit code: 0 none failed, 1 one did or there was
# no time for it (the JSON says which and why; --minutes, --only), 2 it cannot begin.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
fi
if [[ -n ${WHEELS:-} ]]; then
  shopt -s nullglob
  wheels=("$WHEELS"/*.whl)
  ((${#wheels[@]})) || {
    printf 'check: no wheels in %s\n' "$WHEELS" >&2
    exit 2
  }
  folder=$(mktemp -d)
  trap 'rm -rf -- "$folder"' EXIT
  "$python" -m venv --without-pip "$folder" >&2
  # Not --system-site-packages: where PYTHON is of a virtual environment itself, these are not its.
  site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
    >"$site/of_python.pth"
  pip=("$python" -m pip --python "$folder/bin/python")
  "$python" -c 'import pip' 2>/dev/null || {
    "$folder/bin/python" -m ensurepip >&2
    pip=("$folder/bin/python" -m pip)
  }
  "${pip[@]}" install --quiet --no-index --no-deps -- "${wheels[@]}" >&2
  python=$folder/bin/python
  export PATH=$folder/bin:$PATH
fi
cd -- "$root"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m tests.gpu.check "$@"
