#!/usr/bin/env bash
# torchrun.sh [--dry-run] -- COMMAND…: this node's ranks of a run on one or many nodes.
#
# Settings, from the environment (Slurm's and Kubernetes' launchers set them):
#   KVCAT_RUN_DIR         the run's folder, shared by all nodes (required)
#   KVCAT_PROCS_PER_NODE  ranks on each node (1)
#   KVCAT_NODES           (1), KVCAT_NODE_RANK (0)
#   KVCAT_MASTER_ADDR     address of node 0 (127.0.0.1), KVCAT_MASTER_PORT (29500)
#   KVCAT_ATTEMPT         a word for this start, the same on all nodes and new each time (required with more than one node)
#   KVCAT_INTERFACE       network interface for NCCL and gloo (theirs to choose)
#   KVCAT_MAX_STALLED     restarts without a new checkpoint that are allowed (3)
#   KVCAT_SETUP           shell code to run first, such as `source /shared/venv/bin/activate`
#
# SIGTERM, SIGINT and SIGUSR1 ask the ranks to save and stop; a second SIGINT ends them at once. Exit code: 0 finished,
# 75 stopped and saved (start it again to go on), others: failed.
set -uo pipefail
# shellcheck source=common.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

dry_run=
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; usage: torchrun.sh [--dry-run] -- COMMAND…" ;;
  esac
  shift
done
(($#)) || die "no command; usage: torchrun.sh [--dry-run] -- COMMAND…"

[[ -n ${KVCAT_RUN_DIR:-} ]] || die "KVCAT_RUN_DIR is not set: name the run's folder, shared by all nodes"
: "${KVCAT_NODES:=1}" "${KVCAT_PROCS_PER_NODE:=1}" "${KVCAT_MASTER_ADDR:=127.0.0.1}" "${KVCAT_MASTER_PORT:=29500}"
: "${KVCAT_NODE_RANK:=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-0}}}" "${KVCAT_MAX_STALLED:=3}"
require_variables KVCAT_{RUN_DIR,NODES,PROCS_PER_NODE,NODE_RANK,MASTER_ADDR,MASTER_PORT,MAX_STALLED,ATTEMPT,JOB,INTERFACE,NODE_NAME}
# 08 is 8, and not an octal number.
KVCAT_NODES=$((10#$KVCAT_NODES)) KVCAT_NODE_RANK=$((10#$KVCAT_NODE_RANK)) KVCAT_PROCS_PER_NODE=$((10#$KVCAT_PROCS_PER_NODE))
KVCAT_MAX_STALLED=$((10#$KVCAT_MAX_STALLED))
((KVCAT_NODE_RANK < KVCAT_NODES)) || die "KVCAT_NODE_RANK=$KVCAT_NODE_RANK: nodes are counted from 0, and there are $KVCAT_NODES"
((KVCAT_NODES == 1)) || [[ $KVCAT_MASTER_ADDR != 127.0.0.1 && $KVCAT_MASTER_ADDR != localhost ]] \
  || die "KVCAT_MASTER_ADDR=$KVCAT_MASTER_ADDR: other nodes cannot reach that; give node 0's address"
((KVCAT_NODES == 1)) || [[ -n ${KVCAT_ATTEMPT_DIR:-}${KVCAT_ATTEMPT:-} ]] \
  || die "KVCAT_ATTEMPT is not set: give all nodes the same word, a new one for each start"

if [[ -n ${KVCAT_SETUP:-} ]]; then
  set +u # activation scripts use variables that may not be set
  eval "$KVCAT_SETUP" || die "KVCAT_SETUP failed on $(node_name): $KVCAT_SETUP"
  set -u
fi

# Settings that help everywhere and that the user may overrule.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's tensor parallelism overlaps only so
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The last collectives of every rank, written when one times out: they name the rank that did not come (docs/cluster.md).
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
if [[ -n ${KVCAT_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=$KVCAT_INTERFACE GLOO_SOCKET_IFNAME=$KVCAT_INTERFACE
fi

command=(torchrun --nnodes "$KVCAT_NODES" --nproc-per-node "$KVCAT_PROCS_PER_NODE" --node-rank "$KVCAT_NODE_RANK"
  --master-addr "$KVCAT_MASTER_ADDR" --master-port "$KVCAT_MASTER_PORT" --max-restarts 0 --monitor-interval 1
  --signals-to-handle SIGQUIT --no-python "$here/rank.sh" "$@")
if [[ -n $dry_run ]]; then
  env | grep -E '^(KVCAT_(RUN_DIR|INTERFACE|SETUP)|CUDA_DEVICE|OMP_|NCCL_|GLOO_|TORCH_)' | sort
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

if [[ -z ${KVCAT_ATTEMPT_DIR:-} ]]; then # otherwise the batch script has begun it
  if ((KVCAT_NODE_RANK == 0)); then
    begin_attempt "${KVCAT_ATTEMPT:-$(next_attempt)}" "${KVCAT_JOB:-local}" "$(node_name)" || exit 1
  else
    open_attempt "$KVCAT_ATTEMPT"
    mkdir -p "$KVCAT_ATTEMPT_DIR/$RUN_EXITS" "$KVCAT_ATTEMPT_DIR/$RUN_NCCL"
  fi
fi
export KVCAT_RUN_DIR KVCAT_STOP_FILE TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$KVCAT_ATTEMPT_DIR/$RUN_NCCL/trace-

# torchrun ends its ranks on SIGTERM and dies of SIGUSR1, and with it goes the store that a save needs. So it ignores both,
# as its ranks do until they have handlers of their own; they are asked by the stop file. SIGQUIT is left to end it all.
(
  trap '' TERM USR1 INT HUP
  exec "${command[@]}"
) &
torchrun=$!
trap 'ask_to_stop "$(node_name) got SIGTERM"' TERM
trap 'ask_to_stop "$(node_name) got SIGUSR1"' USR1
trap '[[ -e $KVCAT_STOP_FILE ]] && kill -QUIT $torchrun; ask_to_stop "$(node_name) was interrupted (again to end at once)"' INT
# A stop file that is older than a rank counts as another run's: one that came while ranks were starting is kept fresh.
(
  trap - TERM USR1 INT
  while sleep 1; do touch -c "$KVCAT_STOP_FILE"; done
) &
fresh=$!
wait_for "$torchrun"
code=$?
kill "$fresh"

first=$((KVCAT_NODE_RANK * KVCAT_PROCS_PER_NODE))
result=$(verdict "$first" "$((first + KVCAT_PROCS_PER_NODE - 1))")
write_record "$KVCAT_ATTEMPT_DIR/$RUN_EXITS/node-$(node_name)" "$result" "$code"
case $result in
  done) exit 0 ;;
  again) say "$(node_name): stopped and saved; start again to go on"; exit "$KVCAT_EXIT_AGAIN" ;;
esac
[[ -n ${SLURM_JOB_ID:-} ]] || explain_failure # under Slurm the batch script looks at all nodes
((code)) && exit "$code"
exit 1
