#!/usr/bin/env bash
# Install what the hosts of these tests are made of, where it is missing: Debian or Ubuntu, as root.
#
#   tests/multinode/install.sh [--slurm]
#
# Nothing to do, nothing done. Exit code 3 and one line on stderr: this machine does not permit it.
# Ends within seven minutes, whatever the network does; a call beside another one waits for it first.
set -euo pipefail

cannot() {
  printf 'install: %s\n' "$*" >&2
  exit 3
}

# Two installations at once fail: apt waits for dpkg, but not for the lists of another apt. The second
# finds what the first has installed. What these start, services among them, does not hold the lock.
exec 9>"${TMPDIR:-/tmp}/dinoscale-install-$EUID.lock"
if command -v flock >/dev/null; then
  flock --timeout 420 9 || cannot "another installation has not ended"
fi

missing=()
need() { # PROGRAM PACKAGE
  command -v "$1" >/dev/null || missing+=("$2")
}
PATH=$PATH:/usr/sbin:/sbin
need ip iproute2
need unshare util-linux
need hostname hostname
need ssh openssh-client
need sshd openssh-server
need pdsh pdsh
need mpirun openmpi-bin
if [[ ${1:-} == --slurm ]]; then
  need slurmctld slurmctld
  need slurmd slurmd
  need srun slurm-client
  need munged munge
fi
((${#missing[@]})) || exit 0

((EUID == 0)) || cannot "not root, and these packages are missing: ${missing[*]}"
command -v apt-get >/dev/null || cannot "no apt-get here, and these packages are missing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=60 -o Acquire::http::Timeout=20 -o Acquire::Retries=1)
timeout --kill-after=5 100 "${apt[@]}" update >&2 9>&- || true # the lists at hand may do
timeout --kill-after=5 300 "${apt[@]}" install --yes --no-install-recommends "${missing[@]}" >&2 9>&- ||
  cannot "apt-get could not install ${missing[*]}"
