#!/usr/bin/env bash
# What the launch scripts share: messages, attempts, and the verdict on how an attempt ended. Sourced, never run.
#
# A run keeps its launch state in KVCAT_RUN_DIR/launch (names: run_names.sh, from kvcat_nemo/runs/layout.py):
#   submitted          touched at every submission; restarts are counted from there
#   attempts.tsv       one line per attempt: name, time, job, nodes, complete checkpoints it started from
#   attempt-NAME/      rank-0000.NODE.log …; exit/rank-0000 (code, node, time, log); exit/node-NODE; health/NODE (ok, alone or bad) and NODE.log; stop

# Folder of these scripts and their tables.
KVCAT_HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=run_names.sh
source "$KVCAT_HERE/run_names.sh"

say() { printf 'kvcat launch: %s\n' "$*"; }

die() {
  printf 'kvcat launch: error: %s\n' "$*" >&2
  exit 2
}

# Slurm's name, the Kubernetes node's, or the host's own.
node_name() { printf '%s' "${SLURMD_NODENAME:-${KVCAT_NODE_NAME:-$(uname -n)}}"; }

# require NAME VALUE [OPTION]: VALUE is of the form that values.tsv gives OPTION; NAME is what a message calls it (--OPTION).
# Bash evaluates what stands between (( )), subscripts included: nothing that has not been here gets there.
require() {
  local LC_ALL=C shown value=$2 option=${3:-${1#--}} name _ pattern least most example what
  shown=$value
  [[ $value != *[[:cntrl:]]* ]] || printf -v shown '%q' "$value" # one line
  while IFS=$'\t' read -r name _ pattern least most example what; do
    [[ $name == "$option" ]] || continue
    if [[ $pattern == - ]]; then
      [[ ${value//[$'\n\t']/} != *[[:cntrl:]]* ]] \
        || die "$1=$shown: a control character would change the script; give $what, such as $example"
      return 0
    fi
    [[ $value != *[[:cntrl:]]* ]] \
      || die "$1=$shown: a line break or another control character would change the script; give $what, such as $example"
    [[ $value =~ ^($pattern)$ ]] || die "$1=$shown: give $what, such as $example"
    [[ $least == - ]] || ((10#$value >= least)) || die "$1=$shown: give $what, such as $example"
    [[ $most == - ]] || ((10#$value <= most)) || die "$1=$shown: give $what, such as $example"
    return 0
  done < "$KVCAT_HERE/values.tsv"
  die "$1: launch/values.tsv has no option $option"
}

# require_variables NAME…: variables of the environment by which options are handed on; those that are not set pass.
require_variables() {
  local option variable _ name
  while IFS=$'\t' read -r option variable _; do
    for name in "$@"; do
      [[ $variable != "$name" || -z ${!name:-} ]] || require "$name" "${!name}" "$option"
    done
  done < "$KVCAT_HERE/values.tsv"
}

# is_own_variable NAME: one by which an option is handed on, which --env may not set behind its back.
is_own_variable() { [[ $1 == KVCAT_* ]] && cut -f 2 "$KVCAT_HERE/values.tsv" | grep -qxF -- "$1"; }

# secrets_table: the file that says what a credential looks like; it lies in the package, beside what reads it in Python.
secrets_table() {
  local file
  for file in "$KVCAT_HERE"/../{kvcat_nemo/,}common/secrets.tsv; do
    [[ ! -f $file ]] || { printf '%s' "$file"; return; }
  done
  die "common/secrets.tsv is not beside $KVCAT_HERE: run submit.sh from the checkout or the installed package"
}

# what_secret NAME VALUE: what kind of credential a variable with this value would tell, on standard output; fails when none.
# As kvcat_nemo/common/redact.py has it, from the same table, secrets.tsv.
what_secret() (
  LC_ALL=C name=$1 value=$2
  table=$(secrets_table) || exit 0 # without the table, nothing passes
  [[ -n $value ]] || exit 1
  # cut_plain TEXT: without what only looks like a credential.
  cut_plain() {
    text=$1
    while IFS=$'\t' read -r kind case keep pattern what; do
      [[ $kind == plain ]] || continue
      compare "$case" "$keep" "$pattern"
      while [[ $text =~ $expression ]]; do text=${text/"${BASH_REMATCH[0]}"/"${BASH_REMATCH[1]}!"}; done
    done < "$table"
  }
  # compare CASE KEEP PATTERN: how the next =~ compares, and with what.
  compare() {
    if [[ $1 == i ]]; then shopt -s nocasematch; else shopt -u nocasematch; fi
    expression="(${2#-})($3)"
  }
  secret_name() {
    cut_plain "$1"
    while IFS=$'\t' read -r kind case keep pattern what; do
      [[ $kind == variable ]] || continue
      compare "$case" "$keep" "$pattern"
      [[ ! $text =~ $expression ]] || return 0
    done < "$table"
    return 1
  }
  ! secret_name "$name" || { printf '%s' "$what"; exit 0; }
  cut_plain "$value"
  while IFS=$'\t' read -r kind case keep pattern what; do
    [[ $kind == text ]] || continue
    compare "$case" "$keep" "$pattern"
    [[ ! $text =~ $expression ]] || { printf '%s' "$what"; exit 0; }
  done < "$table"
  shopt -u nocasematch
  while IFS= read -r name; do
    held=${!name:-}
    # The path of a file of secrets is none, and a short value is no secret worth the name.
    [[ ${#held} -ge 6 && ! -e $held && $value == *"$held"* ]] || continue
    secret_name "$name" || continue
    printf 'value of a credential in the environment'
    exit 0
  done < <(compgen -e)
  exit 1
)

looks_like_a_secret() { what_secret "$1" "$2" > /dev/null; }

# refuse_secret SHOWN VALUE [NAME]: what is written to a job's files holds no credential. The message does not show it.
refuse_secret() {
  local what
  if what=$(what_secret "${3:-}" "$2"); then
    die "$1=…: that looks like a secret ($what); it would be written to a file, or shown to other users. Export a variable in the" \
      "shell that submits and give its name alone (--env NAME), or read it from a file that only you can read"
  fi
}

# Names of the complete checkpoints, one a line: what kvcat_nemo.runs calls complete. Where no python with it is at hand (a
# batch host beside a container), those that have a manifest, are not being written and not set aside; sizes are not compared then.
complete_checkpoints() {
  local folder root checkpoints=$KVCAT_RUN_DIR/$RUN_CHECKPOINTS
  for root in "$KVCAT_HERE" "$KVCAT_HERE/.." "$KVCAT_HERE/../.."; do
    [[ -f $root/kvcat_nemo/runs/__main__.py ]] || continue
    PYTHONPATH=$root python3 -m kvcat_nemo.runs "$checkpoints" 2> /dev/null && return
  done
  for folder in "$checkpoints"/*/; do
    folder=${folder%/}
    [[ -f $folder/$RUN_MANIFEST && ! -L $folder && ! -e $folder$RUN_UNFINISHED && $folder != *"$RUN_BROKEN" ]] && printf '%s\n' "${folder##*/}"
  done
  return 0
}

# Restarts in a row, up to now, that found the checkpoints of the attempt before them.
stalled_restarts() {
  local now=$1 table=$KVCAT_RUN_DIR/$RUN_ATTEMPTS
  [[ -f $table ]] || table=/dev/null
  awk -F '\t' -v now="$now" '$1 == "submitted" { n = 0; next } { n = ($5 == now) ? n + 1 : 0 } END { print n + 0 }' "$table"
}

# begin_attempt NAME JOB NODES: count it, make its folder, and set KVCAT_ATTEMPT_DIR and KVCAT_STOP_FILE.
# Returns 1 when restarting has stopped helping.
begin_attempt() {
  local launch=$KVCAT_RUN_DIR/$RUN_LAUNCH progress stalled
  mkdir -p "$launch"
  progress=$(complete_checkpoints | cksum | tr ' ' '-')
  stalled=$(stalled_restarts "$progress")
  if ((stalled > KVCAT_MAX_STALLED)); then
    say "error: $stalled attempts in a row saved nothing new (limit: $KVCAT_MAX_STALLED restarts without progress); not starting" \
      "again. Look at the logs in $launch, mend the cause and submit anew" >&2
    return 1
  fi
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$(date +%FT%T)" "$2" "$3" "$progress" >> "$KVCAT_RUN_DIR/$RUN_ATTEMPTS"
  open_attempt "$1"
  rm -rf "${KVCAT_ATTEMPT_DIR:?}/$RUN_EXITS" "$KVCAT_STOP_FILE" # of an attempt of the same name
  mkdir -p "$KVCAT_ATTEMPT_DIR"/{"$RUN_EXITS","$RUN_HEALTH","$RUN_NCCL"}
}

# open_attempt NAME: name the files of an attempt.
open_attempt() {
  export KVCAT_ATTEMPT_DIR=$KVCAT_RUN_DIR/$RUN_ATTEMPT$1
  export KVCAT_STOP_FILE=$KVCAT_ATTEMPT_DIR/$RUN_STOP
}

next_attempt() {
  local n=1
  while [[ -e $(printf '%s/%s%03d' "$KVCAT_RUN_DIR" "$RUN_ATTEMPT" "$n") ]]; do ((n += 1)); done
  printf '%03d' "$n"
}

# ask_to_stop REASON: ranks look for this file at every step boundary; the first reason is kept.
ask_to_stop() {
  [[ -e $KVCAT_STOP_FILE ]] && return
  say "$1: asking all ranks to save and stop"
  mkdir -p "$KVCAT_ATTEMPT_DIR" && printf '%s\n' "$1" > "$KVCAT_STOP_FILE"
}

# wait_for PID: its exit code, whatever signals are trapped meanwhile (each makes `wait` return early).
wait_for() {
  while kill -0 "$1" 2> /dev/null; do wait "$1"; done
  wait "$1" # bash remembers how it ended
}

# write_record FILE WORD…: tab-separated, complete or not there.
write_record() {
  local file=$1 IFS=$'\t'
  shift
  printf '%s\n' "$*" > "$file.$$" && mv -f "$file.$$" "$file"
}

# verdict FIRST LAST: what ranks FIRST…LAST recorded: done, again, or failed (some failed, or left no record).
verdict() {
  local rank record code result='done'
  for ((rank = $1; rank <= $2; rank++)); do
    record=$KVCAT_ATTEMPT_DIR/$RUN_EXITS/rank-$(printf '%04d' "$rank")
    code=missing
    [[ -f $record ]] && read -r code _ < "$record"
    case $code in
      0) ;;
      "$KVCAT_EXIT_AGAIN") result=again ;;
      *)
        echo failed
        return
        ;;
    esac
  done
  echo "$result"
}

# The rank that failed first by the nodes' clocks, its node, and the end of its log.
explain_failure() {
  local first code node log rank
  first=$(for f in "$KVCAT_ATTEMPT_DIR/$RUN_EXITS"/rank-[0-9][0-9][0-9][0-9]; do
    [[ -f $f ]] && printf '%s\t%s\n' "${f##*/rank-}" "$(< "$f")"
  done | awk -F '\t' -v again="$KVCAT_EXIT_AGAIN" -v peer="$KVCAT_EXIT_PEER_DIED" \
    '$2 != 0 && $2 != again { print ($2 == peer) "\t" $0 }' | sort -t $'\t' -k 1,1n -k 5,5n | cut -f 2- | head -n 1)
  if [[ -z $first ]]; then
    say "no rank recorded a failure: a process was killed before it could, or never started"
    return
  fi
  IFS=$'\t' read -r rank code node _ log <<< "$first"
  say "node $node: rank $((10#$rank)) was the first to fail, with exit code $code$(exit_hint "$code"); its log: $log"
  say "the last lines of it:"
  tail -n 25 "$log" | sed 's/^/  | /'
}

exit_hint() {
  case $1 in
    "$KVCAT_EXIT_PEER_DIED") printf ' (another rank died; its log says which)' ;;
    137) printf ' (killed: often out of memory)' ;;
    13[0-9] | 14[0-9] | 15[0-9]) printf ' (signal %d)' "$(($1 - 128))" ;;
  esac
}
