#!/usr/bin/env bash
# Run the tests that compare numbers under the arithmetic of other machines; a line for each.
#
#   tests/matrix.sh [PYTEST_ARGUMENT ...]     # other arguments: other tests, `-x`, `-k NAME`
#
# Each setting is a list of environment variables: threads, vector instructions of torch, oneDNN.
# The output of those that fail is kept. Exit code 1 when one fails.
set -euo pipefail

cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
settings=(
  'OMP_NUM_THREADS=1'
  'OMP_NUM_THREADS=2'
  'OMP_NUM_THREADS=4'
  'ATEN_CPU_CAPABILITY=default'
  'ATEN_CPU_CAPABILITY=avx2'
  'ATEN_CPU_CAPABILITY=avx512'
  'DINOSCALE_TEST_ONEDNN=0'
  'OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default DINOSCALE_TEST_ONEDNN=0'
)
tests=(
  tests/golden
  tests/unit/{convert,engine,evaluate,losses,models,scaling}
  tests/unit/data/test_{augment,colors}.py
  tests/distributed/test_{collapse,compiled,ema,init_from,options,precision,reference_step}.py
  tests/distributed/test_{topology,whole_runs}.py
)
(($#)) && tests=("$@")

code=0
for setting in "${settings[@]}"; do
  output=$(mktemp)
  read -ra variables <<<"$setting"
  if env OMP_NUM_THREADS=1 "${variables[@]}" python -m pytest -q "${tests[@]}" &>"$output"; then
    verdict=ok
  else
    verdict="FAILED, see $output" code=1
  fi
  printf '%-72s %s: %s\n' "$setting" "$(tail -n 1 "$output")" "$verdict"
  [[ $verdict != ok ]] || rm -- "$output"
done
exit "$code"
