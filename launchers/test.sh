#!/usr/bin/env bash
# Check everything: install (setup.sh), format, lint, types, tests; stop at the first failure.
#
#   launchers/test.sh [PYTEST_ARGUMENT ...]
#   launchers/test.sh --quick    while you work: unit tests, a golden trajectory, two kills of a run
#
# VENV_DIR: as in setup.sh. Without arguments, all tests run, in three workers, and pytest lists those
# that were skipped and why; packages for the tests between hosts are installed where apt-get may
# (tests/multinode). The last line is pytest's.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${VENV_DIR:-.venv}
[[ $venv == /* ]] || venv=$root/$venv
cd -- "$root"

stage() { # NAME COMMAND ...
  local name=$1 code=0
  shift
  printf '== %s\n' "$name"
  "$@" || code=$?
  if ((code)); then
    printf 'test: FAILED at %s (exit %d)\n' "$name" "$code" >&2
    exit "$code"
  fi
}

packages() {
  "$root/tests/multinode/install.sh" --slurm || (($? == 3)) # 3: not here; these tests are skipped
}

stage setup "$root/launchers/setup.sh" "$venv"
export PATH=$venv/bin:$PATH # tests start `deepspeed` and `ninja` by name
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several processes on few cores
stage 'ruff format' python -m ruff format --check .
stage 'ruff check' python -m ruff check .
stage mypy python -m mypy
# A test file stays on one worker, because its tests share runs; the order is that of conftest.py.
# Three for two cores, since one of them often waits: for a time-out, a host, a queue. One that
# crashes fails its test and ends the session; started again it would leave the session waiting.
workers=(--numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0)
if [[ ${1:-} == --quick ]]; then
  shift
  stage kills python -m tests.faults --kills 2 --stage 2
  stage pytest python -m pytest "${workers[@]}" --quiet @tests/quick.txt "$@"
elif (($#)); then
  stage pytest python -m pytest "$@"
else
  stage packages packages
  stage pytest python -m pytest "${workers[@]}" --durations 10 -r fEs
fi
