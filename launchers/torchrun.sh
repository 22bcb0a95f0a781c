#!/usr/bin/env bash
# Train on several nodes with torchrun: call this on every node, with the environment activated.
#
#   launchers/torchrun.sh CONFIG [section.key=value ...]
#
# Settings, to change here or in the environment; all but NODE_RANK are the same on all nodes:
#   NODES        number of nodes
#   PER_NODE     processes per node; gpu for one per GPU
#   MASTER_ADDR  name or address of the first node, as the others see it
#   MASTER_PORT  a free port there, open to the others
#   NODE_RANK    number of this node: 0, 1, ... If empty, torchrun numbers the nodes as they arrive
#                (c10d); the others must then be able to resolve the host name of each node
#
# Under Slurm, `srun --ntasks-per-node=1 launchers/torchrun.sh ...` needs none of them.
set -euo pipefail

job=${SLURM_JOB_ID:-0}
NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
PER_NODE=${PER_NODE:-gpu}
if [[ $NODES != 1 && -z ${MASTER_ADDR:-${SLURM_LAUNCH_NODE_IPADDR:-}} ]]; then
  printf 'torchrun.sh: NODES=%s needs MASTER_ADDR, the first node as the others see it\n' "$NODES" >&2
  exit 2
fi
MASTER_ADDR=${MASTER_ADDR:-${SLURM_LAUNCH_NODE_IPADDR:-127.0.0.1}}
MASTER_PORT=${MASTER_PORT:-$((job ? 20000 + job % 20000 : 29500))}
NODE_RANK=${NODE_RANK-${SLURM_NODEID:-}}

if [[ -n $NODE_RANK ]]; then
  meeting=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id dinoscale)
fi
# Every rank opens several connections to torchrun on the first node. If the limit of open files
# cannot be raised, the doctor reports the number needed.
soft=$(ulimit -Sn) most=$(ulimit -Hn)
[[ $most != unlimited ]] && ((most < 65536)) || most=65536
[[ $soft == unlimited ]] || ((soft >= most)) || ulimit -Sn "$most" || true
exec torchrun --nnodes "$NODES" --nproc-per-node "$PER_NODE" "${meeting[@]}" \
  -m dinoscale train "$@"
