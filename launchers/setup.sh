#!/usr/bin/env bash
# Create a virtual environment with dinoscale and its test tools, versions as in constraints.txt.
#
#   launchers/setup.sh [VENV_DIR]
#
# VENV_DIR: the argument, else the variable VENV_DIR, else .venv; relative to the checkout root.
# PYTHON: the interpreter to create it with, 3.10 to 3.13; default python3.
# Does nothing if everything is installed. A new or upgraded environment is built in
# VENV_DIR.setup-new and replaces the old one once complete: a failure, for instance without a
# network, leaves the old one unchanged.
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
# One line, "ORIGIN STAMP VENV": ORIGIN is `created` (by us, so we may replace it) or `adopted` (it
# existed, so we install into it); STAMP is the hash of what was installed, or `unfinished`.
state=$venv/.dinoscale-setup
new=$venv.setup-new old=$venv.setup-old

stamp() { # DIR: hash of what the install depends on; the editable install points at the checkout
  {
    cat -- "$root/pyproject.toml" "$root/launchers/constraints.txt"
    "$1/bin/python" -V
    printf '%s\n' "$root"
  } 2>/dev/null | sha256sum | cut -c 1-64
}

read_state() {
  origin='' installed='' where=''
  if [[ -s $state ]]; then read -r origin installed where <"$state" || true; fi
}

is_done() {
  read_state
  [[ -x $venv/bin/python && $where == "$venv" ]] && [[ $installed == "$(stamp "$venv")" ]]
}

say_done() { say "up to date: $venv"; }

find_python() { # sets `python` to the base interpreter: python3 may be in a venv, even in this one
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

has_pip() { "$1/bin/python" -c 'import pip' &>/dev/null; }

build() { # in $new: an updated copy of a working environment, or a new one
  rm -rf -- "$new"
  if [[ $origin == created && $installed != unfinished && $where == "$venv" ]] && has_pip "$venv"; then
    say "updating a copy of $venv"
    cp -a -- "$venv" "$new" || die "$new cannot be written; see above"
  else
    find_python
    say "creating $venv with $("$python" -V)"
    "$python" -m venv "$new" || die "$python -m venv failed; see above"
  fi
  install "$new"
}

install() { # into the environment DIR
  local quiet=(--quiet)
  [[ ! -t 1 ]] || quiet=()
  has_pip "$1" || "$1/bin/python" -m ensurepip >/dev/null ||
    die "$1 has no pip and its Python cannot install it; install pip, or choose another VENV_DIR"
  say "installing dinoscale with its requirements; the first time takes minutes, torch is large"
  cd -- "$root"
  "$1/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
    --constraint launchers/constraints.txt --editable '.[test]' || die "pip failed; see above"
}

settle() { # replaces $new by $venv in the scripts, which hold the path
  local script from to
  from=$(printf '%s' "$new" | sed 's/[][\.*^$|]/\\&/g')
  to=$(printf '%s' "$venv" | sed 's/[\&|]/\\&/g')
  for script in "$new"/bin/*; do
    if [[ -f $script && ! -L $script ]] && grep -qIF -- "$new" "$script"; then
      sed -i "s|$from|$to|g" -- "$script"
    fi
  done
}

fix_shebangs() { # of DIR: pip writes python's path into the first line, where a space breaks it
  local script first
  [[ $venv == *[[:space:]]* ]] || return 0
  for script in "$1"/bin/*; do
    [[ -f $script ]] || continue
    IFS= read -r first <"$script" || continue
    [[ $first == "#!$venv/bin/python"* ]] || continue
    { # the shell executes line 2; Python reads lines 2 and 3 as a string
      printf '%s\n' '#!/bin/sh' "'''exec' \"$venv/bin/python\" \"\$0\" \"\$@\"" "' '''"
      tail -n +2 -- "$script"
    } >"$1/.script"
    cat -- "$1/.script" >"$script" # keeps the mode
    rm -- "$1/.script"
  done
}

# An earlier call may have been killed between the two moves at the end.
[[ -e $venv || ! -e $old ]] || mv -T -- "$old" "$venv"
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
if [[ $origin == adopted || (-z $origin && -e $venv/pyvenv.cfg) ]]; then
  [[ -n $origin ]] || say "using the virtual environment that is already at $venv"
  printf 'adopted unfinished %s\n' "$venv" >"$state"
  install "$venv"
  fix_shebangs "$venv"
  printf 'adopted %s %s\n' "$(stamp "$venv")" "$venv" >"$state"
else
  (build) || {
    rm -rf -- "$new"
    die "nothing was installed; $venv is unchanged"
  }
  settle
  fix_shebangs "$new"
  printf 'created %s %s\n' "$(stamp "$new")" "$venv" >"$new/${state##*/}"
  rm -rf -- "$old"
  mv -T -- "$venv" "$old" || {
    rm -rf -- "$new"
    die "$venv cannot be replaced, see above; if it is a mount, choose a folder in it as VENV_DIR"
  }
  mv -T -- "$new" "$venv"
  rm -rf -- "$old"
fi
say "done: $venv"
