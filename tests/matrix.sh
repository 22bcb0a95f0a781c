#!/usr/bin/env bash
# Run the tests that compare numbers under the arithmetic of other machines; a line for each.
#
#   tests/matrix.sh [PYTEST_ARGUMENT ...]     # other arguments: other tests, `-x`, `-k NAME`
#
# Each setting is a list of environment variables: threads, vector instructions of torch, oneDNN,
# and LOAD, busy loops that run beside the tests. One whose vector instructions this machine lacks
# is skipped, with their name. The output of those that fail is kept. Exit code 1 when one fails.
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
  'LOAD=2'
)
tests=(
  tests/golden
  tests/golden23
  tests/unit/{convert,data_tools,engine,evaluate,losses,models,scaling}
  tests/unit/data/test_{augment,colors}.py
  tests/distributed/test_{anchor,collapse,compiled,curation_copies,deepspeed,distill,ema}.py
  tests/distributed/test_{features,gathers,gram,init_from,koleo,lora,mixed_sizes,options}.py
  tests/distributed/test_{precision,reference_step,stored_targets,topology,whole_runs}.py
  tests/e2e/test_launchers.py
)
(($#)) && tests=("$@")

# What of SETTING this machine lacks.
missing() {
  local flags vector
  vector=$(grep -oE 'avx[0-9]+' <<<"$1") || return 0
  flags=$(grep -m 1 '^flags' /proc/cpuinfo || true)
  grep -qw -e "$vector" -e "${vector}f" <<<"$flags" || echo "$vector"
}

busy=()
trap '((${#busy[@]} == 0)) || kill "${busy[@]}"' EXIT

code=0
for setting in "${settings[@]}"; do
  lacks=$(missing "$setting")
  if [[ $lacks ]]; then
    printf '%-72s skipped: no %s in /proc/cpuinfo\n' "$setting" "$lacks"
    continue
  fi
  output=$(mktemp)
  read -ra variables <<<"$setting"
  loops=0
  [[ $setting != *LOAD=* ]] || loops=${setting##*LOAD=}
  for ((i = 0; i < loops; i++)); do
    (while :; do :; done) &
    busy+=($!)
  done
  words=(-q --numprocesses 3 --dist loadfile --max-worker-restart 0 "${tests[@]}")
  if env OMP_NUM_THREADS=1 "${variables[@]}" python -m pytest "${words[@]}" &>"$output"; then
    verdict=ok
  else
    verdict="FAILED, see $output" code=1
  fi
  ((${#busy[@]} == 0)) || kill "${busy[@]}"
  busy=()
  printf '%-72s %s: %s\n' "$setting" "$(tail -n 1 "$output")" "$verdict"
  [[ $verdict != ok ]] || rm -- "$output"
done
exit "$code"
