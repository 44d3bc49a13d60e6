#!/bin/bash
# node.sh ROOT LAUNCHER LOGS ARGUMENTS...: on each node, started by srun: one launcher and its ranks of `vqdist
# ARGUMENTS`. What differs between nodes, such as SLURM_NODEID, is read here and not in the batch script.
#
# A signal that asks for the end of training goes to the ranks and past the launcher, which would limit their time, die
# of SIGUSR1, and of a second SIGTERM, too. The batch script sends it again until they have ended: the ranks ignore it
# while Python starts.
trap '' USR1 TERM # until there is something to pass a signal on to: it comes again
set -u
root=$1 launcher=$2 logs=$3/node_$SLURM_NODEID
export VQDIST_STOP_DIR=$3 # where ranks that are stopped leave their records
signal_came=$3/told_node_$SLURM_NODEID
shift 3
# shellcheck source=launch/slurm/functions.sh
. "$root/launch/slurm/functions.sh"

signals=0 launched='' command_of_vqdist=$1

stop() {
  local ranks
  signals=$((signals + 1))
  [ -n "$launched" ] || return
  : >"$signal_came"
  if [ "$command_of_vqdist" = train ]; then
    read -ra ranks < <(cat /proc/"$launched"/task/*/children | tr '\n' ' ')
    kill -USR1 "${ranks[@]}"
  else
    kill -TERM "$launched" # nothing is to be saved
  fi 2>/dev/null
}
trap stop USR1 TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ "${#nodes[@]}" -gt 1 ]; then
  VQDIST_PEER=$(address_of "${nodes[$((SLURM_NODEID == 0 ? 1 : 0))]}")
  export VQDIST_PEER
fi
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"

case $launcher in
accelerate)
  command=(accelerate launch --config_file "${ACCELERATE_CONFIG:-$root/accelerate_configs/multi_node.yaml}"
    --num_machines "${#nodes[@]}" --machine_rank "$SLURM_NODEID"
    --num_processes $((${#nodes[@]} * VQDIST_PROCESSES))
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --tee 3 --log_dir "$logs")
  ;;
torchrun)
  command=(torchrun --nnodes "${#nodes[@]}" --node-rank "$SLURM_NODEID" --nproc-per-node "$VQDIST_PROCESSES"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --tee 3 --log-dir "$logs")
  ;;
esac

if [ "$command_of_vqdist" = train ]; then
  # torchrun's list of signals that it handles, accelerate's too: without SIGTERM
  (trap '' USR1 TERM && PET_SIGNALS_TO_HANDLE=SIGINT exec "${command[@]}" -m vqdist "$@") &
else
  "${command[@]}" -m vqdist "$@" &
fi
launched=$!
wait_for "$launched"
