#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train with several processes: one per GPU or, on a machine without GPUs, over gloo on the CPU.
#   tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# Several nodes: run it on each with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set.
# SIGTERM and SIGUSR1 save a checkpoint; the exit status is then 175.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG PROCESSES [ARGUMENTS]" >&2; exit 2; }
config=$1 processes=$2
shift 2
preempted=175 # mmeformer/signals.py
launcher='' signaled=''
# torch.distributed.run hands SIGTERM on to its processes, waits for them for 30 s, and returns 1.
trap 'signaled=yes; [ -z "$launcher" ] || kill -TERM "$launcher"' TERM USR1
trap '[ -z "$launcher" ] || kill -INT "$launcher"' INT
# SIGUSR1 would end it and leave its processes alone.
(trap '' USR1; exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@") &
launcher=$!
[ -z "$signaled" ] || kill -TERM "$launcher"
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait
    code=0
    wait "$launcher" || code=$?
done
[ -z "$signaled" ] || [ "$code" -eq 0 ] || code=$preempted
exit "$code"
