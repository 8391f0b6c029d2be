#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train with several processes: `mmeformer train CONFIG --gpus PROCESSES`.
#   tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# Several nodes: run it on each with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG PROCESSES [ARGUMENTS]" >&2; exit 2; }
config=$1 processes=$2
shift 2
exec "${PYTHON:-python}" "$(dirname "$0")/train.py" "$config" --gpus "$processes" "$@"
