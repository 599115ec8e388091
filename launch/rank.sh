#!/usr/bin/env bash
# rank.sh COMMAND…: one rank, as torchrun starts it. Its output goes to a file of its own (rank 0's to the job's too), and how
# it ended is recorded, so that a failure can be told with its node.
set -uo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2153 # torchrun sets RANK
require RANK "$RANK" rank
name=$(printf 'rank-%04d' "$RANK")
log=$KVCAT_ATTEMPT_DIR/$name.$(node_name).log
if ((RANK == 0)); then
  "$@" > >(exec tee -a "$log") 2>&1
else
  "$@" >> "$log" 2>&1
fi
code=$?
write_record "$KVCAT_ATTEMPT_DIR/$RUN_EXITS/$name" "$code" "$(node_name)" "$(date +%s%N)" "$log"

# For torchrun, a rank that stopped as asked has succeeded: it must not end the others while they save.
((code == KVCAT_EXIT_AGAIN)) && exit 0
exit "$code"
