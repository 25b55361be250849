#!/usr/bin/env bash
# Train a recipe on the hosts of a hostfile (`host slots=N` lines), started from any machine that reaches them by ssh:
#
#     bash launch/multinode.sh --hostfile hosts --config RECIPE [--ds DS_CONFIG] [key.path=value ...]
#
# launch/README.md says what the hosts must have; each is asked before anything starts. Exit code: the run's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh
set_up
exec python -m launch.multinode "$@"
