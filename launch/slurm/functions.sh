# What the sbatch files share, and node.sh. Sourced; needs `root`, the folder of the repository.
# shellcheck shell=bash disable=SC2154

EXIT_REQUEUE=75 # of vqdist/stopping.py: the same command may be started again

die() {
  echo "vqdist: error: $*" >&2
  exit 2
}

# Wait for a child, however many trapped signals come meanwhile, and return its exit code.
wait_for() {
  local before code
  while :; do
    before=${signals:-0}
    wait "$1"
    code=$?
    # a `wait` that a signal ended says nothing of the child; of one that has ended the shell still knows the code
    [ "$before" = "${signals:-0}" ] && return "$code"
  done
}

# What other nodes call a node: its name, or where that does not resolve what Slurm itself calls.
address_of() {
  if getent hosts "$1" >/dev/null; then
    echo "$1"
  else
    scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# The job as scontrol and squeue want it: one task of an array, not all of them.
job() {
  echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" | grep . || echo "$SLURM_JOB_ID"
}

use_environment() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is a script for Slurm; start it with sbatch"
  [ -d "$root/.venv" ] && PATH=$root/.venv/bin:$PATH
  command -v vqdist >/dev/null || die "vqdist is not on the PATH; activate its environment before sbatch, or 'make install'"
}

# run_on_nodes LAUNCHER SIGNAL ARGUMENTS...: one LAUNCHER (accelerate, torchrun) on each node, which together start
# `vqdist ARGUMENTS`. When the batch shell gets USR1 or TERM, srun gets SIGNAL: it passes USR1 on, and of TERM it kills
# the ranks at once. Returns srun's exit code; afterwards `told` says whether there was a signal, and `logs` is the
# folder with a log of each rank, a record of each that was stopped and a file told_node_N of each node that got a
# signal.
run_on_nodes() {
  local launcher=$1 nodes
  answer=$2 # for the trap, also after this function
  shift 2
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # all nodes are asked for as many ranks: the GPUs of the first, what --ntasks-per-node says, or one
  export VQDIST_PROCESSES=${VQDIST_PROCESSES:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  MASTER_ADDR=$(address_of "${nodes[0]}")
  # of the job, so that two on one node do not meet; below the ports that the kernel gives to clients
  MASTER_PORT=$((15000 + SLURM_JOB_ID % 16000))
  export MASTER_ADDR MASTER_PORT
  # shellcheck disable=SC2034 # told is for the sbatch files
  signals=0 told='' step=''
  trap 'signals=$((signals + 1)); [ -n "$told" ] || [ -z "$step" ] || tell_step "$answer"; told=yes' USR1 TERM
  logs=${VQDIST_LOGS:-runs/slurm}/$SLURM_JOB_ID/start_${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs" || die "the folder of the logs, $logs, cannot be made; set VQDIST_LOGS"
  echo "job $(job), start ${SLURM_RESTART_COUNT:-0}: ${#nodes[@]} nodes x $VQDIST_PROCESSES processes, rendezvous" \
    "$MASTER_ADDR:$MASTER_PORT, logs $logs"
  # A node whose ranks ended is no reason to kill the others at once: rank 0 may still be writing. --cpu-bind: one task
  # is one launcher, whose ranks use all cores of the job.
  srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
    --wait=100 --label bash "$root/launch/slurm/node.sh" "$root" "$launcher" "$logs" "$@" &
  step=$!
  [ -z "$told" ] || tell_step "$answer" # a signal came before there was anybody to tell
  wait_for "$step"
}

# Send the step a signal until it ends: srun forgets one that comes before it has started its tasks.
tell_step() {
  (
    trap '' USR1 TERM
    while kill -s "$1" "$step"; do sleep 5; done
  ) >/dev/null 2>&1 &
}

# Put the job back into the queue, unless Slurm itself is doing so (scontrol requeue) or ends it (scancel).
requeue() {
  local state
  state=$(squeue --noheader --jobs "$(job)" --format %T)
  if [ "$state" = RUNNING ]; then
    echo "job $(job): back into the queue"
    scontrol requeue "$(job)" || echo "job $(job) cannot be requeued; submit the same command to go on" >&2
  fi
  exit "$EXIT_REQUEUE"
}

# has_field FILE FIELD VALUE: whether a record that a stopped rank left says so; it has a line for each field.
has_field() {
  grep -qsE "^ *\"$2\": $3,?\$" "$1"
}

# finish_training CODE: requeue what was told to stop and lost nothing; else end with the code. torchrun exits with 1
# whatever its processes exit with, so the records of the ranks count (`record_stop` in vqdist/stopping.py).
finish_training() {
  local record
  for record in "$logs"/stopped_rank_*.json; do
    if [ "$1" -eq 0 ] || ! has_field "$record" exit_code "$EXIT_REQUEUE"; then continue; fi
    # A rank that was still starting may have got its SIGTERM from the launcher, because another rank had failed.
    if has_field "$record" saved true || [ -n "$told" ] || compgen -G "$logs/told_node_*" >/dev/null; then
      requeue
    fi
  done
  # of the signal itself dies only what has not started anything yet
  case $told$1 in yes138 | yes143) requeue ;; esac
  exit "$1"
}
