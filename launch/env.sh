# shellcheck shell=bash
# What the processes of one node need to find the others, to end in time and to share its cores. Sourced on each node
# before the launcher (launch/slurm/node.sh does it). Only what is not set yet is set: export a variable to decide it
# yourself. Reads, both optional:
#   VQDIST_PEER        name or address of another node of the job
#   VQDIST_PROCESSES   ranks on this node

# The interface through which a packet to a node leaves; empty where it cannot be told.
interface_to() {
  local address
  address=$(getent ahosts "$1" | awk '{print $1; exit}')
  [ -z "$address" ] || ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}

if [ -n "${VQDIST_PEER:-}" ]; then
  VQDIST_INTERFACE=$(interface_to "$VQDIST_PEER")
  if [ -n "$VQDIST_INTERFACE" ]; then
    # Gloo offers the others the address that this host's own name has: often 127.0.0.1 or 127.0.1.1, which nobody reaches.
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$VQDIST_INTERFACE}"
    # NCCL takes the first interface it finds, be it a bridge of containers. InfiniBand verbs do not depend on this.
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$VQDIST_INTERFACE}"
  fi
  unset VQDIST_INTERFACE
fi

# Seconds between torchrun's SIGTERM to its processes and SIGKILL. Its own 30 are too few for a large checkpoint; Slurm
# is asked for 120.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"

# NCCL says nothing about what went wrong by default. How long a rank waits for another is --dist_timeout.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# torchrun gives each process one thread, plain Python all cores to each: here the cores of the job are shared out.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  OMP_NUM_THREADS=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / ${VQDIST_PROCESSES:-1}))
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi

# What was printed is in the log when a process is killed.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
