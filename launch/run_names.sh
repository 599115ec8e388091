#!/usr/bin/env bash
# Names within a run's folder, and exit codes. Made by: python -m kvcat_nemo.runs --shell-names > launch/run_names.sh
# shellcheck disable=SC2034 # the scripts that source common.sh use them
readonly RUN_CHECKPOINTS=checkpoints
readonly RUN_LAUNCH=launch
readonly RUN_MANIFEST=kvcat_seal.json
readonly RUN_UNFINISHED=-unfinished
readonly RUN_BROKEN=-broken
readonly RUN_FINISHED=kvcat/finished.json
readonly RUN_SUBMITTED=launch/submitted
readonly RUN_ATTEMPTS=launch/attempts.tsv
readonly RUN_JOB_SCRIPT=launch/job.sbatch
readonly RUN_SCRIPTS=launch/bin
readonly RUN_ATTEMPT=launch/attempt-
readonly RUN_EXITS=exit
readonly RUN_HEALTH=health
readonly RUN_NCCL=nccl
readonly RUN_STOP=stop
# A process that was asked to stop, saved and wants to be started again (EX_TEMPFAIL of sysexits.h).
readonly KVCAT_EXIT_AGAIN=75
# One that ended because another did (EX_UNAVAILABLE).
readonly KVCAT_EXIT_PEER_DIED=69
