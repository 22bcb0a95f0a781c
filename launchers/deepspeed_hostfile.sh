#!/usr/bin/env bash
# Train on the nodes of a hostfile with DeepSpeed's own launcher.
#
#   launchers/deepspeed_hostfile.sh CONFIG [section.key=value ...]
#
# Call it on one node, in a directory that all nodes share, with the environment activated. Every
# node is checked first (versions, clock, GPUs, run_dir, port); nothing is started if one is not fit.
#
# What to change, here or in the environment:
#   HOSTFILE     the nodes, one a line: see hostfile.example
#   LAUNCHER     what reaches them: pdsh (over ssh) or openmpi (mpirun)
#   SSH_OPTIONS  for every ssh, as '-p 2222 -i KEY'; empty: as `ssh NODE` does it
#   MASTER_ADDR  of the first node, where its name in the hostfile will not do for the others
#   MASTER_PORT  a free port there
#   NODE_RANK    set on every node, 0 on the first: each starts its own processes, and no ssh is
#                needed; call the script on all nodes then
#
# pdsh hands on PYTHON*, and NCCL* where there are GPUs; all other variables for the nodes go into
# a file .deepspeed_env in this directory: see deepspeed_env.example.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hostfile}
LAUNCHER=${LAUNCHER:-pdsh}
SSH_OPTIONS=${SSH_OPTIONS:-}
MASTER_PORT=${MASTER_PORT:-29500}

how=(--hostfile "$HOSTFILE" --master-port "$MASTER_PORT")
[[ -z ${MASTER_ADDR:-} ]] || how+=(--master-addr "$MASTER_ADDR")
if [[ -n ${NODE_RANK:-} ]]; then
  how+=(--node-rank "$NODE_RANK")
else
  how+=(--launcher "$LAUNCHER" "--ssh-options=$SSH_OPTIONS")
fi
exec python -m dinoscale launch "${how[@]}" "$@"
