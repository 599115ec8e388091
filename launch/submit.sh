#!/usr/bin/env bash
# submit.sh [OPTION…] --run-dir DIR -- COMMAND…: run COMMAND on a Slurm cluster, one rank per GPU, and again after preemption.
#
#   --run-dir DIR            the run's folder, on a file system that all nodes share (required)
#   --nodes N                nodes (1)
#   --gpus-per-node N        GPUs, and ranks, on each node (8); 0 for CPU nodes
#   --procs-per-node N       ranks on each node, where it differs from the GPUs
#   --cpus-per-node N        CPUs for them; --exclusive takes whole nodes
#   --job-name NAME          (the run folder's name, with _ for what a job's name cannot hold)
#   --time LIMIT             Slurm's time limit of one attempt (04:00:00); the run goes on after it
#   --partition P, --account A, --qos Q, --constraint C, --exclude NODES: as sbatch's
#   --image IMAGE            run in this container (pyxis and enroot): a .sqsh file or a registry's image; bare without
#   --mount SRC:DST          mount into it, again for more; the run's folder is mounted anyway
#   --setup CODE             shell code before the command on each node, such as 'source /shared/venv/bin/activate'
#   --env NAME[=VALUE]       set for all ranks, again for more; NAME alone takes what the submitting shell has, and
#                            writes it nowhere (for secrets)
#   --interface IFNAME       network interface for NCCL and gloo (theirs to choose)
#   --ib-hca LIST            InfiniBand adapters for NCCL (NCCL_IB_HCA)
#   --master-port PORT       rendezvous (from the job's number)
#   --signal-seconds S       ask the ranks to save S seconds before the time limit (300)
#   --stop-seconds S         and give up waiting for them after S (signal-seconds less 60, or half of it)
#   --max-stalled N          restarts without a new checkpoint that are allowed (3)
#   --restart-on-failure     queue again after a failure too, within that limit
#   --health-command CODE    a check on every node before the start; --health-seconds S for all checks (300)
#   --min-disk-gb N          free space that the run's folder must have (20)
#   --exit-wait S            seconds that other nodes get once one has ended (60)
#   --dry-run                print the script and its environment, and submit nothing
#
# The whole script is kept in DIR/launch/job.sbatch, with the launch scripts as they are now, so that a requeued job is the same.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

run_dir='' nodes=1 gpus=8 procs='' cpus='' name='' limit=04:00:00 image='' setup='' interface='' ib_hca='' port=''
signal_seconds=300 stop_seconds='' max_stalled=3 restart_on_failure=0 health_command='' health_seconds=300
min_disk_gb=20 exit_wait=60 dry_run='' exclusive=''
mounts=() environment=() kept=() sbatch=()

# default_name FOLDER: its name, with what a job's name cannot hold replaced.
default_name() {
  local LC_ALL=C word
  word=$(basename -- "$1")
  word=${word//[^[:alnum:]._-]/_}
  [[ $word == [[:alnum:]_]* ]] || word=_$word
  printf '%s' "$word"
}

secrets_table > /dev/null
while (($#)); do
  option=$1
  case $option in
    --) shift; break ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=1; shift; continue ;;
    --exclusive) exclusive=1; shift; continue ;;
    --restart-on-failure) restart_on_failure=1; shift; continue ;;
    --*=*) set -- "${option%%=*}" "${option#*=}" "${@:2}"; option=$1 ;;
  esac
  (($# > 1)) || die "$option needs a value (submit.sh --help)"
  [[ $option == --env ]] || refuse_secret "$option" "$2"
  case $option in
    --run-dir) run_dir=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus-per-node) gpus=$2 ;;
    --procs-per-node) procs=$2 ;;
    --cpus-per-node) cpus=$2 ;;
    --job-name) name=$2 ;;
    --time) limit=$2 ;;
    --partition | --account | --qos | --constraint | --exclude) sbatch+=("$option" "$2") ;;
    --image) image=$2 ;;
    --mount) mounts+=("$2") ;;
    --setup) setup=$2 ;;
    --env) environment+=("$2") ;;
    --interface) interface=$2 ;;
    --ib-hca) ib_hca=$2 ;;
    --master-port) port=$2 ;;
    --signal-seconds) signal_seconds=$2 ;;
    --stop-seconds) stop_seconds=$2 ;;
    --max-stalled) max_stalled=$2 ;;
    --health-command) health_command=$2 ;;
    --health-seconds) health_seconds=$2 ;;
    --min-disk-gb) min_disk_gb=$2 ;;
    --exit-wait) exit_wait=$2 ;;
    *) die "unknown option $option (submit.sh --help)" ;;
  esac
  shift 2
