#!/usr/bin/env bash
# Train on the nodes of a hostfile with DeepSpeed's own launcher.
#
#   launchers/deepspeed_hostfile.sh CONFIG [section.key=value ...]
#
# Call it on one node, in a directory that all nodes share, with the environment activated. Every
# node is checked first (versions, clock, GPUs, run_dir, port); if one has a problem, none starts.
#
# Settings, to change here or in the environment:
#   HOSTFILE     file with the nodes, one per line: see hostfile.example
#   LAUNCHER     program that reaches them: pdsh (over ssh) or openmpi (mpirun)
#   SSH_OPTIONS  for every ssh, such as '-p 2222 -i KEY'; empty for the defaults of `ssh NODE`
#   MASTER_ADDR  address of the first node, if the others cannot use its name in the hostfile
#   MASTER_PORT  a free port on the first node
#   NODE_RANK    number of this node, 0 for the first: call the script on every node with its own
#                number; each starts its own processes, and needs no ssh
#
# DeepSpeed passes on PYTHON*, and NCCL* if there are GPUs; all other variables for the nodes go
# into a file .deepspeed_env in this directory: see deepspeed_env.example.
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
