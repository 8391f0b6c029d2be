#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on a Slurm cluster.
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#       tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
# A run that Slurm takes off its machines (--signal and time limit, preemption) saves a checkpoint
# and is queued again, to continue from there: as a job of sbatch by scontrol requeue, else by
# another srun.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG [ARGUMENTS]" >&2; exit 2; }
partition=$1 job=$2 config=$3
shift 3
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
preempted=175 # mmeformer/signals.py
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=(--resume)
while :; do
    code=0
    # SRUN_ARGS holds several words on purpose.
    # shellcheck disable=SC2086
    srun --partition="$partition" --job-name="$job" --gres="gpu:$per_node" \
        --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 --signal=USR1@120 ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@" \
        ${resume[@]+"${resume[@]}"} || code=$?
    case $code in
        # The last two: SIGUSR1 or SIGTERM before Python could handle it, or a second signal.
        "$preempted" | 138 | 143) ;;
        *) exit "$code" ;;
    esac
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    # The last --resume counts: the newest checkpoint, or what the one before it names.
    resume=(--resume)
done
