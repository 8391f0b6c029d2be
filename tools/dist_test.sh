#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Evaluate with several processes: `mmeformer test CONFIG CHECKPOINT --gpus PROCESSES`.
#   tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
# Several nodes: run it on each with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT PROCESSES [ARGUMENTS]" >&2; exit 2; }
config=$1 checkpoint=$2 processes=$3
shift 3
exec "${PYTHON:-python}" "$(dirname "$0")/test.py" "$config" "$checkpoint" --gpus "$processes" "$@"
