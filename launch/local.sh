#!/usr/bin/env bash
# Train a recipe on the processes of this machine, through DeepSpeed's launcher:
#
#     bash launch/local.sh RECIPE [RANKS] [key.path=value ...]
#
# RECIPE is a file, or the name of one in launch/recipes. RANKS is by default the number of GPUs, or 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

[ $# -gt 0 ] || stop "usage: bash launch/local.sh RECIPE [RANKS] [key.path=value ...]"
recipe=$1
shift
if [ ! -e "$recipe" ] && [ -e "launch/recipes/$recipe.yaml" ]; then
    recipe="launch/recipes/$recipe.yaml"
fi
ranks=
if [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    ranks=$1
    shift
fi
set_up
if [ -z "$ranks" ]; then
    ranks=$(count_gpus)
    [ "$ranks" -gt 0 ] || ranks=1
fi
launch_local "$ranks" --config "$recipe" "$@"
