#!/usr/bin/env bash
# From nothing to a trained small BitMar: environment, data, shards, a run on 2 ranks, its losses.
#
#     bash launch/demo.sh [key.path=value ...]
#
# RAW=dir   raw files of one's own in BabyLM's layout (default: a small GENERATED set)
# NAME=name the run's name and folder, runs/NAME (default: demo, or the name of RAW's folder)
# A second run reuses the environment, the data, the shards and the finished run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

heading() { printf '\n== %s\n' "$*"; }

recipe=launch/recipes/demo.yaml
if [ -n "${RAW:-}" ]; then
    [ -d "$RAW" ] || stop "RAW=$RAW is no folder"
    raw=$RAW
    name=$(basename "$(cd "$RAW" && pwd)")
    shards=data/$name/shards
else
    raw=data/demo/raw
    name=demo
    shards=data/demo/shards
fi
name=${NAME:-$name}
folder=runs
for override in "$@"; do
    case $override in
        run.name=*) name=${override#*=} ;;
        run.directory=*) folder=${override#*=} ;;
    esac
done

heading "environment"
set_up
python --version

if [ -z "${RAW:-}" ]; then
    heading "GENERATED raw data (RAW=dir trains on your own)"
    python tools/make_demo_data.py --out "$raw"
fi

heading "shards"
vocabulary=$(sed -n 's/^ *vocab_size: *\([0-9]*\).*/\1/p' "$recipe")
python tools/make_shards.py --raw "$raw" --out "$shards" --vocab-size "$vocabulary"

ranks=2
gpus=$(count_gpus)
if [ "$gpus" -eq 1 ]; then
    ranks=1
fi
heading "training on $ranks ranks ($([ "$gpus" -gt 0 ] && echo "GPU" || echo "CPU")); Ctrl-C stops it, the same command goes on"
launch_local "$ranks" --config "$recipe" "data.shards=$shards" "run.name=$name" "$@"

heading "result of $folder/$name"
python launch/show_run.py "$folder/$name"
