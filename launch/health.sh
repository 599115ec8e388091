#!/usr/bin/env bash
# health.sh: is this node fit to take part? Run on every node before a job starts; what is wrong is printed with the node's name.
#
# Settings: KVCAT_RUN_DIR, KVCAT_ATTEMPT_DIR, KVCAT_GPUS_PER_NODE (0), KVCAT_MIN_DISK_GB (free in the run's folder; 20),
# KVCAT_MASTER_ADDR, KVCAT_SETUP, KVCAT_HEALTH_COMMAND (a check of the user's own; its exit code counts: 69 says that this node
# is fit, and others do not answer). What that command said is kept in KVCAT_ATTEMPT_DIR/health/NODE.log.
set -uo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_variables KVCAT_{RUN_DIR,GPUS_PER_NODE,MIN_DISK_GB,MASTER_ADDR,MASTER_PORT,INTERFACE,NODE_NAME}
node=$(node_name)
bad=0 alone=0
wrong() {
  printf 'kvcat launch: node %s: %s\n' "$node" "$*"
  bad=1
}

if [[ -n ${KVCAT_SETUP:-} ]]; then
  set +u
  eval "$KVCAT_SETUP" || wrong "the set-up failed: $KVCAT_SETUP"
  set -u
fi

probe=$KVCAT_ATTEMPT_DIR/$RUN_HEALTH/$node.probe
if ! { echo "$node" > "$probe" && [[ $(< "$probe") == "$node" ]]; } 2> /dev/null; then
  wrong "cannot write to $KVCAT_ATTEMPT_DIR (is it the same shared folder on every node?)"
fi
rm -f "$probe"

free=$(df -Pk "$KVCAT_RUN_DIR" 2> /dev/null | awk 'NR == 2 { print int($4 / 1e6) }')
((${free:-0} >= ${KVCAT_MIN_DISK_GB:-20})) \
  || wrong "${free:-no} GB free in $KVCAT_RUN_DIR, ${KVCAT_MIN_DISK_GB:-20} wanted (--min-disk-gb)"

command -v torchrun > /dev/null || wrong "torchrun is not on PATH (--setup 'source …/bin/activate', or --image)"
getent hosts "$KVCAT_MASTER_ADDR" > /dev/null || wrong "the name of node 0, $KVCAT_MASTER_ADDR, does not resolve"

if ((${KVCAT_GPUS_PER_NODE:-0} > 0)); then
  gpus=$(timeout 60 nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | wc -l)
  ((gpus >= KVCAT_GPUS_PER_NODE)) || wrong "nvidia-smi shows $gpus GPU(s), $KVCAT_GPUS_PER_NODE wanted"
  shared=$(df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 { print int($2 / 1e6) }')
  ((${shared:-0} >= 8)) || wrong "/dev/shm has ${shared:-0} GB; NCCL and data loaders want 8 or more"
fi

if [[ -n ${KVCAT_HEALTH_COMMAND:-} ]]; then
  # A check may talk to the other nodes (kvcat train doctor does): where node 0 is, on a port that training does not use.
  export MASTER_ADDR=$KVCAT_MASTER_ADDR MASTER_PORT=$((${KVCAT_MASTER_PORT:-29500} + 1))
  [[ -z ${KVCAT_INTERFACE:-} ]] || export NCCL_SOCKET_IFNAME=$KVCAT_INTERFACE GLOO_SOCKET_IFNAME=$KVCAT_INTERFACE
  output=$(bash -c "$KVCAT_HEALTH_COMMAND" 2>&1)
  code=$?
  log=$KVCAT_ATTEMPT_DIR/$RUN_HEALTH/$node.log
  { printf '%s\n' "$output" > "$log"; } 2> /dev/null
  # kvcat train doctor marks what is wrong; of another command, the end of what it said.
  shown=$(grep -w BROKEN <<< "$output") || shown=$(tail -n 15 <<< "$output")
  case $code in
    0) ;;
    "$KVCAT_EXIT_PEER_DIED")
      alone=1
      say "node $node: others do not answer: $shown"
      ;;
    *) wrong "check failed ($KVCAT_HEALTH_COMMAND; all it said: $log), saying: $shown" ;;
  esac
fi

result=ok
((!alone)) || result=alone
((!bad)) || result=bad
{ write_record "$KVCAT_ATTEMPT_DIR/$RUN_HEALTH/$node" "$result"; } 2> /dev/null
[[ $result == ok ]]