done

# --- everything is checked before anything is written ---

(($#)) || die "no command: put it after --"
[[ -n $run_dir ]] || die "--run-dir is missing: name the run's folder, on a file system that all nodes share"
require --run-dir "$run_dir"
run_dir=$(realpath -m -- "$run_dir")
require --run-dir "$run_dir"
require --nodes "$nodes"
require --gpus-per-node "$gpus"
require --signal-seconds "$signal_seconds"
[[ -n $name ]] || name=$(default_name "$run_dir")
: "${procs:=$((10#$gpus > 0 ? 10#$gpus : 1))}"
: "${stop_seconds:=$((10#$signal_seconds > 120 ? 10#$signal_seconds - 60 : 10#$signal_seconds / 2))}"
require --procs-per-node "$procs"
[[ -z $cpus ]] || require --cpus-per-node "$cpus"
[[ -z $port ]] || require --master-port "$port"
require --stop-seconds "$stop_seconds"
require --max-stalled "$max_stalled"
require --health-seconds "$health_seconds"
require --min-disk-gb "$min_disk_gb"
require --exit-wait "$exit_wait"
require --time "$limit"
require --job-name "$name"
require --setup "$setup"
require --health-command "$health_command"
[[ -z $image ]] || require --image "$image"
[[ -z $interface ]] || require --interface "$interface"
[[ -z $ib_hca ]] || require --ib-hca "$ib_hca"
for ((n = 0; n < ${#sbatch[@]}; n += 2)); do require "${sbatch[n]}" "${sbatch[n + 1]}"; done
# 08 is 8, and not an octal number.
for number in nodes gpus procs cpus port signal_seconds stop_seconds max_stalled health_seconds min_disk_gb exit_wait; do
  [[ -z ${!number} ]] || printf -v "$number" '%d' "$((10#${!number}))"
done
((stop_seconds <= signal_seconds)) || die "--stop-seconds=$stop_seconds is more than --signal-seconds=$signal_seconds"
((gpus == 0 || procs <= gpus)) || die "--procs-per-node=$procs: more ranks than --gpus-per-node=$gpus"
for mount in "${mounts[@]}"; do require --mount "$mount"; done
[[ -z $image || $run_dir != *[:,]* ]] || die "--run-dir=$run_dir: is mounted into the container, and pyxis parts mounts at : and ,; leave them out"
((${#mounts[@]} == 0)) || [[ -n $image ]] || die "--mount=${mounts[0]}: there is no container to mount into; give --image"
for pair in "${environment[@]}"; do
  variable=${pair%%=*}
  refuse_secret "--env" "$variable"
  require --env "$variable" env-name
  ! is_own_variable "$variable" || die "--env=$variable: the launcher sets that itself; give the option it stands for (submit.sh --help)"
  if [[ $pair == *=* ]]; then
    # This script is kept on disk and printed: a secret has no place in it.
    refuse_secret "--env=$variable" "${pair#*=}" "$variable"
  else
    [[ -n ${!variable+set} ]] || die "--env=$variable: is not set in this shell; export it first, or give --env $variable=VALUE"
    kept+=("$variable")
  fi
done

# The command is kept in the script, too: each word, and with the word before it (--token WORD).
previous=
for word in "$@"; do
  refuse_secret "the command's word ${word%%=*}" "$word" "$([[ $word != *=* ]] || printf '%s' "${word%%=*}")"
  [[ $previous != -* ]] || refuse_secret "the command's option ${previous%%=*}" "$previous $word"
  previous=$word
done

# --- the script ---

quoted() { printf '%q' "$1"; }

# directive OPTION VALUE: a line that sbatch reads. It knows double quotes, and a backslash before what they would end.
directive() {
  local LC_ALL=C value=$2 escape=$'\\' quote='"'
  if [[ $value == *[^[:alnum:]_.,:@%/+=-]* ]]; then
    value=${value//"$escape"/"$escape$escape"}
    value=$quote${value//"$quote"/"$escape$quote"}$quote
  fi
  printf '#SBATCH %s=%s\n' "$1" "$value"
}

script() {
  local n
  echo '#!/usr/bin/env bash'
  directive --job-name "$name"
  directive --nodes "$nodes"
  directive --ntasks-per-node 1
  directive --time "$limit"
  printf '#SBATCH %s\n' --requeue --open-mode=append
  directive --signal "B:USR1@$signal_seconds"
  directive --output "${run_dir//%/%%}/$RUN_LAUNCH/slurm-%j.out" # a % begins one of sbatch's own patterns
  for ((n = 0; n < ${#sbatch[@]}; n += 2)); do directive "${sbatch[n]}" "${sbatch[n + 1]}"; done
  ((gpus == 0)) || echo "#SBATCH --gpus-per-node=$gpus"
  [[ -z $cpus ]] || echo "#SBATCH --cpus-per-task=$cpus"
  [[ -z $exclusive ]] || echo '#SBATCH --exclusive'
  echo
  local joined
  joined=$(IFS=,; echo "$run_dir:$run_dir${mounts[*]:+,${mounts[*]}}")
  cat << SETTINGS
export KVCAT_RUN_DIR=$(quoted "$run_dir")
export KVCAT_LAUNCH_DIR=$(quoted "$run_dir/$RUN_SCRIPTS")
export KVCAT_DONE_FILE=$(quoted "$run_dir/$RUN_FINISHED")
export KVCAT_GPUS_PER_NODE=$gpus KVCAT_PROCS_PER_NODE=$procs
export KVCAT_IMAGE=$(quoted "$image")
export KVCAT_MOUNTS=$(quoted "$joined")
export KVCAT_SETUP=$(quoted "$setup")
export KVCAT_INTERFACE=$(quoted "$interface")
export KVCAT_STOP_SECONDS=$stop_seconds KVCAT_EXIT_WAIT=$exit_wait
export KVCAT_MAX_STALLED=$max_stalled KVCAT_RESTART_ON_FAILURE=$restart_on_failure
export KVCAT_HEALTH_COMMAND=$(quoted "$health_command")
export KVCAT_HEALTH_SECONDS=$health_seconds KVCAT_MIN_DISK_GB=$min_disk_gb
SETTINGS
  [[ -z $port ]] || echo "export KVCAT_MASTER_PORT=$port"
  [[ -z $ib_hca ]] || echo "export NCCL_IB_HCA=$(quoted "$ib_hca")"
  local pair names=''
  for pair in "${environment[@]}"; do
    names+=,${pair%%=*}
    [[ $pair == *=* ]] && echo "export ${pair%%=*}=$(quoted "${pair#*=}")"
  done
  echo "KVCAT_KEEP_ENV=$(quoted "$names")"
  ((${#kept[@]} == 0)) || echo "# taken from the submitting shell, and written nowhere: ${kept[*]}"
  printf 'KVCAT_COMMAND=('
  printf ' %q' "$@"
  printf ' )\n\n'
  tail -n +2 "$here/slurm.sbatch"
}

if [[ -n $dry_run ]]; then
  say "would write $run_dir/$RUN_JOB_SCRIPT and run: sbatch --parsable $(quoted "$run_dir/$RUN_JOB_SCRIPT")" >&2
  script "$@"
  exit 0
fi

command -v sbatch > /dev/null || die "sbatch is not on PATH: submit from a node of the cluster, or look at it with --dry-run"
mkdir -p "$run_dir/$RUN_SCRIPTS"
cp "$here"/{common.sh,health.sh,rank.sh,run_names.sh,torchrun.sh,values.tsv} "$run_dir/$RUN_SCRIPTS/"
# Who decides which checkpoints are complete goes along: on the nodes it needs Python alone.
for root in "$here/.." "$here/../.."; do
  [[ -f $root/kvcat_nemo/runs/__main__.py ]] || continue
  mkdir -p "$run_dir/$RUN_SCRIPTS"/kvcat_nemo/{runs,common}
  cp "$root/kvcat_nemo/__init__.py" "$run_dir/$RUN_SCRIPTS/kvcat_nemo/"
  for room in runs common; do cp "$root/kvcat_nemo/$room"/*.py "$run_dir/$RUN_SCRIPTS/kvcat_nemo/$room/"; done
  break
done
script "$@" > "$run_dir/$RUN_LAUNCH/.job.sbatch.$$"
mv -f "$run_dir/$RUN_LAUNCH/.job.sbatch.$$" "$run_dir/$RUN_JOB_SCRIPT"
printf 'submitted\t%s\n' "$(date +%FT%T)" >> "$run_dir/$RUN_ATTEMPTS" # restarts are counted from here
touch "$run_dir/$RUN_SUBMITTED"
say "sbatch --parsable $(quoted "$run_dir/$RUN_JOB_SCRIPT")" >&2
job=$(sbatch --parsable "$run_dir/$RUN_JOB_SCRIPT") || die "sbatch refused the job (above); the script is $run_dir/$RUN_JOB_SCRIPT"
say "job $job; its output: $run_dir/$RUN_LAUNCH/slurm-${job%%;*}.out" >&2
echo "$job"
