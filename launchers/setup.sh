#!/usr/bin/env bash
# Make a virtual environment with dinoscale and its test tools, at the versions in constraints.txt.
#
#   launchers/setup.sh [VENV_DIR]
#
# VENV_DIR: argument, else the variable VENV_DIR, else .venv; relative to the checkout root.
# PYTHON: the interpreter to make it with, 3.10 to 3.13; default python3.
# Does nothing when all is installed; starts over when an earlier call did not finish.
set -euo pipefail

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 2
}

[[ $# -le 1 ]] || die "usage: launchers/setup.sh [VENV_DIR]"
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${1:-${VENV_DIR:-.venv}}
[[ $venv == /* ]] || venv=$root/$venv
venv=$(realpath -m -- "$venv")
# One line, "ORIGIN STAMP VENV": ORIGIN is `created` (ours to delete) or `adopted` (was there
# before); STAMP is `unfinished` while an install runs, then the hash of what was installed.
state=$venv/.dinoscale-setup

stamp() { # of what the install depends on; the editable install points at the checkout
  {
    cat -- "$root/pyproject.toml" "$root/launchers/constraints.txt"
    "$venv/bin/python" -V
    printf '%s\n' "$root"
  } 2>/dev/null | sha256sum | cut -c 1-64
}

read_state() {
  origin='' installed='' where=''
  if [[ -s $state ]]; then read -r origin installed where <"$state" || true; fi
}

is_done() {
  read_state
  [[ -x $venv/bin/python && $where == "$venv" ]] && [[ $installed == "$(stamp)" ]]
}

say_done() { say "up to date: $venv"; }

find_python() { # sets `python` to the interpreter itself: python3 may be one of a venv, even of this
  local name=${PYTHON:-python3} version
  command -v -- "$name" >/dev/null || die "$name not found; install Python 3.10 to 3.13, or set PYTHON"
  version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    die "$name does not run; set PYTHON to a Python 3.10 to 3.13"
  case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) die "$name is Python $version; dinoscale needs 3.10 to 3.13, set PYTHON to one" ;;
  esac
  python=$("$name" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
}

create() {
  find_python
  [[ $installed != unfinished ]] || say "an earlier install did not finish; starting over"
  say "creating $venv with $("$python" -V)"
  printf 'created unfinished %s\n' "$venv" >"$state" # first, so that a broken venv is recognised
  find "$venv" -mindepth 1 -maxdepth 1 ! -name "${state##*/}" -exec rm -rf -- {} +
  "$python" -m venv "$venv" || die "$python -m venv failed; see above"
}

mend_scripts() { # pip names python in the first line of `deepspeed`; a space there breaks the line
  local script first
  [[ $venv == *[[:space:]]* ]] || return 0
  for script in "$venv"/bin/*; do
    [[ -f $script ]] || continue
    IFS= read -r first <"$script" || continue
    [[ $first == "#!$venv/bin/python"* ]] || continue
    { # the shell runs line 2; to Python, lines 2 and 3 are a string
      printf '%s\n' '#!/bin/sh' "'''exec' \"$venv/bin/python\" \"\$0\" \"\$@\"" "' '''"
      tail -n +2 -- "$script"
    } >"$state.script"
    cat -- "$state.script" >"$script" # keeps the mode
    rm -- "$state.script"
  done
}

if is_done; then
  say_done
  exit
fi
if [[ ! -e $state && ! -e $venv/pyvenv.cfg && -e $venv ]]; then
  [[ -d $venv && -z $(ls -A -- "$venv") ]] ||
    die "$venv exists and is not a virtual environment; remove it or choose another VENV_DIR"
fi
mkdir -p -- "$venv"
exec 9>>"$state"
if command -v flock >/dev/null && ! flock --nonblock 9; then
  say "waiting for another setup of $venv"
  flock 9
  if is_done; then
    say_done
    exit
  fi
fi

read_state
if [[ -z $origin && -e $venv/pyvenv.cfg ]]; then
  origin=adopted
  say "using the virtual environment that is already at $venv"
elif [[ $origin != adopted ]] && {
  [[ $installed == unfinished || $where != "$venv" ]] || ! "$venv/bin/python" -c 'import pip' &>/dev/null
}; then
  origin=created
  create
fi
printf '%s unfinished %s\n' "$origin" "$venv" >"$state"

quiet=(--quiet)
[[ ! -t 1 ]] || quiet=()
say "installing dinoscale with its requirements; the first time takes minutes, torch is large"
cd -- "$root"
"$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
  --constraint launchers/constraints.txt --editable '.[test]' || die "pip failed; see above"
mend_scripts
printf '%s %s %s\n' "$origin" "$(stamp)" "$venv" >"$state"
say "done: $venv"
