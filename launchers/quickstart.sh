#!/usr/bin/env bash
# Install (setup.sh), then pre-train a small model on synthetic images and score it.
#
#   launchers/quickstart.sh [OPTION ...]     options: see `dinoscale quickstart --help`
#
# VENV_DIR: as in setup.sh. The last line on stdout is the result as JSON; the rest is on stderr.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${VENV_DIR:-.venv}
[[ $venv == /* ]] || venv=$root/$venv

"$root/launchers/setup.sh" "$venv" >&2
export PATH=$venv/bin:$PATH # the command starts `deepspeed` by name
exec "$venv/bin/dinoscale" quickstart "$@"
